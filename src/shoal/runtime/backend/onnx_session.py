"""A loaded shard in ONNX Runtime: steps, caches and what is bound to what (`shoal.runtime.backend.onnx` loads it).

Cache.  Where the graph updates its cache in place (GroupQueryAttention), all slots lie in one array per layer (`pages`), and a call
binds a run of them as past and as present.  What is small is bound, too, and stays so while calls over these slots have the same
number of rows: after a step that has read a hundred megabytes, Python's own memory is out of the processor's cache, and
binding anew costs 0.3 ms.  Other graphs return a longer cache at each step, which becomes the next step's past: that
copies, and is the price of running the canonical graph or a foreign one as it is.

Steps with several sequences.  Rows of answers go into one call (`grouping`); every other part is a call of its own, and so is
everything where the graph has a batch of one or grows its cache.  Results do not depend on who else is being served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from shoal.errors import InvalidRequestError, OverloadedError, ShoalError
from shoal.ids import RequestId
from shoal.model.spec import LOGIT_ROWS, LOGITS
from shoal.runtime.backend.grouping import Call, alone_call, calls_of, with_company
from shoal.runtime.backend.pages import SlotPages
from shoal.runtime.backend.roles import CacheTensor, Output, Roles, batch_inputs, batch_value, output_rows
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array

ENGINE_ERRORS = (
    native.EPFail,
    native.EngineError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
    RuntimeError,
    ValueError,
)
VIEWS_PER_SLOT = 4
"""Bindings that are kept: each slot alone, and runs of them."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """Arrays that a binding reads and writes, for calls of `rows` (count, logits)."""

    rows: tuple[int, int]
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def fits(self, rows: tuple[int, int], given: Mapping[str, Array]) -> bool:
        """Whether these are its shapes; tensors of others must come before the engine, which refuses them."""
        return self.rows == rows and all(a.shape == self.inputs[n].shape for n, a in given.items())


@dataclass(slots=True)
class _View:
    """A run of slots, bound: the cache for good, the rest for the rows that were last."""

    binding: "ort.IOBinding"
    bound: "_Bound | None" = None


@dataclass(slots=True)
class _Slot:
    """Cache of one sequence: *length* positions, in the pages of all slots or in the values that the last step returned."""

    length: int = 0
    grown: dict[str, Array] = field(default_factory=dict)


class OnnxSession:
    """A loaded shard; *batches*: its graph takes more than one sequence; *odd*: see `lone.odd_widths`."""

    def __init__(
        self,
        session: ort.InferenceSession,
        roles: Roles,
        slots: int,
        context_tokens: int,
        weights: list[ort.OrtValue],
        *,
        batches: bool,
        odd: frozenset[int],
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self._roles = roles
        self._settled = roles.settled
        self._batches = batches and roles.settled
        self._odd = odd
        # Which rows get logits follows from how many there are: written when they are bound.
        self._moving = tuple(name for name in roles.derived if name != LOGIT_ROWS)
        self._context_tokens = context_tokens
        self._weights = weights
        self._slots: dict[int, _Slot] = {slot: _Slot() for slot in range(slots)}
        self._pages = SlotPages(roles.caches, slots, context_tokens) if roles.shared else None
        self._views: dict[tuple[int, int], _View] = {}

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.step`."""
        engine = self._engine
        self._check_given(tensors)
        if not sequences:
            return self._run_plain(engine, tensors)
        for step in sequences:
            self._check_fits(step)
        starts = np.cumsum([0, *(step.count for step in sequences)]).tolist()
        parts: list[Mapping[str, Array]] = [{}] * len(sequences)
        for call in self._calls(sequences):
            given = {name: _rows(tensors[name], call, sequences, starts) for name in self._roles.given}
            wanted = sequences[call.members[0]].logits
            steps = [self._bridge(slot, wanted) if at is None else sequences[at] for slot, at in call.lanes()]
            found = self._run(call, steps, given)
            for lane, (_, at) in enumerate(call.lanes()):
                if at is not None:
                    parts[at] = {name: _part(name, array[lane], sequences[at]) for name, array in found.items()}
                    self._hold(sequences[at])
        return {output.name: joined for output in self._roles.outputs if (joined := _join(output, parts)) is not None}

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Session.copy`."""
        if not self._roles.caches:
            return
        held = self._slots[source]
        if held.length < count:
            raise InvalidRequestError(f"slot {source} holds {held.length} positions, not {count}")
        for array in self._pages.arrays.values() if self._pages is not None else ():
            array[target, :, :count] = array[source, :, :count]
        self._slots[target] = _Slot(count, {name: array[:, :, :count].copy() for name, array in held.grown.items()})

    def release(self, slot: int) -> None:
        """See `Session.release`."""
        held = self._slots.get(slot)
        if held is None:
            return
        held.length = 0
        held.grown = {}
        if (
            self._pages is not None
            and not self._pages.give_back(slot)
            and not any(s.length for s in self._slots.values())
        ):
            self._pages = SlotPages(self._roles.caches, len(self._slots), self._context_tokens)
            self._views.clear()

    def close(self) -> None:
        """See `Session.close`."""
        self._slots.clear()
        self._views.clear()
        self._pages = None
        self._session = None
        self._weights.clear()

    @property
    def _engine(self) -> ort.InferenceSession:
        if self._session is None:
            raise ShoalError("this engine session is closed", hint="load the shard again")
        return self._session

    def _check_given(self, tensors: Mapping[str, Array]) -> None:
        missing = [name for name in self._roles.given if name not in tensors]
        if missing:
            raise InvalidRequestError(f"input {', '.join(missing)} is missing; {sorted(tensors)} came", param="tensors")

    def _check_fits(self, step: SequenceStep) -> None:
        if not self._roles.caches:
            return
        slot = self._slots.get(step.slot)
        stop = step.start + step.count
        if slot is None or stop > self._context_tokens or step.start > slot.length:
            held = slot.length if slot else 0
            raise InvalidRequestError(
                f"positions {step.start} to {stop} do not fit slot {step.slot} of {len(self._slots)}, which holds {held} of "
                f"{self._context_tokens} positions"
            )

    def _calls(self, sequences: Sequence[SequenceStep]) -> list[Call]:
        if not self._batches:
            return [alone_call(at, step.slot) for at, step in enumerate(sequences)]
        ends = {n: slot.length for n, slot in self._slots.items()} | {s.slot: s.start + s.count for s in sequences}
        full = {slot for slot, end in ends.items() if end >= self._context_tokens}
        calls = calls_of(sequences, full)
        if not self._odd:
            return calls
        exact = {at for at, step in enumerate(sequences) if step.exact and step.count == 1}
        return [
            call if exact.isdisjoint(call.members) else with_company(call, len(self._slots), full, self._odd)
            for call in calls
        ]

    def _run_plain(self, engine: ort.InferenceSession, tensors: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self._roles.outputs]
        feeds = {name: np.asarray(tensors[name], self._roles.dtypes[name]) for name in self._roles.given}
        try:
            return dict(zip(names, engine.run(names, feeds), strict=True))
        except ENGINE_ERRORS as error:
            raise failed(error) from error

    def _run(self, call: Call, steps: Sequence[SequenceStep], given: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs of one engine call, `[lanes, rows, ...]`."""
        if not self._settled:
            return self._run_growing(steps[0], given)
        view = self._view(call.first, call.width)
        rows = (steps[0].count, steps[0].logits)
        bound = view.bound
        if bound is None or not bound.fits(rows, given):
            bound = view.bound = self._bind_rows(view.binding, steps, given)
        for name, array in given.items():
            bound.inputs[name][...] = array
        for name in self._moving:
            bound.inputs[name][...] = batch_value(name, steps)
        self._call(view.binding)
        return {name: array.copy() for name, array in bound.outputs.items()}

    def _view(self, first: int, width: int) -> _View:
        """The binding of a run of slots; those that were made first go when there are too many."""
        view = self._views.get((first, width))
        if view is not None:
            return view
        if len(self._views) >= VIEWS_PER_SLOT * max(1, len(self._slots)):
            del self._views[next(iter(self._views))]
        view = self._views[first, width] = _View(self._engine.io_binding())
        for cache in self._roles.caches:
            assert self._pages is not None
            value = ort.OrtValue.ortvalue_from_numpy(self._pages.arrays[cache.past][first : first + width])
            view.binding.bind_ortvalue_input(cache.past, value)
            view.binding.bind_ortvalue_output(cache.present, value)
        return view

    def _bind_rows(self, binding: "ort.IOBinding", steps: Sequence[SequenceStep], given: Mapping[str, Array]) -> _Bound:
        """Bind arrays of these shapes for everything but the cache."""
        first = {**given, **batch_inputs(self._roles, steps)}
        inputs: dict[str, Array] = {name: np.array(array, self._roles.dtypes[name]) for name, array in first.items()}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        outputs = {o.name: self._bind_output(binding, o, steps) for o in self._roles.outputs}
        known = {name: array for name, array in outputs.items() if array is not None}
        return _Bound((steps[0].count, steps[0].logits), inputs, known)

    def _run_growing(self, step: SequenceStep, given: Mapping[str, Array]) -> Mapping[str, Array]:
        """A call whose shapes only the engine knows, or whose cache comes back longer."""
        slot = self._slots.get(step.slot, _Slot())
        binding = self._view(step.slot, 1).binding if self._roles.shared else self._engine.io_binding()
        for name, array in {**given, **batch_inputs(self._roles, [step])}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array, self._roles.dtypes[name]))
        outputs = {output.name: self._bind_output(binding, output, [step]) for output in self._roles.outputs}
        for cache in () if self._roles.shared else self._roles.caches:  # behind the others, as in the graph
            past = slot.grown.get(cache.past, _empty(cache))[:, :, : step.start]
            binding.bind_cpu_input(cache.past, np.ascontiguousarray(past))
            binding.bind_output(cache.present)
        self._call(binding)
        return self._collect(binding, outputs, slot)

    def _call(self, binding: "ort.IOBinding") -> None:
        try:
            self._engine.run_with_iobinding(binding)
        except ENGINE_ERRORS as error:
            raise failed(error) from error

    def _bind_output(self, binding: "ort.IOBinding", output: Output, steps: Sequence[SequenceStep]) -> Array | None:
        """The array that the engine will write, or None where only it knows the shape."""
        if output.tail is None:
            binding.bind_output(output.name)
            return None
        array = np.empty((len(steps), output_rows(self._roles, output, steps[0]), *output.tail), output.dtype)
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _collect(
        self, binding: "ort.IOBinding", outputs: Mapping[str, Array | None], slot: _Slot
    ) -> Mapping[str, Array]:
        unknown = [name for name, array in outputs.items() if array is None]
        if self._roles.shared and not unknown:
            found: dict[str, Array] = {}
        else:
            names = [o.name for o in self._engine.get_outputs()]
            found = {n: v.numpy() for n, v in zip(names, binding.get_outputs(), strict=True)} if names else {}
        for cache in () if self._roles.shared else self._roles.caches:
            slot.grown[cache.past] = found[cache.present]
        return {name: found[name] if array is None else array for name, array in outputs.items()}

    def _bridge(self, slot: int, logits: int) -> SequenceStep:
        """A row that nobody wants, where the next wanted one of its slot will be."""
        return SequenceStep(request=RequestId(""), slot=slot, start=self._slots[slot].length, count=1, logits=logits)

    def _hold(self, step: SequenceStep) -> None:
        """The slot ends with this step now."""
        if self._roles.caches:
            self._slots[step.slot].length = step.start + step.count


def _rows(tensor: Array, call: Call, sequences: Sequence[SequenceStep], starts: Sequence[int]) -> Array:
    """The rows of a call, `[lanes, count, ...]`; those that nobody wants are copies."""
    if call.width == 1:
        at = call.members[0]
        return tensor[:, starts[at] : starts[at] + sequences[at].count]
    rows = [starts[call.members[0] if at is None else at] for _, at in call.lanes()]
    return tensor[0, rows][:, None]


def _part(name: str, lane: Array, step: SequenceStep) -> Array:
    """What belongs to a step of one lane, `[rows, ...]`: of logits only the rows that it asks for."""
    return lane[lane.shape[0] - step.logits :] if name == LOGITS else lane


def _empty(cache: CacheTensor) -> Array:
    return np.empty((1, cache.heads, 0, cache.head_dim), cache.dtype)


def _join(output: Output, parts: Sequence[Mapping[str, Array]]) -> Array | None:
    """Rows of all sequences: logits `[R, V]` (None when nobody wants any), the others `[1, T, ...]`."""
    arrays = [part[output.name] for part in parts]
    if output.name == LOGITS:
        arrays = [a for a in arrays if a.shape[0]]
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)) if arrays else None
    return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays))[None]


def failed(error: Exception) -> ShoalError:
    """What an error of the engine means for whoever asked."""
    text = str(error)
    if "allocate memory" in text or "bad_alloc" in text:
        return OverloadedError(f"the engine ran out of memory: {text}", hint="use fewer slots or a shorter context")
    if isinstance(error, (native.InvalidArgument, ValueError)):
        return InvalidRequestError(f"the inputs do not fit the model: {text}", param="tensors")
    return ShoalError(f"the engine failed: {text}")
