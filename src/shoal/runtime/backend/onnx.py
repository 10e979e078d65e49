"""ONNX Runtime as an engine: the only module that knows it.

Weights.  Pieces of models that we cut (`Roles.exact_cuts`) get theirs as they lie: initializers in mapped files are neither
copied nor kept in private memory, only what the engine packs is.  Once it has, their pages are dropped (`mapped`): the mappings
stay for what it reads as it lies, such as a table of embeddings, whose pages come back as they are used.  The engine's constant
folding would want to read them from the files that the graph names, so it is switched off there; it also insists on a file behind
every stub of a graph that was loaded from bytes, although it never reads it: an empty one stands in while the session is built.
Everything else goes in by `add_external_initializers`, which folding understands: the engine copies what it does not pack, and
ours can go.

Cache.  Each slot has its own mapping (`pages`), bound once as past and as present of every layer when the graph updates its
cache in place (GroupQueryAttention).  What is small is bound, too, and stays so while steps have the same number of rows: after a
step that has read a hundred megabytes, Python's own memory is out of the processor's cache, and binding anew costs 0.3 ms.
Other graphs return a longer cache at each step,
which becomes the next step's past: that copies, and is the price of running the canonical graph or a foreign one as it is.

Steps with several sequences are run one sequence after another (batch 1): results do not depend on who else is being served.

Optimiser.  Graphs of ours and graphs with a cache run at the basic level: nothing is fused across a frontier (ADR 1) and a
shard computes what the whole model computes there.  Plain models get everything the engine has.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from shoal.errors import InvalidRequestError, OverloadedError, ShoalError, UnsupportedModelError
from shoal.model.spec import LOGIT_ROWS, LOGITS
from shoal.runtime.backend.mapped import drop_pages, is_mapped
from shoal.runtime.backend.pages import SlotPages
from shoal.runtime.backend.roles import CacheTensor, Output, Roles, derived_inputs, derived_value, output_rows, roles_of
from shoal.runtime.ports import SequenceStep, Shard
from shoal.runtime.request import Array

CPU = "CPUExecutionProvider"
REMOTE = frozenset({"AzureExecutionProvider"})
"""Listed by the engine, but not on this machine."""
STUB_FILE = "weights"
SPIN_US = 20
"""How long the engine's threads look for work before they sleep.

A decode step is some 800 small operators: waking a thread for each costs a quarter of the speed on two cores (98 against 130
tokens per second of SmolLM2), looking without end a third where three workers share them (32 against 48).  20 us cost neither.
"""

_ENGINE_ERRORS = (
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


def providers() -> tuple[str, ...]:
    """Execution providers that work on this machine, best first."""
    return tuple(p for p in ort.get_available_providers() if p not in REMOTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxBackend:
    """*preferred* providers are used where they are there, with the CPU behind them."""

    preferred: tuple[str, ...] = (CPU,)

    def load(self, shard: Shard) -> "OnnxSession":
        """See `Backend.load`.  Drop the shard afterwards: what the session still needs it holds itself."""
        roles = roles_of(shard.graph)
        if roles.caches and not (shard.slots and shard.context_tokens):
            raise UnsupportedModelError(f"a shard with {len(roles.caches)} caches needs slots and a context")
        chosen = [p for p in self.preferred if p in providers() and p != CPU] + [CPU]
        weights = _Weights(keep_mapped=roles.exact_cuts)
        options = _options(roles, threads=shard.threads)
        try:
            with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
                (Path(folder) / STUB_FILE).touch()
                model = weights.attach(options, shard)
                unwanted = ["ConstantFolding"] if roles.exact_cuts else []
                session = ort.InferenceSession(model, options, providers=chosen, disabled_optimizers=unwanted)
        except _ENGINE_ERRORS as error:
            raise _unsupported(error) from error
        drop_pages(shard.tensors.values())
        return OnnxSession(session, roles, shard.slots, shard.context_tokens, weights.mapped)


@dataclass(slots=True)
class _Weights:
    """`mapped` must outlive the session; `private` is only needed while it is built."""

    keep_mapped: bool
    mapped: list[ort.OrtValue] = field(default_factory=list)
    private: dict[str, ort.OrtValue] = field(default_factory=dict)

    def attach(self, options: ort.SessionOptions, shard: Shard) -> bytes:
        """Give the shard's tensors to *options*; the graph with stubs that the engine accepts."""
        model = onnx.ModelProto()
        model.CopyFrom(shard.graph)
        for stub in model.graph.initializer:
            if stub.name not in shard.tensors:
                continue
            array = shard.tensors[stub.name]
            if array.size != int(np.prod(stub.dims)):
                _inline(stub, array)
                continue
            value = _value(array.reshape(tuple(stub.dims)), stub.data_type)
            del stub.external_data[:]
            stub.external_data.add(key="location", value=STUB_FILE)
            if self.keep_mapped and is_mapped(array):
                options.add_initializer(stub.name, value)
                self.mapped.append(value)
            else:
                self.private[stub.name] = value
        options.add_external_initializers(list(self.private), list(self.private.values()))
        payload: bytes = model.SerializeToString()
        return payload


