"""Running imported models in ONNX Runtime as they are: the canonical graph, not a lowering, is compared with the recordings."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from shoal.model.spec import ImportedModel

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
Feeds = Mapping[str, np.ndarray]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded references: `<case>/reference.npz` (see tools/golden/make.py)."""
    return GOLDEN


def _value(array: np.ndarray) -> ort.OrtValue:
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


@pytest.fixture(scope="session")
def open_session() -> Callable[[ImportedModel], ort.InferenceSession]:
    """An engine session over the graph as imported, one thread."""

    def make(model: ImportedModel) -> ort.InferenceSession:
        stubs = [i.name for i in model.graph.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        values = [_value(model.tensors[name]()) for name in stubs]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_external_initializers(stubs, values)
        return ort.InferenceSession(model.graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return make


@pytest.fixture(scope="session")
def causal_logits(open_session: Callable[[ImportedModel], ort.InferenceSession]) -> Callable[..., np.ndarray]:
    """Logits [N, V] of a causal model for *ids*: *prefill* of them at once, the rest one by one against the cache."""

    def run(model: ImportedModel, ids: np.ndarray, *, prefill: int) -> np.ndarray:
        session, spec = open_session(model), model.spec
        cache = np.zeros((1, spec.kv_heads, 0, spec.head_dim), np.float32)
        past = {f"past_key_values.{layer}.{part}": cache for layer in range(spec.layers) for part in ("key", "value")}
        names = [output.name for output in session.get_outputs()]
        rows, start = [], 0
        for stop in (prefill, *range(prefill + 1, len(ids) + 1)):
            positions = np.arange(start, stop, dtype=np.int64)[None]
            step = {
                "input_ids": ids[None, start:stop],
                "position_ids": positions,
                "logit_rows": np.arange(stop - start),
            }
            out = dict(zip(names, session.run(names, {**step, **past}), strict=True))
            past = {name.replace("present.", "past_key_values."): out[name] for name in names if name != "logits"}
            rows.append(out["logits"][0])
            start = stop
        return np.concatenate(rows)

    return run
