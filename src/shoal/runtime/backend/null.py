"""An engine that computes nothing real, costs what a profile predicts, and yet notices every scheduling mistake.

Numbers.  A row's hidden state is a 64-bit hash, carried as `hidden` 16-bit pieces in float32 (exact).  Layer n maps it to
hash(row, position, n, digest of all rows that the layer's cache holds up to this position): attention in miniature.  A row fed
twice, skipped, out of order, at a wrong position or into another sequence's slot therefore changes every later token, and cutting
between layers changes nothing.  Logits are hashes of (row, token id), spread over [-8, 8).

Cost.  `cost_s(sequences)` seconds per step, handed to `wait`: a manual clock's `advance`, a real `sleep`, or nothing where a
virtual-time pipeline keeps the time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from shoal.errors import InvalidRequestError, UnsupportedModelError
from shoal.model.spec import INPUT_IDS, LOGITS, PAST_PREFIX
from shoal.profile.fleet import BlockTrial
from shoal.runtime.ports import SequenceStep, Shard
from shoal.runtime.request import Array

Words = NDArray[np.uint64]
StepCost = Callable[[Sequence[SequenceStep]], float]

PIECES = 4
PIECE_BITS = 16
BOUNDARY = "hidden"


def free(_sequences: Sequence[SequenceStep]) -> float:
    """A step that takes no time."""
    return 0.0


def do_not_wait(_seconds: float) -> None:
    """For shells that keep the time themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NullBackend:
    """Loads shards made by `null_shard`, or any graph that has their inputs and outputs."""

    cost_s: StepCost = free
    wait: Callable[[float], None] = do_not_wait

    def load(self, shard: Shard) -> "NullSession":
        """Read the shape of the shard off its inputs and outputs; nodes and weights are not looked at."""
        inputs = [v.name for v in shard.graph.graph.input]
        outputs = {v.name: v for v in shard.graph.graph.output}
        layers = sorted({int(n.split(".")[1]) for n in inputs if n.startswith(PAST_PREFIX)})
        if INPUT_IDS not in inputs and BOUNDARY not in inputs:
            raise UnsupportedModelError(
                f"the null engine needs an input {INPUT_IDS} or {BOUNDARY}; the graph has {inputs}"
            )
        vocabulary = outputs[LOGITS].type.tensor_type.shape.dim[-1].dim_value if LOGITS in outputs else 0
        return NullSession(tuple(layers), INPUT_IDS in inputs, vocabulary, shard.context_tokens, self)


