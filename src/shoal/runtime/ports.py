"""What the serving core asks of engines, and what protocols ask of the serving core."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import onnx

from shoal.ids import RequestId
from shoal.runtime.request import Array, GenerateRequest, InferRequest, InferResult, OutputDelta


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The part of one step that belongs to one sequence.

    Its rows are positions [`start`, `start` + `count`) of the sequence, whose cache lives in `slot` on every stage;
    positions before `start` are already there.  A `start` below what the cache holds rolls it back.
    `logits` is how many of the last rows are to be sampled (0: none, a prefill chunk that is not the last).
    `exact`: a single row must have the same bits whoever shares the step, at whatever price.
    """

    request: RequestId
    slot: int
    start: int
    count: int
    logits: int
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A lowered subgraph with its weights: all that an engine needs.

    `graph` has external stubs for the initializers found in `tensors` (often memory-mapped; the engine may pack them and must
    not write to them).  `slots` and `context_tokens` size the cache; both are 0 where the shard keeps no state.
    `threads` is the engine's intra-operator parallelism.
    """

    graph: onnx.ModelProto
    tensors: Mapping[str, Array]
    slots: int
    context_tokens: int
    threads: int


class Session(Protocol):
    """A loaded shard.  One thread at a time."""

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Run one step and return the shard's outputs, cache excepted.

        Boundary tensors `[1, T, ...]` and `input_ids [1, T]` hold the rows of all *sequences* one after another on axis 1;
        `logits [R, V]` the wanted rows in the same order.  A shard without state takes `sequences=()` and plain tensors.
        """
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Let *target* hold what *source* holds of its first *count* positions, and nothing else.

        Raises InvalidRequestError where *source* holds less.
        """
        ...

    def release(self, slot: int) -> None:
        """Forget the slot's cache and give its pages back."""
        ...

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        ...


class Backend(Protocol):
    """An engine on this machine."""

    def load(self, shard: Shard) -> Session:
        """Build a session; raises UnsupportedModelError when the engine cannot run the graph."""
        ...


class Executor(Protocol):
    """A way to answer requests: staged pipeline, cloud endpoint, cascade."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[OutputDelta]:
        """Stream the answer; closing the iterator cancels the request and frees its slots at once.

        Raises OverloadedError before the first delta when the request is not accepted, ShardLostError in the middle.
        """
        ...

    async def infer(self, request: InferRequest) -> InferResult:
        """Run a stateless model once."""
        ...
