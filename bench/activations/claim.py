"""What it costs an answer to write activations smaller: KL divergence of the next token from that of exact ones.

SmolLM2-135M is cut where a plan would cut it; what passes the cut is written and read again by each codec.  For scale: exact
activations in chunks of another size, which changes no bit, and row by row, which changes the last ones; int8 products
amplify any difference.  What writing and reading takes, and what zstd would add to it, is timed on the same tensors.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from bench.activations import over_links
from bench.measure import MODEL, Cell, Finding, Options, Values, quantile, values_of
from bench.nodes import imported_home
from bench.prompt import prompt_ids
from shoal.ids import RequestId
from shoal.model.spec import INPUT_IDS, LOGITS
from shoal.node.artifacts import load_shard, open_artifact
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import SequenceStep, Session
from shoal.runtime.request import Array
from shoal.store.home import open_store
from shoal.transport.codec import Codec
from shoal.transport.frame import pack, unpack

NAME = "activations"
TITLE = "Activations: what activations that are written smaller cost, SmolLM2-135M in two stages, 512 tokens of prose"
_CUTS = (2, 31, 60)
_TOKENS = 512
_CHUNK = 128
_TIMED = (Codec.RAW, Codec.RAW_ZSTD, Codec.FP16, Codec.FP16_ZSTD, Codec.INT8, Codec.INT8_ZSTD, Codec.INT8_PEAKS)
_TIMES = 200
_CODECS = (Codec.FP16, Codec.INT8_PEAKS, Codec.INT8)


def cells(options: Options) -> list[Cell]:
    losses = [Cell(name=f"cut before block {cut}", measure=lambda cut=cut: _measure(options, cut)) for cut in _CUTS]  # type: ignore[misc]
    return [*losses, *over_links.cells(options)]


def _measure(options: Options, cut: int) -> Values:
    store = open_store(imported_home(options))
    artifact = open_artifact(store, store.library.digest(MODEL))
    spans = ((0, cut), (cut, len(artifact.blocks)))
    stages = [
        OnnxBackend().load(load_shard(store, artifact, span, slots=1, context_tokens=_TOKENS, threads=1))
        for span in spans
    ]
    ids = prompt_ids(options.gguf, _TOKENS)
    exact, exact_bytes = _logits(stages, ids, Codec.RAW, _CHUNK)
    found: Values = {
        name: _compared(exact, _logits(stages, ids, Codec.RAW, rows)[0])
        for name, rows in (("other chunks", _CHUNK // 2 + 1), ("row by row", 1))
    }
    for codec in _CODECS:
        logits, size_bytes = _logits(stages, ids, codec, _CHUNK)
        found[codec.value] = _compared(exact, logits) | {"bytes_ratio": size_bytes / exact_bytes}
    rows = 1, _CHUNK
    found["frames"] = {f"{count}": _frames(stages[0], ids[:count]) for count in rows}
    for stage in stages:
        stage.close()
    return found


def _frames(first: Session, ids: Sequence[int]) -> Values:
    """What a frame of so many rows comes to in each codec: bytes, and seconds of processor to write and to read it."""
    step = SequenceStep(request=RequestId("r"), slot=0, start=0, count=len(ids), logits=len(ids))
    made = first.step([step], {INPUT_IDS: np.array([ids], np.int64)})
    first.release(0)
    found: Values = {}
    for codec in _TIMED:
        frame, spent = pack(b"", made, codec=codec), []
        for _ in range(_TIMES):
            began_s = time.process_time()
            unpack(pack(b"", made, codec=codec))
            spent.append(time.process_time() - began_s)
        found[codec.value] = {"bytes": len(frame), "cpu_s": statistics.median(spent)}
    return found


def _logits(stages: Sequence[Session], ids: Sequence[int], codec: Codec, chunk: int) -> tuple[Array, int]:
    """Logits of all positions `[T, V]`, and the bytes of the frames between the stages."""
    first, second = stages
    rows: list[Array] = []
    total = 0
    for start in range(0, len(ids), chunk):
        count = min(chunk, len(ids) - start)
        step = SequenceStep(request=RequestId("r"), slot=0, start=start, count=count, logits=count)
        made = first.step([step], {INPUT_IDS: np.array([ids[start : start + count]], np.int64)})
        frame = pack(b"", made, codec=codec)
        total += len(frame)
        rows.append(second.step([step], unpack(frame)[1])[LOGITS])
    for stage in stages:
        stage.release(0)
    return np.concatenate(rows), total


def _compared(exact: Array, other: Array) -> Values:
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (exact, other))
    divergence = (np.exp(p) * (p - q)).sum(axis=1).tolist()
    same = float((exact.argmax(axis=1) == other.argmax(axis=1)).mean())
    return {"kl": statistics.fmean(divergence), "kl_p99": quantile(divergence, 0.99), "same_token": same}


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for cut in _CUTS:
        values = values_of(results, f"cut before block {cut}")
        for name in ("other chunks", "row by row", *(codec.value for codec in _CODECS)) if values is not None else ():
            assert values is not None
            cell = values[name]
            size = f", {cell['bytes_ratio']:.2f} of the bytes" if "bytes_ratio" in cell else ""
            found.append(
                Finding(
                    what=f"KL from exact activations, {name}, cut before block {cut} of 62",
                    goal="",
                    measured=f"**{cell['kl']:.2g}** per token (p99 {cell['kl_p99']:.2g}), {cell['same_token']:.1%} the same most "
                    f"likely token{size}",
                )
            )
        found += [_sizes(cut, rows, values["frames"][str(rows)]) for rows in (1, _CHUNK)] if values else []
    return found + over_links.findings(results)


def _sizes(cut: int, rows: int, frames: Values) -> Finding:
    said = (f"{name} {frame['bytes']} B, {1e6 * frame['cpu_s']:.0f} us" for name, frame in frames.items())
    what = f"a frame of {rows} row{'s' * (rows > 1)}, cut before block {cut}: bytes, and processor time to write and read it"
    return Finding(what=what, goal="", measured="; ".join(said))
