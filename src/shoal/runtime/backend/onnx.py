"""ONNX Runtime as an engine: how a shard is loaded; `onnx_session` runs it, and nobody else knows ONNX Runtime.

Weights.  Pieces of models that we cut (`Roles.exact_cuts`) get theirs as they lie: initializers in mapped files are neither
copied nor kept in private memory, only what the engine packs is.  Once it has, their pages are dropped (`mapped`): the mappings
stay for what it reads as it lies, such as a table of embeddings, whose pages come back as they are used.  The engine's constant
folding would want to read them from the files that the graph names, so it is switched off there; it also insists on a file behind
every stub of a graph that was loaded from bytes, although it never reads it: an empty one stands in while the session is built.
Everything else goes in by `add_external_initializers`, which folding understands: the engine copies what it does not pack, and
ours can go.

Optimiser.  Graphs of ours and graphs with a cache run at the basic level: nothing is fused across a frontier (ADR 1) and a
shard computes what the whole model computes there.  Plain models get everything the engine has.
"""

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from shoal.errors import OverloadedError, ShoalError, UnsupportedModelError
from shoal.runtime.backend.lone import odd_widths
from shoal.runtime.backend.mapped import drop_pages, is_mapped
from shoal.runtime.backend.onnx_session import ENGINE_ERRORS, OnnxSession
from shoal.runtime.backend.roles import Roles, roles_of, with_batch
from shoal.runtime.ports import Shard
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
                payload, batches = weights.attach(options, shard, roles)
                unwanted = ["ConstantFolding"] if roles.exact_cuts else []
                session = ort.InferenceSession(payload, options, providers=chosen, disabled_optimizers=unwanted)
        except ENGINE_ERRORS as error:
            raise _unsupported(error) from error
        drop_pages(shard.tensors.values())
        odd = odd_widths(shard.graph, shard.slots) if batches and shard.slots > 1 else frozenset[int]()
        return OnnxSession(session, roles, shard.slots, shard.context_tokens, weights.mapped, batches=batches, odd=odd)


@dataclass(slots=True)
class _Weights:
    """`mapped` must outlive the session; `private` is only needed while it is built."""

    keep_mapped: bool
    mapped: list[ort.OrtValue] = field(default_factory=list)
    private: dict[str, ort.OrtValue] = field(default_factory=dict)

    def attach(self, options: ort.SessionOptions, shard: Shard, roles: Roles) -> tuple[bytes, bool]:
        """Give the shard's tensors to *options*; the graph with stubs that the engine accepts, and whether it takes batches."""
        model = onnx.ModelProto()
        model.CopyFrom(shard.graph)
        batches = with_batch(model, roles)
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
        return payload, batches


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


def _value(array: Array, element_type: int) -> ort.OrtValue:
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), element_type)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _inline(stub: onnx.TensorProto, packed: Array) -> None:
    """Types below one byte come packed and flat, which no value of the engine takes: they go into the graph."""
    del stub.external_data[:]
    stub.data_location = onnx.TensorProto.DEFAULT
    stub.raw_data = packed.tobytes()


def _unsupported(error: Exception) -> ShoalError:
    text = str(error)
    if "allocate memory" in text:
        return OverloadedError(f"the engine found too little memory to load this shard: {text}")
    named = re.search(r"implementation for (\S+)|:([\w.]+\(-?\d+\)) is not a registered|Op \(([\w.]+)\)", text)
    operator = next((g for g in named.groups() if g), "") if named else ""
    what = f"operator {operator}" if operator else "this graph"
    return UnsupportedModelError(f"ONNX Runtime {ort.__version__} cannot run {what}: {text}")
