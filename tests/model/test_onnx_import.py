"""ONNX files of every kind become models that compute what the file computes, and damaged ones say where."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from shoal.errors import CorruptFileError, ShoalError, UnsupportedModelError
from shoal.model.frontier import blocks, shard
from shoal.model.onnx import import_onnx
from shoal.model.spec import ImportedModel, ModelKind

Sessions = Callable[[ImportedModel], ort.InferenceSession]
Graphs = Callable[..., onnx.ModelProto]
W = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 4096
X = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)


def value(name: str, shape: list[int | str] | None, element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def product(weight: TensorProto | None = None, **graph: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """y = relu(x @ w), nodes without names."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Relu", ["xw"], ["y"])]
    inputs, outputs = graph.get("inputs", [value("x", ["n", 64])]), graph.get("outputs", [value("y", ["n", 64])])
    made = helper.make_graph(nodes, "g", inputs, outputs, [weight or numpy_helper.from_array(W, "w")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def external(
    location: str, *, name: str = "w", shape: tuple[int, ...] = (64, 64), element: int = TensorProto.FLOAT, **place: int
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, said in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(said))
    return tensor


def picture_of(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers without a pattern that an error could hide in."""
    flat = np.sin(np.arange(np.prod(shape), dtype=np.float32) ** 1.3)
    return flat.reshape(shape)


def assert_same_results(path: Path, session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    whole = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in whole.get_outputs()]
    for name, ours, theirs in zip(names, session.run(names, feeds), whole.run(names, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=name)


def test_weights_become_stubs_under_their_own_names(tmp_path: Path, open_session: Sessions) -> None:
    model = import_onnx(saved(product(), tmp_path), name="m")

    (stub,) = model.graph.graph.initializer
    assert stub.data_location == TensorProto.EXTERNAL
    assert {e.key: e.value for e in stub.external_data} == {"location": "w"}
    assert model.graph.ByteSize() < 1000
    np.testing.assert_array_equal(model.tensors["w"](), W)
    np.testing.assert_allclose(open_session(model).run(["y"], {"x": X})[0], np.maximum(X @ W, 0), rtol=1e-4, atol=1e-5)


def test_a_plain_model_is_of_kind_tensor(tmp_path: Path) -> None:
    spec = import_onnx(saved(product(), tmp_path), name="m").spec

    assert (spec.name, spec.kind, spec.parameters, spec.quantisation) == ("m", ModelKind.TENSOR, 4096, "fp32")


@pytest.mark.parametrize("end", ["inputs", "outputs"])
def test_ends_of_unsaid_shape_are_taken_as_engines_take_them(end: str, tmp_path: Path, open_session: Sessions) -> None:
    path = saved(product(**{end: [value("x" if end == "inputs" else "y", None)]}), tmp_path)

    model = import_onnx(path, name="m")

    assert_same_results(path, open_session(model), {"x": X})
    chain = blocks(model.graph)
    part = dataclasses.replace(model, graph=shard(model.graph, chain, 0, len(chain)))
    assert_same_results(path, open_session(part), {"x": X})


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_ocr_recognisers_compute_what_their_files_compute(size: str, ocr_folder: Path, open_session: Sessions) -> None:
    path = ocr_folder / size / "rec" / "rec.onnx"
    picture = picture_of((1, 3, 48, 96))

    assert_same_results(path, open_session(import_onnx(path, name="rec")), {"x": picture})


def test_an_ocr_detector_computes_what_its_file_computes(ocr_folder: Path, open_session: Sessions) -> None:
    path = ocr_folder / "tiny" / "det" / "det.onnx"
    picture = picture_of((1, 3, 64, 96))

    assert_same_results(path, open_session(import_onnx(path, name="det")), {"x": picture})


def test_an_encoder_with_int8_weights_is_known_and_computes_the_same(minilm_int8: Path, open_session: Sessions) -> None:
    model = import_onnx(minilm_int8, name="minilm")

    spec = model.spec
    assert (spec.kind, spec.hidden, spec.pooling, spec.quantisation) == (ModelKind.ENCODER, 384, "mean", "int8")
    ids = np.array([[101, 2023, 2003, 102, 0], [101, 7592, 102, 0, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    assert_same_results(minilm_int8, open_session(model), feeds)


def test_a_decoder_is_known_by_its_ends_and_completed_from_its_folder(decoder_graph: Graphs, tmp_path: Path) -> None:
    path = saved(decoder_graph(), tmp_path)
    said = {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "hidden_size": 64,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "tokenizer.json").write_text("{}")

    model = import_onnx(path, name="m")

    spec = model.spec
    assert (spec.kind, spec.architecture, spec.context_tokens, spec.hidden) == (ModelKind.CAUSAL_LM, "llama", 512, 64)
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.vocabulary) == (2, 3, 8, 64)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert model.files.keys() == {"config.json", "tokenizer.json"}


def test_a_decoder_whose_caches_do_not_pair_is_a_plain_model(decoder_graph: Graphs, tmp_path: Path) -> None:
    assert import_onnx(saved(decoder_graph(present="present.1{}.{}"), tmp_path), name="m").spec.kind is ModelKind.TENSOR


def test_data_beside_the_file_is_mapped_from_its_place(tmp_path: Path, open_session: Sessions) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x07" * 64 + W.tobytes())
    path = saved(product(external("weights.bin", offset=64, length=W.nbytes)), tmp_path)

    model = import_onnx(path, name="m")

    assert isinstance(model.tensors["w"](), np.memmap)
    np.testing.assert_array_equal(model.tensors["w"](), W)
    assert_same_results(path, open_session(model), {"x": X})


def test_four_bit_data_beside_the_file_are_read(tmp_path: Path) -> None:
    packed = np.arange(64 * 64 // 2, dtype=np.int64).astype(np.uint8)
    (tmp_path / "w.bin").write_bytes(packed.tobytes())
    weight = external("w.bin", name="q", element=TensorProto.UINT4)
    nodes = [helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 64])], [value("y", ["n", 64])], [weight, scale])
    path = saved(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path)

    model = import_onnx(path, name="m")

    expected = np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 64)
    np.testing.assert_array_equal(model.tensors["q"]().astype(np.uint8), expected)
    assert model.spec.quantisation == "int4"


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin", ""])
def test_data_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    path = saved(product(external(location)), folder)

    with pytest.raises(CorruptFileError, match="outside the model's folder"):
        import_onnx(path, name="m")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    (folder / "w.bin").symlink_to(tmp_path / "secret.bin")

    with pytest.raises(CorruptFileError, match="outside the model's folder"):
        import_onnx(saved(product(external("w.bin")), folder), name="m")


def test_links_of_a_hub_cache_lead_where_the_model_lies(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1f").write_bytes(product(external("w.bin")).SerializeToString())
    (blobs / "2e").write_bytes(W.tobytes())
    (snapshot / "model.onnx").symlink_to("../../blobs/1f")
    (snapshot / "w.bin").symlink_to("../../blobs/2e")

    np.testing.assert_array_equal(import_onnx(snapshot / "model.onnx", name="m").tensors["w"](), W)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({}, r"tensor w ends at byte 16,384 of w\.bin, which has 100"),
        ({"offset": 50, "length": 16384}, r"ends at byte 16,434 of w\.bin"),
        ({"length": 16}, r"tensor w \[64, 64\] should have 16,384 bytes and has 16"),
        ({"offset": -5}, "ends at byte"),
    ],
)
def test_external_data_that_do_not_fit_are_named_in_numbers(place: dict[str, int], said: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\x00" * 100)
    path = saved(product(external("w.bin", **place)), tmp_path)

    with pytest.raises(CorruptFileError, match=said):
        import_onnx(path, name="m")


def test_missing_external_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"w\.bin, which is missing"):
        import_onnx(saved(product(external("w.bin")), tmp_path), name="m")


def test_weights_listed_as_inputs_are_weights(tmp_path: Path, open_session: Sessions) -> None:
    old = product(inputs=[value("x", ["n", 64]), value("w", [64, 64])])
    old.ir_version = 3
    path = saved(old, tmp_path)

    model = import_onnx(path, name="m")

    assert [v.name for v in model.graph.graph.input] == ["x"]
    assert model.graph.ir_version >= 4, "before IR 4 every initializer must be an input too"
    assert_same_results(path, open_session(model), {"x": X})


def test_an_output_listed_twice_is_one_output(tmp_path: Path) -> None:
    twice = product(outputs=[value("y", ["n", 64]), value("y", ["n", 64])])

    assert [v.name for v in import_onnx(saved(twice, tmp_path), name="m").graph.graph.output] == ["y"]


def test_an_input_listed_twice_is_corrupt(tmp_path: Path) -> None:
    twice = product(inputs=[value("x", ["n", 64]), value("x", ["n", 64])])

    with pytest.raises(CorruptFileError, match="'x'"):
        import_onnx(saved(twice, tmp_path), name="m")


def test_nodes_get_names_of_their_own(tmp_path: Path) -> None:
    model = product()
    model.graph.node.extend(helper.make_node("Relu", ["y"], [f"z{i}"], name="MatMul_0") for i in range(3))

    names = [node.name for node in import_onnx(saved(model, tmp_path), name="m").graph.graph.node]

    assert all(names)
    assert len(set(names)) == len(names) == 5


def test_big_constants_are_weights_and_small_ones_stay(tmp_path: Path, open_session: Sessions) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W)),
        helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(np.ones(64, np.float32))),
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 64])], [value("y", ["n", 64])])
    path = saved(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path)

    model = import_onnx(path, name="m")

    assert model.tensors.keys() == {"w"}
    assert [node.op_type for node in model.graph.graph.node] == ["Constant", "MatMul", "Add"]
    assert_same_results(path, open_session(model), {"x": X})


def test_weights_inside_branches_stay_inside(tmp_path: Path, open_session: Sessions) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    branches = {}
    for branch, weight in (
        ("then_branch", external("w.bin", name="wt")),
        ("else_branch", numpy_helper.from_array(-W, "we")),
    ):
        node = helper.make_node("MatMul", ["x", weight.name], [f"out_{branch}"])
        branches[branch] = helper.make_graph([node], branch, [], [value(f"out_{branch}", ["n", 64])], [weight])
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], **branches)],
        "g",
        [value("x", ["n", 64]), value("flag", [], TensorProto.BOOL)],
        [value("y", ["n", 64])],
    )
    path = saved(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path)

    model = import_onnx(path, name="m")

    session = open_session(model)
    assert not model.tensors
    for flag, expected in ((True, X @ W), (False, X @ -W)):
        got = session.run(["y"], {"x": X, "flag": np.array(flag)})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_functions_of_the_model_are_inlined(tmp_path: Path, open_session: Sessions) -> None:
    model = product()
    body = [helper.make_node("MatMul", ["a", "b"], ["ab"]), helper.make_node("Relu", ["ab"], ["c"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "Both", ["a", "b"], ["c"], body, opsets))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Both", ["x", "w"], ["y"], domain="mine"))
    path = saved(model, tmp_path)

    flat = import_onnx(path, name="m")

    assert [node.op_type for node in flat.graph.graph.node] == ["MatMul", "Relu"]
    assert_same_results(path, open_session(flat), {"x": X})


def test_typed_fields_are_weights_too(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], W.ravel())

    np.testing.assert_array_equal(import_onnx(saved(product(weight), tmp_path), name="m").tensors["w"](), W)


@pytest.mark.parametrize("raw", [True, False])
def test_a_tensor_with_too_few_numbers_is_named(raw: bool, tmp_path: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64])
    if raw:
        weight.raw_data = W.tobytes()[:-4]
    else:
        weight.float_data.extend(W.ravel()[:-1])

    with pytest.raises(CorruptFileError, match=r"tensor w \[64, 64\]"):
        import_onnx(saved(product(weight), tmp_path), name="m")


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    model = product()
    model.graph.node[1].op_type = "Relux"

    with pytest.raises(UnsupportedModelError, match="Relux"):
        import_onnx(saved(model, tmp_path), name="m")


def test_a_node_that_reads_what_nothing_gives_is_corrupt(tmp_path: Path) -> None:
    model = product()
    model.graph.node[1].input[0] = "nowhere"

    with pytest.raises(CorruptFileError, match="nowhere"):
        import_onnx(saved(model, tmp_path), name="m")


@given(cut=st.integers(0, 16_500))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_never_becomes_a_model(cut: int, tmp_path: Path) -> None:
    whole = product().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: min(cut, len(whole) - 10)])

    with pytest.raises((CorruptFileError, UnsupportedModelError), match=r"cut\.onnx"):
        import_onnx(path, name="m")


@given(at=st.integers(0, 400), byte=st.integers(0, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_is_an_error_of_ours_or_harmless(at: int, byte: int, tmp_path: Path) -> None:
    data = bytearray(product(external("w.bin")).SerializeToString())
    data[at % len(data)] = byte
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    path = tmp_path / "flipped.onnx"
    path.write_bytes(bytes(data))

    try:
        model = import_onnx(path, name="m")
    except ShoalError:
        return
    for read in model.tensors.values():
        read()
