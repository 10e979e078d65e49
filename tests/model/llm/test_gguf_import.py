"""GGUF files become models, or an error that says what is wrong with them."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.gguf import import_gguf
from shoal.model.gguf_config import END_TEXTS, special_tokens
from shoal.model.gguf_file import parse_gguf
from shoal.model.spec import ImportedModel

Write = Callable[..., Path]
Tiny = Callable[..., ImportedModel]


def test_the_spec_says_what_the_file_says(tiny: Tiny) -> None:
    spec = tiny("llama", Type.Q4_1, types={"token_embd.weight": Type.Q8_0}).spec

    assert (spec.name, spec.architecture, spec.licence, spec.quantisation) == ("tiny", "llama", "apache-2.0", "Q4_1")
    assert (spec.layers, spec.hidden, spec.kv_heads, spec.head_dim) == (2, 256, 2, 64)
    assert (spec.context_tokens, spec.vocabulary) == (128, 96)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.add_bos) == (1, (2,), False)
    assert spec.parameters == 96 * 256 + 2 * (256 * 256 * 5 + 2 * 128 * 256 + 2 * 256) + 256
    assert spec.import_error is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_stub_of_the_graph_has_its_array(architecture: str, tiny: Tiny) -> None:
    model = tiny(architecture, Type.Q5_K, types={"blk.1.attn_v.weight": Type.Q6_K, "blk.0.ffn_up.weight": Type.BF16})

    stubs = {t.name: tuple(t.dims) for t in model.graph.graph.initializer if t.external_data}

    assert stubs == {name: array().shape for name, array in model.tensors.items()}
    assert all(t.external_data[0].value == t.name for t in model.graph.graph.initializer if t.external_data)


def test_the_weights_stay_as_small_as_the_file(smollm2_gguf: Path) -> None:
    model = import_gguf(smollm2_gguf, name="smollm2")

    assert sum(array().nbytes for array in model.tensors.values()) < smollm2_gguf.stat().st_size


def test_frequencies_are_divided_by_the_factors_of_the_file(tiny: Tiny) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)

    plain = tiny("llama").tensors["rope.inv_freq"]()
    scaled = tiny("llama", extra={"rope_freqs.weight": factors}).tensors["rope.inv_freq"]()

    np.testing.assert_allclose(scaled, plain / factors, rtol=1e-6)


def test_linear_and_yarn_scaling_are_read_from_the_metadata(tiny: Tiny) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    yarn = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    plain = tiny("llama").tensors["rope.inv_freq"]()

    np.testing.assert_allclose(tiny("llama", metadata=linear).tensors["rope.inv_freq"](), plain / 4, rtol=1e-6)
    by_parts = tiny("qwen2", metadata=yarn).tensors["rope.inv_freq"]()
    assert by_parts[-1] == pytest.approx(plain[-1] / 4)
    assert (by_parts <= plain).all()
    assert (by_parts >= plain / 4).all()


def test_gemma_has_local_layers_with_their_own_rotation(tiny: Tiny) -> None:
    model = tiny("gemma3", metadata={"gemma3.rope.freq_base": 1e6})

    windows = [a.i for node in model.graph.graph.node for a in node.attribute if a.name == "window"]

    assert windows == [8, 2**31 - 1]
    assert model.tensors["rope_local.inv_freq"]()[-1] > model.tensors["rope.inv_freq"]()[-1]


def test_gemma_scales_its_embedding(tiny: Tiny) -> None:
    constants = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in tiny("gemma3").graph.graph.initializer
        if t.raw_data or t.float_data
    }

    assert constants["embedding_scale"] == 16.0


def test_a_list_longer_than_any_vocabulary_is_not_read(write_gguf: Write) -> None:
    data = bytearray(write_gguf().read_bytes())
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    assert struct.unpack_from("<Q", data, at)[0] == 96
    struct.pack_into("<Q", data, at, 2**25)

    with pytest.raises(CorruptFileError, match="33554432 items"):
        parse_gguf(np.frombuffer(bytes(data), np.uint8))


def test_an_end_of_turn_ends_an_answer_too() -> None:
    keys = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 106, "tokenizer.ggml.model": "llama"}

    special = special_tokens(keys)

    assert (special.eos, special.add_bos, special.bos) == ((1, 106), True, None)


@pytest.mark.parametrize("text", [text for texts in END_TEXTS.values() for text in texts])
def test_a_turn_ends_with_its_text_where_the_file_does_not_say_the_id(text: str) -> None:
    keys = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.tokens": ["<s>", "</s>", text, "word"]}

    assert special_tokens(keys).eos == (1, 2)
    assert special_tokens(keys | {"tokenizer.ggml.token_type": [3, 3, 3, 1]}).eos == (1, 2)


def test_only_a_control_token_ends_a_turn_by_its_text() -> None:
    keys = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.tokens": ["</s>", "<|im_end|>", "<|end|>"]}

    assert special_tokens(keys | {"tokenizer.ggml.token_type": [3, 1, 3]}).eos == (0, 2)


def test_a_file_that_says_its_end_of_turn_is_not_searched_for_another() -> None:
    tokens = ["</s>", "<|im_end|>", "<|endoftext|>", "<|eom_id|>"]
    keys = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.tokens": tokens}

    assert special_tokens(keys).eos == (0, 1, 3)
    assert special_tokens(keys | {"tokenizer.ggml.eom_token_id": 2}).eos == (0, 1, 2)


def test_the_tokenizer_comes_along(tiny: Tiny) -> None:
    assert {"tokenizer.json", "tokenizer_config.json"} == set(tiny("llama").files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mamba"}, "mamba"),
        (
            {
                "types": {"blk.0.attn_q.weight": Type.Q8_0},
                "extra": {"blk.0.ffn_gate_inp.weight": np.zeros((4, 256), np.float32)},
            },
            "ffn_gate_inp",
        ),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"metadata": {"llama.expert_count": 8}}, "experts"),
    ],
)
def test_what_we_do_not_know_is_refused_by_name(change: dict, message: str, write_gguf: Write) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        import_gguf(write_gguf(**change), name="x")


def test_an_unknown_tensor_type_is_refused_by_number(write_gguf: Write) -> None:
    data = bytearray(write_gguf("llama", Type.Q8_0).read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at)[0] == Type.Q8_0
    struct.pack_into("<I", data, at, 99)

    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.weight has the unknown type 99"):
        parse_gguf(np.frombuffer(bytes(data), np.uint8))


def test_other_versions_are_refused(write_gguf: Write) -> None:
    data = bytearray(write_gguf().read_bytes())
    struct.pack_into("<I", data, 4, 0x03000000)

    with pytest.raises(UnsupportedModelError, match="0x3000000"):
        parse_gguf(np.frombuffer(bytes(data), np.uint8))


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.freq_base": 0.5},
        {"llama.rope.freq_base": float("nan")},
        {"llama.rope.dimension_count": 65},
        {"llama.attention.key_length": 32},
        {"llama.rope.scaling.factor": -1.0},
        {"llama.rope.scaling.factor": "four"},
    ],
)
def test_impossible_metadata_are_a_damaged_file(metadata: dict, write_gguf: Write) -> None:
    with pytest.raises(CorruptFileError):
        import_gguf(write_gguf(metadata=metadata), name="x")


def test_a_missing_layer_is_named(write_gguf: Write) -> None:
    data = write_gguf().read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight")

    with pytest.raises(CorruptFileError, match=r"blk\.1\.ffn_up\.weight"):
        import_bytes(data, write_gguf().parent)


def import_bytes(data: bytes, folder: Path) -> ImportedModel:
    path = folder / "spoiled.gguf"
    path.write_bytes(data)
    return import_gguf(path, name="spoiled")


def test_a_text_file_and_an_empty_one_are_not_models(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"hello, I am no model"):
        with pytest.raises(CorruptFileError):
            import_bytes(content, tmp_path)


FUZZ = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


def header_bytes(data: bytes) -> int:
    """Where the tensors begin."""
    return len(data) - sum(len(t.raw) for t in parse_gguf(np.frombuffer(data, np.uint8)).tensors.values())


@pytest.fixture
def whole(write_gguf: Write) -> bytes:
    return write_gguf("gemma3", Type.Q4_0).read_bytes()


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_a_damaged_file(share: float, whole: bytes, tmp_path: Path) -> None:
    # the last tensor is padded, so that cutting the padding alone harms nothing: cut at least that
    kept = int(share * (len(whole) - gguf.GGUF_DEFAULT_ALIGNMENT))

    with pytest.raises(CorruptFileError):
        import_bytes(whole[:kept], tmp_path)


@FUZZ
@given(data=st.data())
def test_flipped_header_bytes_give_a_model_or_an_error_of_ours(
    data: st.DataObject, whole: bytes, tmp_path: Path
) -> None:
    spoiled = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, header_bytes(whole)), min_size=1, max_size=3)):
        spoiled[at] ^= data.draw(st.integers(1, 255))
    try:
        model = import_bytes(bytes(spoiled), tmp_path)
    except (CorruptFileError, UnsupportedModelError):
        return
    assert model.spec.layers > 0