@dataclass(slots=True)
class NullSession:
    """Caches hold one word per position, by (slot, layer)."""

    layers: tuple[int, ...]
    embeds: bool
    vocabulary: int
    context_tokens: int
    backend: NullBackend
    caches: dict[int, dict[int, Words]] = field(default_factory=dict)
    closed: bool = False

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.step`."""
        if self.closed:
            raise InvalidRequestError("the session is closed")
        given = tensors[INPUT_IDS] if self.embeds else tensors[BOUNDARY]
        rows = given[0].astype(np.uint64) if self.embeds else _join(given)
        if rows.size != sum(s.count for s in sequences):
            raise InvalidRequestError(f"{rows.size} rows came for sequences of {[s.count for s in sequences]} rows")
        parts = np.split(rows, np.cumsum([s.count for s in sequences])[:-1])
        done = [self._run(step, part) for step, part in zip(sequences, parts, strict=True)]
        self.backend.wait(self.backend.cost_s(sequences))
        if not self.vocabulary:
            return {BOUNDARY: _split(np.concatenate(done))}
        wanted = [row for step, part in zip(sequences, done, strict=True) for row in part[part.size - step.logits :]]
        return {LOGITS: np.stack([_logits(row, self.vocabulary) for row in wanted])} if wanted else {}

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Session.copy`."""
        held = self.caches.get(source, {})
        if self.layers and any(held.get(n, np.empty(0)).size < count for n in self.layers):
            raise InvalidRequestError(f"slot {source} holds less than {count} positions")
        self.caches[target] = {layer: words[:count].copy() for layer, words in held.items()}

    def release(self, slot: int) -> None:
        """See `Session.release`."""
        self.caches.pop(slot, None)

    def close(self) -> None:
        """See `Session.close`."""
        self.caches.clear()
        self.closed = True

    def held_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for layers in self.caches.values() for cache in layers.values())

    def _run(self, step: SequenceStep, rows: Words) -> Words:
        stop = step.start + step.count
        if self.context_tokens and stop > self.context_tokens:
            raise InvalidRequestError(f"position {stop} is beyond the context of {self.context_tokens}")
        positions = np.arange(step.start, stop, dtype=np.uint64)
        cache = self.caches.setdefault(step.slot, {})
        for layer in self.layers:
            past = cache.get(layer, np.empty(0, np.uint64))
            if past.size < step.start:
                raise InvalidRequestError(f"slot {step.slot} holds {past.size} positions; rows begin at {step.start}")
            cache[layer] = np.concatenate([past[: step.start], _mix(rows + _mix(positions))])
            attended = cache[layer].cumsum(dtype=np.uint64)[step.start :]
            rows = _mix(rows ^ _mix(attended + np.uint64(layer)))
        return rows


def null_shard(
    start: int, stop: int, *, embeds: bool = True, vocabulary: int = 64, slots: int = 2, context_tokens: int = 256
) -> Shard:
    """Layers [start, stop) of a null model; the first shard *embeds*, the last has a *vocabulary* (the others 0)."""
    token, hidden = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    describe = onnx.helper.make_tensor_value_info
    inputs = [describe(INPUT_IDS, token, [1, "T"]) if embeds else describe(BOUNDARY, hidden, [1, "T", PIECES])]
    inputs += [describe(f"{PAST_PREFIX}{n}.key", hidden, [1, 1, "P", PIECES]) for n in range(start, stop)]
    logits = describe(LOGITS, hidden, [1, "R", vocabulary])
    output = logits if vocabulary else describe(BOUNDARY, hidden, [1, "T", PIECES])
    model = onnx.helper.make_model(onnx.helper.make_graph([], f"null {start}..{stop}", inputs, [output]))
    return Shard(graph=model, tensors={}, slots=slots, context_tokens=context_tokens, threads=1)


def trial_cost(trials: Sequence[BlockTrial], kinds: Sequence[str], *, overhead_s: float = 0.0) -> StepCost:
    """Seconds per step of a shard whose blocks have *kinds*, as measured trials of batch 1 predict it.

    Each sequence costs what its rows cost in the trials with the nearest context, interpolated over rows (beyond the
    largest: in proportion).
    """
    by_kind = {kind: [t for t in trials if t.kind == kind and t.batch == 1] for kind in set(kinds)}
    missing = sorted(kind for kind, found in by_kind.items() if not found)
    if missing:
        raise InvalidRequestError(
            f"no trial of batch 1 for blocks of kind {', '.join(missing)}", hint="profile the device first"
        )

    def cost_s(sequences: Sequence[SequenceStep]) -> float:
        return overhead_s + sum(_block_s(by_kind[kind], s.count, s.start) for s in sequences for kind in kinds)

    return cost_s


def _block_s(trials: Sequence[BlockTrial], rows: int, context: int) -> float:
    nearest = min(abs(t.context - context) for t in trials)
    line = sorted((t.rows, t.time_s) for t in trials if abs(t.context - context) == nearest)
    counts, times = zip(*line, strict=True)
    if rows > counts[-1]:
        return float(times[-1] * rows / counts[-1])
    return float(np.interp(rows, counts, times))


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (see `sampling`): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _split(rows: Words) -> Array:
    """`[T]` words as float32 `[1, T, 4]` pieces of 16 bits."""
    shifts = np.arange(PIECES, dtype=np.uint64) * np.uint64(PIECE_BITS)
    return ((rows[:, None] >> shifts) & np.uint64(0xFFFF)).astype(np.float32)[None]


def _join(pieces: Array) -> Words:
    shifts = np.arange(PIECES, dtype=np.uint64) * np.uint64(PIECE_BITS)
    # The pieces do not overlap: adding them is joining them.
    words: Words = (pieces[0].astype(np.uint64) << shifts).sum(axis=-1, dtype=np.uint64)
    return words


def _logits(row: np.uint64, vocabulary: int) -> NDArray[np.float32]:
    ids = np.arange(1, vocabulary + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(ids ^ row) >> np.uint64(40)).astype(np.float32) / np.float32(2**20) - np.float32(8)
