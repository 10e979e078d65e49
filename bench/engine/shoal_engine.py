"""One process of ours: the real path of a worker (store, load_shard, session), timed; speaks JSON on its standard streams."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from shoal.ids import RequestId
from shoal.model.spec import INPUT_IDS, LOGITS
from shoal.node.artifacts import load_shard, open_artifact
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import SequenceStep, Session
from shoal.runtime.scheduler import SchedulerSettings
from shoal.store.home import open_store


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    session = load(asked)
    generate(session, asked["prompt"], asked["warm_tokens"])  # pays for cold pages
    print(json.dumps([generate(session, asked["prompt"], asked["new_tokens"])]))


def load(asked: dict) -> Session:  # type: ignore[type-arg]
    store = open_store(Path(asked["home"]))
    artifact = open_artifact(store, store.library.digest(asked["model"]))
    span = (0, len(artifact.blocks))
    shard = load_shard(store, artifact, span, slots=1, context_tokens=2048, threads=asked["threads"])
    return OnnxBackend().load(shard)


def generate(session: Session, prompt: list[int], new_tokens: int) -> dict[str, object]:
    """Greedy continuation; the prompt enters in the scheduler's chunks."""
    rows = SchedulerSettings().chunk_rows
    marks = [(time.perf_counter(), time.process_time())]
    for start in range(0, len(prompt), rows):
        token = step(session, prompt[start : start + rows], start)
    tokens = [token]
    marks.append((time.perf_counter(), time.process_time()))
    while len(tokens) < new_tokens:
        tokens.append(step(session, tokens[-1:], len(prompt) + len(tokens) - 1))
    marks.append((time.perf_counter(), time.process_time()))
    session.release(0)
    return report(marks, len(prompt), tokens)


def step(session: Session, ids: list[int], start: int) -> int:
    rows = SequenceStep(request=RequestId("bench"), slot=0, start=start, count=len(ids), logits=1)
    return int(session.step([rows], {INPUT_IDS: np.array([ids], np.int64)})[LOGITS][-1].argmax())


def report(marks: list[tuple[float, float]], prompt_tokens: int, tokens: list[int]) -> dict[str, object]:
    (began, began_cpu), (first, first_cpu), (done, done_cpu) = marks
    decoded = len(tokens) - 1
    return {
        "prefill_tokens_per_s": prompt_tokens / (first - began),
        "prefill_cpu_s_per_token": (first_cpu - began_cpu) / prompt_tokens,
        "decode_tokens_per_s": decoded / (done - first),
        "decode_cpu_s_per_token": (done_cpu - first_cpu) / decoded,
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
