"""One door for every kind of model: content decides who reads it, and what nobody reads is refused by what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from shoal.errors import CorruptFileError, InvalidRequestError, UnknownModelError, UnsupportedModelError
from shoal.model.load import import_model
from shoal.model.spec import ModelKind
from shoal.node.importing import import_files

Folders = Callable[..., Path]
RELU = helper.make_model(
    helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
    ),
    opset_imports=[helper.make_opsetid("", 17)],
    ir_version=8,
)
GENAI = {
    "model": {
        "type": "llama",
        "context_length": 4096,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "decoder": {
            "filename": "model.onnx",
            "head_size": 8,
            "hidden_size": 24,
            "session_options": {"provider_options": []},
        },
    },
    "search": {"top_k": 1},
}


@pytest.fixture
def genai_folder(decoder_graph: Callable[[], onnx.ModelProto], tmp_path: Path) -> Callable[..., Path]:
    """A folder as onnxruntime-genai's builder writes it; arguments change what it says of the decoder."""

    def make(**decoder: object) -> Path:
        said = json.loads(json.dumps(GENAI))
        said["model"]["decoder"] |= decoder
        (tmp_path / "genai_config.json").write_text(json.dumps(said))
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "model.onnx").write_bytes(decoder_graph().SerializeToString())
        return tmp_path

    return make


def test_a_genai_folder_is_taken_as_lowered(genai_folder: Folders) -> None:
    model = import_model(genai_folder(), name="m")

    spec = model.spec
    assert (spec.kind, spec.architecture, spec.lowered_for) == (ModelKind.CAUSAL_LM, "llama", "cpu")
    assert (spec.context_tokens, spec.vocabulary, spec.hidden) == (4096, 64, 24)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.layers) == (1, (2, 3), 2)
    assert {"genai_config.json", "tokenizer.json"} <= model.files.keys()


def test_a_genai_folder_for_another_provider_says_so(genai_folder: Folders) -> None:
    options = {"provider_options": [{"cuda": {"enable_cuda_graph": "0"}}]}

    assert import_model(genai_folder(session_options=options), name="m").spec.lowered_for == "cuda"


@pytest.mark.parametrize(
    ("decoder", "error", "said"),
    [
        ({"inputs": {"past_key_names": "past_%d"}}, UnsupportedModelError, "past_key_names 'past_%d'"),
        ({"filename": "../model.onnx"}, CorruptFileError, r"\.\./model\.onnx"),
        ({"filename": "other.onnx"}, UnknownModelError, r"other\.onnx"),
        ({"head_size": "wide"}, CorruptFileError, r"genai_config\.json"),
    ],
)
def test_a_genai_folder_that_does_not_fit_says_why(
    decoder: dict[str, object], error: type[Exception], said: str, genai_folder: Folders
) -> None:
    with pytest.raises(error, match=said):
        import_model(genai_folder(**decoder), name="m")


def test_content_decides_which_importer_reads_a_path(
    tmp_path: Path, golden: Path, smollm2_gguf: Path, minilm_folder: Path
) -> None:
    disguised = tmp_path / "weights"
    disguised.symlink_to(smollm2_gguf)
    unnamed = tmp_path / "graph"
    unnamed.write_bytes(RELU.SerializeToString())

    kinds = {
        path: import_model(path, name="m").spec
        for path in (disguised, unnamed, golden / "qwen2", golden / "bert", minilm_folder)
    }

    assert [(spec.kind.value, spec.architecture) for spec in kinds.values()] == [
        ("causal_lm", "llama"),
        ("tensor", "onnx"),
        ("causal_lm", "qwen2"),
        ("encoder", "bert"),
        ("encoder", "bert"),
    ]


def test_a_folder_with_one_graph_is_that_graph_and_with_two_a_question(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(RELU.SerializeToString())
    assert import_model(tmp_path, name="m").spec.kind is ModelKind.TENSOR

    shutil.copy(tmp_path / "model.onnx", tmp_path / "other.onnx")
    with pytest.raises(UnsupportedModelError, match=r"several models: model\.onnx, other\.onnx"):
        import_model(tmp_path, name="m")


def test_a_stray_gguf_file_changes_nothing_in_a_folder_of_safetensors(golden: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "qwen2", tmp_path / "model"))
    plain = import_files(folder, "m", None)
    (folder / "vision.gguf").write_bytes(b"GGUF" + bytes(20))

    assert import_files(folder, "m", None).files == plain.files


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x89PNG\r\n", b"{}", b"<html>"])
def test_anything_else_is_refused_with_what_it_begins_with(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.write_bytes(head)

    with pytest.raises(UnsupportedModelError, match="begins with" if head else "is empty") as caught:
        import_model(path, name="m")
    assert "GGUF" in caught.value.hint


def test_nothing_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="nothing at"):
        import_model(tmp_path / "absent", name="m")
    with pytest.raises(UnsupportedModelError, match="holds no model"):
        import_model(tmp_path, name="m")


def test_safetensors_alone_point_to_their_folder(golden: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        import_model(golden / "llama" / "model.safetensors", name="m")
    assert str(golden / "llama") in caught.value.hint


def test_only_checkpoints_are_rounded(tmp_path: Path, golden: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(RELU.SerializeToString())

    with pytest.raises(InvalidRequestError, match="int8") as caught:
        import_model(path, name="m", quantise="int8")

    assert caught.value.param == "quantise"
    assert import_model(golden / "llama", name="m", quantise="int8").spec.quantisation == "int8"


def test_heads_that_no_engine_rotates_are_refused_before_they_are_stored(golden: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "llama", tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config | heads))

    with pytest.raises(UnsupportedModelError, match="head_dim 8"):
        import_model(folder, name="m")


def test_an_unknown_rounding_lists_the_known_ones(golden: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="int3") as caught:
        import_model(golden / "llama", name="m", quantise="int3")
    assert "int4" in caught.value.hint