@dataclass(frozen=True, slots=True)
class _Bound:
    """Arrays that a slot's binding reads and writes, for steps of `rows` (count, logits)."""

    rows: tuple[int, int]
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def fits(self, step: SequenceStep, given: Mapping[str, Array]) -> bool:
        """Whether *step* has these shapes; tensors of others must come before the engine, which refuses them."""
        return self.rows == (step.count, step.logits) and all(a.shape == self.inputs[n].shape for n, a in given.items())


@dataclass(slots=True)
class _Slot:
    """Cache of one sequence: *length* positions; pages and their binding, or the values that the last step returned."""

    length: int = 0
    pages: SlotPages | None = None
    binding: "ort.IOBinding | None" = None
    bound: "_Bound | None" = None
    grown: dict[str, Array] = field(default_factory=dict)


class OnnxSession:
    """A loaded shard; see the module's docstring for what it holds."""

    def __init__(
        self,
        session: ort.InferenceSession,
        roles: Roles,
        slots: int,
        context_tokens: int,
        weights: list[ort.OrtValue],
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self._roles = roles
        self._settled = roles.settled
        # Which rows get logits follows from how many there are: written when they are bound.
        self._moving = tuple(name for name in roles.derived if name != LOGIT_ROWS)
        self._context_tokens = context_tokens
        self._weights = weights
        self._cacheless = _Slot()
        self._slots: dict[int, _Slot] = {slot: _Slot() for slot in range(slots)}

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.step`."""
        engine = self._engine
        self._check_given(tensors)
        if not sequences:
            return self._run_plain(engine, tensors)
        parts: list[dict[str, Array]] = []
        row = 0
        for step in sequences:
            given = {name: tensors[name][:, row : row + step.count] for name in self._roles.given}
            row += step.count
            parts.append(self._run(step, given))
        return {output.name: joined for output in self._roles.outputs if (joined := _join(output, parts)) is not None}

    def release(self, slot: int) -> None:
        """See `Session.release`."""
        held = self._slots.get(slot)
        if held is None:
            return
        held.length = 0
        held.grown = {}
        if held.pages is not None and not held.pages.give_back():
            held.pages, held.binding, held.bound = None, None, None

    def close(self) -> None:
        """See `Session.close`."""
        self._slots.clear()
        self._cacheless = _Slot()
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

    def _run_plain(self, engine: ort.InferenceSession, tensors: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self._roles.outputs]
        feeds = {name: np.asarray(tensors[name], self._roles.dtypes[name]) for name in self._roles.given}
        try:
            return dict(zip(names, engine.run(names, feeds), strict=True))
        except _ENGINE_ERRORS as error:
            raise _failed(error) from error

    def _run(self, step: SequenceStep, given: Mapping[str, Array]) -> dict[str, Array]:
        slot = self._slot(step)
        binding = slot.binding or self._engine.io_binding()
        if self._settled:
            slot.binding = binding
            return self._run_bound(step, given, slot, binding)
        for name, array in {**given, **derived_inputs(self._roles, step)}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array, self._roles.dtypes[name]))
        outputs = {output.name: self._bind_output(binding, output, step) for output in self._roles.outputs}
        if not self._roles.shared:
            self._bind_grown(binding, slot, step.start)
        self._call(binding)
        slot.length = step.start + step.count
        return self._collect(binding, outputs, slot, step)

    def _run_bound(
        self, step: SequenceStep, given: Mapping[str, Array], slot: _Slot, binding: "ort.IOBinding"
    ) -> dict[str, Array]:
        bound = slot.bound
        if bound is None or not bound.fits(step, given):
            bound = slot.bound = self._bind_rows(binding, step, given)
        for name, array in given.items():
            bound.inputs[name][...] = array
        for name in self._moving:
            bound.inputs[name][...] = derived_value(name, step)
        self._call(binding)
        slot.length = step.start + step.count
        return {name: _wanted(name, array, step).copy() for name, array in bound.outputs.items()}

    def _bind_rows(self, binding: "ort.IOBinding", step: SequenceStep, given: Mapping[str, Array]) -> _Bound:
        """Bind arrays of this step's shapes for everything but the cache."""
        first = {**given, **derived_inputs(self._roles, step)}
        inputs: dict[str, Array] = {name: np.array(array, self._roles.dtypes[name]) for name, array in first.items()}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        outputs = {o.name: self._bind_output(binding, o, step) for o in self._roles.outputs}
        known = {name: array for name, array in outputs.items() if array is not None}
        return _Bound((step.count, step.logits), inputs, known)

    def _call(self, binding: "ort.IOBinding") -> None:
        try:
            self._engine.run_with_iobinding(binding)
        except _ENGINE_ERRORS as error:
            raise _failed(error) from error

    def _slot(self, step: SequenceStep) -> _Slot:
        if not self._roles.caches:
            return self._cacheless
        slot = self._slots.get(step.slot)
        stop = step.start + step.count
        if slot is None or stop > self._context_tokens or step.start > slot.length:
            held = slot.length if slot else 0
            raise InvalidRequestError(
                f"positions {step.start} to {stop} do not fit slot {step.slot} of {len(self._slots)}, which holds {held} of "
                f"{self._context_tokens} positions"
            )
        if self._roles.shared and slot.binding is None:
            slot.pages, slot.binding = self._bind_pages()
        return slot

    def _bind_pages(self) -> tuple[SlotPages, "ort.IOBinding"]:
        pages = SlotPages(self._roles.caches, self._context_tokens)
        binding = self._engine.io_binding()
        for cache in self._roles.caches:
            value = ort.OrtValue.ortvalue_from_numpy(pages.arrays[cache.past])
            binding.bind_ortvalue_input(cache.past, value)
            binding.bind_ortvalue_output(cache.present, value)
        return pages, binding

    def _bind_output(self, binding: "ort.IOBinding", output: Output, step: SequenceStep) -> Array | None:
        """The array that the engine will write, or None where only it knows the shape."""
        if output.tail is None:
            binding.bind_output(output.name)
            return None
        array = np.empty((1, output_rows(self._roles, output, step), *output.tail), output.dtype)
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _bind_grown(self, binding: "ort.IOBinding", slot: _Slot, start: int) -> None:
        for cache in self._roles.caches:
            past = slot.grown.get(cache.past, _empty(cache))[:, :, :start]
            binding.bind_cpu_input(cache.past, np.ascontiguousarray(past))
            binding.bind_output(cache.present)

    def _collect(
        self, binding: "ort.IOBinding", outputs: Mapping[str, Array | None], slot: _Slot, step: SequenceStep
    ) -> dict[str, Array]:
        unknown = [name for name, array in outputs.items() if array is None]
        if self._roles.shared and not unknown:
            found: dict[str, Array] = {}
        else:
            names = [o.name for o in self._engine.get_outputs()]
            found = {n: v.numpy() for n, v in zip(names, binding.get_outputs(), strict=True)} if names else {}
        for cache in () if self._roles.shared else self._roles.caches:
            slot.grown[cache.past] = found[cache.present]
        done = {name: found[name] if array is None else array for name, array in outputs.items()}
        return {name: _wanted(name, array, step) for name, array in done.items()}


def _options(roles: Roles, *, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(1, threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if roles.exact_cuts else levels.ORT_ENABLE_ALL
    # Memory patterns are remembered per input shape: with lengths that grow each step they would pile up.
    options.enable_mem_pattern = not roles.exact_cuts
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    return options


def _wanted(name: str, array: Array, step: SequenceStep) -> Array:
    """Of logits only the rows that the step asks for, without the batch axis."""
    return array[0, array.shape[1] - step.logits :] if name == LOGITS else array


def _value(array: Array, element_type: int) -> ort.OrtValue:
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), element_type)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _inline(stub: onnx.TensorProto, packed: Array) -> None:
    """Types below one byte come packed and flat, which no value of the engine takes: they go into the graph."""
    del stub.external_data[:]
    stub.data_location = onnx.TensorProto.DEFAULT
    stub.raw_data = packed.tobytes()


def _empty(cache: CacheTensor) -> Array:
    return np.empty((1, cache.heads, 0, cache.head_dim), cache.dtype)


def _join(output: Output, parts: Sequence[Mapping[str, Array]]) -> Array | None:
    """Rows of all sequences: logits on axis 0 (None when nobody wants any), the others on axis 1."""
    arrays = [part[output.name] for part in parts]
    if output.name == LOGITS:
        arrays = [a for a in arrays if a.shape[0]]
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)) if arrays else None
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


def _unsupported(error: Exception) -> ShoalError:
    text = str(error)
    if "allocate memory" in text:
        return OverloadedError(f"the engine found too little memory to load this shard: {text}")
    named = re.search(r"implementation for (\S+)|:([\w.]+\(-?\d+\)) is not a registered|Op \(([\w.]+)\)", text)
    operator = next((g for g in named.groups() if g), "") if named else ""
    what = f"operator {operator}" if operator else "this graph"
    return UnsupportedModelError(f"ONNX Runtime {ort.__version__} cannot run {what}: {text}")


def _failed(error: Exception) -> ShoalError:
    text = str(error)
    if "allocate memory" in text or "bad_alloc" in text:
        return OverloadedError(f"the engine ran out of memory: {text}", hint="use fewer slots or a shorter context")
    if isinstance(error, (native.InvalidArgument, ValueError)):
        return InvalidRequestError(f"the inputs do not fit the model: {text}", param="tensors")
    return ShoalError(f"the engine failed: {text}")
