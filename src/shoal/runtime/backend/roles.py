"""What a graph wants from an engine session, read off the names of its inputs and outputs (see `shoal.model.spec`)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from shoal.errors import UnsupportedModelError
from shoal.model.spec import (
    ATTENTION_MASK,
    LOGIT_ROWS,
    LOGITS,
    PAST_PREFIX,
    POSITION_IDS,
    PRESENT_PREFIX,
    SEQLENS_K,
    TOTAL_SEQUENCE_LENGTH,
)
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array
from shoal.runtime.settings import TensorForm

BATCHED = frozenset({SEQLENS_K, TOTAL_SEQUENCE_LENGTH, LOGIT_ROWS})
"""Of those, what says of each sequence of a batch where it stands."""
OURS = "shoal"
"""Producer of lowered graphs, and domain of the canonical functions."""
DERIVED = frozenset({ATTENTION_MASK, POSITION_IDS, SEQLENS_K, TOTAL_SEQUENCE_LENGTH, LOGIT_ROWS})
SHARING = frozenset({"GroupQueryAttention"})
"""Operators that write the new positions into the buffer of the old ones, when past and present are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """One half of a layer's cache: input *past* and output *present*, `[1, heads, positions, head_dim]`."""

    past: str
    present: str
    dtype: np.dtype[np.generic]
    heads: int
    head_dim: int

    def bytes_per_position(self) -> int:
        return self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An output that is not cache; *tail* are its dimensions after the rows, None where they are not all known."""

    name: str
    dtype: np.dtype[np.generic]
    tail: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """`given` are the inputs that the caller brings, `derived` those that follow from a `SequenceStep`.

    `shared`: past and present are one buffer of the whole context; otherwise each step returns a cache that is longer.
    `exact_cuts`: the graph is a piece of a model whose cuts must not change a bit (ADR 1).
    `settled`: apart from a shared cache, all shapes follow from the number of rows in and out.
    """

    caches: tuple[CacheTensor, ...]
    shared: bool
    given: tuple[str, ...]
    derived: Mapping[str, np.dtype[np.generic]]
    outputs: tuple[Output, ...]
    dtypes: Mapping[str, np.dtype[np.generic]]
    exact_cuts: bool

    @property
    def settled(self) -> bool:
        growing = bool(self.caches) and not self.shared
        return not growing and ATTENTION_MASK not in self.derived and all(o.tail is not None for o in self.outputs)


def with_batch(model: onnx.ModelProto, roles: Roles) -> bool:
    """Let *model* take several sequences at once, each with its own cache; False where it cannot.

    Our lowered graphs say 1 where the batch is and compute nothing across it.
    """
    if not (roles.exact_cuts and roles.shared and set(roles.derived) <= BATCHED and model.producer_name == OURS):
        return False
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name == SEQLENS_K or (len(dims) > 1 and dims[0].dim_value == 1):
            dims[0].Clear()
            dims[0].dim_param = "sequences"
    del model.graph.value_info[:]
    return True


def roles_of(model: onnx.ModelProto) -> Roles:
    """Read the roles; raises UnsupportedModelError when a cache input has no output or no fixed size."""
    graph = model.graph
    inputs = _inputs(model)
    outputs = {v.name: v for v in graph.output}
    caches = tuple(_cache(v, outputs) for name, v in inputs.items() if name.startswith(PAST_PREFIX))
    presents = {c.present for c in caches}
    dtypes = {name: _dtype(v) for name, v in inputs.items()}
    stateful = _stateful(inputs)
    derived = {name: dtypes[name] for name in inputs if name in DERIVED} if stateful else {}
    return Roles(
        caches=caches,
        shared=bool(caches) and any(node.op_type in SHARING for node in graph.node),
        given=_given(inputs),
        derived=derived,
        outputs=tuple(_output(v) for name, v in outputs.items() if name not in presents),
        dtypes=dtypes,
        exact_cuts=stateful or model.producer_name == OURS or any(node.domain == OURS for node in graph.node),
    )


def _inputs(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    weights = {t.name for t in model.graph.initializer}
    return {v.name: v for v in model.graph.input if v.name not in weights}


def _stateful(inputs: Collection[str]) -> bool:
    """A graph with derived names but no cache and no choice of rows is an encoder: it brings its own mask and positions."""
    return LOGIT_ROWS in inputs or any(name.startswith(PAST_PREFIX) for name in inputs)


def _given(inputs: Collection[str]) -> tuple[str, ...]:
    derived = DERIVED if _stateful(inputs) else frozenset()
    return tuple(n for n in inputs if n not in derived and not n.startswith(PAST_PREFIX))


def forms_of(model: onnx.ModelProto) -> tuple[TensorForm, ...]:
    """What the caller of a shard brings, as far as the graph says."""
    inputs = _inputs(model)
    return tuple(_form(inputs[name]) for name in _given(inputs))


def _form(value: onnx.ValueInfoProto) -> TensorForm:
    sizes = tuple(d.dim_value or None for d in value.type.tensor_type.shape.dim)
    return TensorForm(name=value.name, dtype=str(_dtype(value)), shape=sizes)


def batch_inputs(roles: Roles, steps: Sequence[SequenceStep]) -> dict[str, Array]:
    """Masks, positions and lengths of steps that share a call."""
    return {name: np.asarray(batch_value(name, steps), dtype) for name, dtype in roles.derived.items()}


def batch_value(name: str, steps: Sequence[SequenceStep]) -> Array | int | list[int]:
    """One of them, as anything that becomes an array; *name* is of DERIVED.  Only lengths differ between sequences of a call."""
    if name == SEQLENS_K:
        return [step.start + step.count - 1 for step in steps]
    if name == TOTAL_SEQUENCE_LENGTH:
        return max(step.start + step.count for step in steps)
    (step, *_), stop = steps, steps[0].start + steps[0].count
    if name == LOGIT_ROWS:
        # A head over no rows at all is something that not every kernel expects: the last row stands in, and is dropped.
        return np.arange(step.count - max(1, step.logits), step.count)
    if name == POSITION_IDS:
        return np.arange(step.start, stop)[None]
    return np.ones((1, stop))


def output_rows(roles: Roles, output: Output, step: SequenceStep) -> int:
    """How many rows the graph returns in *output*."""
    chosen = output.name == LOGITS and LOGIT_ROWS in roles.derived
    return max(1, step.logits) if chosen else step.count


def _cache(value: onnx.ValueInfoProto, outputs: Mapping[str, onnx.ValueInfoProto]) -> CacheTensor:
    present = PRESENT_PREFIX + value.name.removeprefix(PAST_PREFIX)
    dims = value.type.tensor_type.shape.dim
    sizes = [d.dim_value for d in dims]
    if present not in outputs or len(sizes) != 4 or not (sizes[1] and sizes[3]):
        raise UnsupportedModelError(
            f"cache input {value.name} of shape {[d.dim_value or d.dim_param for d in dims]} needs the shape "
            f"[1, heads, positions, head_dim] with numbers for heads and head_dim, and an output {present}"
        )
    return CacheTensor(past=value.name, present=present, dtype=_dtype(value), heads=sizes[1], head_dim=sizes[3])


def _output(value: onnx.ValueInfoProto) -> Output:
    dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
    known = len(dims) >= 2 and all(dims[2:])
    return Output(name=value.name, dtype=_dtype(value), tail=tuple(dims[2:]) if known else None)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[np.generic]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
