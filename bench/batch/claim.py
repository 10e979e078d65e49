"""What answers that are computed together cost against one after another: the worker's own path, store, lowering and session.

Every sequence stands at another position behind a prompt of its own; each round steps them one by one and then all at once.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from bench.measure import MODEL, Cell, Finding, Options, Values, spread, values_of
from bench.nodes import imported_home
from bench.prompt import prompt_ids
from shoal.ids import RequestId
from shoal.model.spec import INPUT_IDS, LOGITS
from shoal.node.artifacts import load_shard, open_artifact
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import SequenceStep, Session
from shoal.runtime.request import Array
from shoal.store.home import open_store

NAME = "batch"
TITLE = "Batch: rows of answers of SmolLM2-135M in one engine call against one call each"
GOAL = 2.5
_WIDTHS = (2, 4, 8)
_THREADS = (1, 2)
_CONTEXT = 512
_LENGTHS = (100, 37, 150, 80, 120, 64, 11, 140)


def cells(options: Options) -> list[Cell]:
    return [Cell(name=f"{n} threads", measure=lambda n=n: _measure(options, n)) for n in _THREADS]  # type: ignore[misc]


def _measure(options: Options, threads: int) -> Values:
    store = open_store(imported_home(options))
    artifact = open_artifact(store, store.library.digest(MODEL))
    span = (0, len(artifact.blocks))
    shard = load_shard(store, artifact, span, slots=len(_LENGTHS), context_tokens=_CONTEXT, threads=threads)
    session = OnnxBackend().load(shard)
    for slot, length in enumerate(_LENGTHS):
        _step(session, [_rows(slot, 0, length)], prompt_ids(options.gguf, length, skip=slot))
    rounds = 4 if options.quick else 25
    seen = {width: [_round(session, width, ahead) for ahead in range(rounds)] for width in _WIDTHS}
    session.close()
    return {
        str(width): {
            "ratio": spread([alone / together for alone, together, _, _ in found]),
            "cpu_ratio": spread([alone / together for _, _, alone, together in found]),
            "together_s": statistics.median(together for _, together, _, _ in found),
            "one_s": statistics.median(alone for alone, _, _, _ in found) / width,
        }
        for width, found in seen.items()
    }


def _round(session: Session, width: int, ahead: int) -> tuple[float, float, float, float]:
    """Seconds, and CPU seconds, of the same rows one by one and together; ends when their logits differ in a bit."""
    steps = [_rows(slot, _LENGTHS[slot] + ahead, 1) for slot in range(width)]
    ids = [7 * slot + ahead for slot in range(width)]
    marks = [(time.perf_counter(), time.process_time())]
    alone = [_step(session, [step], [token]) for step, token in zip(steps, ids, strict=True)]
    marks.append((time.perf_counter(), time.process_time()))
    together = _step(session, steps, ids)
    marks.append((time.perf_counter(), time.process_time()))
    if not np.array_equal(together, np.concatenate(alone)):
        raise RuntimeError(f"{width} rows together have other bits than alone")
    (a, a_cpu), (b, b_cpu), (c, c_cpu) = marks
    return b - a, c - b, b_cpu - a_cpu, c_cpu - b_cpu


def _rows(slot: int, start: int, count: int) -> SequenceStep:
    return SequenceStep(request=RequestId(f"r{slot}"), slot=slot, start=start, count=count, logits=1)


def _step(session: Session, steps: Sequence[SequenceStep], ids: Sequence[int]) -> Array:
    return session.step(steps, {INPUT_IDS: np.array([ids], np.int64)})[LOGITS]


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for threads in _THREADS:
        values = values_of(results, f"{threads} threads")
        for width in _WIDTHS if values is not None else ():
            assert values is not None
            cell = values[str(width)]
            ratio = cell["ratio"]["median"]
            found.append(
                Finding(
                    what=f"tokens per second of {width} answers against one, {threads} {'thread' if threads == 1 else 'threads'}",
                    goal=f">= {GOAL:g}" if width == max(_WIDTHS) else "",
                    measured=f"**{ratio:.2f}** ({cell['together_s'] * 1000:.1f} ms together, {cell['one_s'] * 1000:.1f} for one; "
                    f"by CPU time {cell['cpu_ratio']['median']:.2f}; same bits)",
                    met=ratio >= GOAL if width == max(_WIDTHS) else None,
                )
            )
    return found
