"""Running imported models directly in ONNX Runtime, as they are or lowered, to compare them with the recordings."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.model.affine import Array
from shoal.model.derive import derive
from shoal.model.lower import Lowered, lower
from shoal.model.spec import ImportedModel


@pytest.fixture(scope="session")
def engine_value() -> Callable[[np.ndarray], ort.OrtValue]:
    """An array as the engine takes it, bfloat16 included."""

    def make(array: np.ndarray) -> ort.OrtValue:
        if array.dtype.name == "bfloat16":
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    return make


@pytest.fixture(scope="session")
def open_session(
    engine_value: Callable[[np.ndarray], ort.OrtValue],
) -> Callable[[ImportedModel], ort.InferenceSession]:
    """An engine session over the graph as imported, one thread."""

    def make(model: ImportedModel) -> ort.InferenceSession:
        stubs = [i.name for i in model.graph.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        values = [engine_value(model.tensors[name]()) for name in stubs]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_external_initializers(stubs, values)
        return ort.InferenceSession(model.graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return make


@pytest.fixture(scope="session")
def with_derived() -> Callable[[ImportedModel, Lowered], ImportedModel]:
    """The lowered graph as a model of its own, the arrays that its lowering derives included."""

    def join(model: ImportedModel, lowered: Lowered) -> ImportedModel:
        def computed(op: str, inputs: tuple[str, ...]) -> Array:
            return derive(op, [model.tensors[name]() for name in inputs])

        derived = {d.name: partial(computed, d.op, d.inputs) for d in lowered.derived}
        return dataclasses.replace(model, graph=lowered.graph, tensors={**model.tensors, **derived})

    return join


@pytest.fixture(scope="session")
def lowered(
    with_derived: Callable[[ImportedModel, Lowered], ImportedModel],
) -> Callable[[ImportedModel, str], ImportedModel]:
    """The model with its graph lowered for a target, and the arrays that the lowering derives."""
    return lambda model, target: with_derived(model, lower(model.graph, target=target))


@pytest.fixture(scope="session")
def causal_logits(open_session: Callable[[ImportedModel], ort.InferenceSession]) -> Callable[..., np.ndarray]:
    """Logits [N, V] of a causal model for *ids*: *prefill* of them at once, the rest one by one against the cache."""

    def run(model: ImportedModel, ids: np.ndarray, *, prefill: int) -> np.ndarray:
        session, spec = open_session(model), model.spec
        cache = np.zeros((1, spec.kv_heads, 0, spec.head_dim), np.float32)
        past = {f"past_key_values.{layer}.{part}": cache for layer in range(spec.layers) for part in ("key", "value")}
        names = [output.name for output in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        rows, start = [], 0
        for stop in (prefill, *range(prefill + 1, len(ids) + 1)):
            step = {"input_ids": ids[None, start:stop], "logit_rows": np.arange(stop - start)}
            step |= {"position_ids": np.arange(start, stop)[None], "attention_mask": np.ones((1, stop), np.int64)}
            step |= {"seqlens_k": np.array([stop - 1], np.int32), "total_sequence_length": np.array(stop, np.int32)}
            feeds = {name: array for name, array in (step | past).items() if name in wanted}
            out = dict(zip(names, session.run(names, feeds), strict=True))
            past = {name.replace("present.", "past_key_values."): out[name] for name in names if name != "logits"}
            rows.append(out["logits"][0])
            start = stop
        return np.concatenate(rows)

    return run


@pytest.fixture(scope="session")
def decoder_graph() -> Callable[..., onnx.ModelProto]:
    """A graph with the ends of a decoder of two layers; nothing sensible inside."""

    def make(*, cache: str = "past_key_values.{}.{}", present: str = "present.{}.{}") -> onnx.ModelProto:
        value = helper.make_tensor_value_info
        parts = [(i, part) for i in range(2) for part in ("key", "value")]
        caches = [value(cache.format(*p), TensorProto.FLOAT, [1, 3, "P", 8]) for p in parts]
        presents = [value(present.format(*p), TensorProto.FLOAT, [1, 3, "P", 8]) for p in parts]
        inputs = [value("input_ids", TensorProto.INT64, [1, "T"]), *caches]
        outputs = [value("logits", TensorProto.FLOAT, [1, "T", 64]), *presents]
        nodes = [helper.make_node("Gather", ["w", "input_ids"], ["logits"])]
        nodes += [helper.make_node("Identity", [c.name], [p.name]) for c, p in zip(caches, presents, strict=True)]
        weights = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
        graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weights, "w")])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    return make
