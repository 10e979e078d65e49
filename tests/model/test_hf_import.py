"""Hugging Face folders become models that compute what Transformers computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from shoal.errors import CorruptFileError, UnknownModelError, UnsupportedModelError
from shoal.model.affine import Blocked, Dense
from shoal.model.hf import import_hf
from shoal.model.hf_config import config_of, scaling_of
from shoal.model.rope import Rope, attention_factor, inverse_frequencies
from shoal.model.spec import ImportedModel, ModelKind
from shoal.model.weights import choose_formats

CAUSAL = ("llama", "llama3-rope", "llama-linear-rope", "mistral", "qwen2", "qwen3", "gemma3")
Logits = Callable[..., np.ndarray]


def mean_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL(reference || logits) per row."""
    p, q = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (reference.astype(np.float64), logits.astype(np.float64))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a recorded folder that a test may spoil."""
    return lambda case: Path(shutil.copytree(golden / case, tmp_path / case))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    merged = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", CAUSAL)
def test_logits_are_those_of_transformers_at_every_position(case: str, golden: Path, causal_logits: Logits) -> None:
    reference = np.load(golden / case / "reference.npz")
    model = import_hf(golden / case, name=case)

    logits = causal_logits(model, reference["ids"], prefill=int(reference["prefill"]))

    np.testing.assert_allclose(logits, reference["logits"], atol=2e-4)


@pytest.mark.parametrize("case", CAUSAL)
def test_logits_lowered_for_a_cpu_are_those_of_transformers(
    case: str, golden: Path, causal_logits: Logits, lowered: Callable[..., ImportedModel]
) -> None:
    reference = np.load(golden / case / "reference.npz")
    model = lowered(import_hf(golden / case, name=case), "cpu-exact")

    logits = causal_logits(model, reference["ids"], prefill=int(reference["prefill"]))

    np.testing.assert_allclose(logits, reference["logits"], atol=2e-4)


@pytest.mark.parametrize(("quantise", "kl"), [("int8", 2e-2), ("int4", 1.0)])
@pytest.mark.parametrize("case", ["qwen3", "gemma3"])
def test_blocks_lowered_for_a_cpu_stay_near_transformers(
    case: str, quantise: str, kl: float, golden: Path, causal_logits: Logits, lowered: Callable[..., ImportedModel]
) -> None:
    reference = np.load(golden / case / "reference.npz")
    model = lowered(import_hf(golden / case, name=case, quantise=quantise), "cpu")

    logits = causal_logits(model, reference["ids"], prefill=int(reference["prefill"]))

    assert mean_kl(reference["logits"], logits) < kl


def test_a_short_prompt_grows_past_the_sliding_window(golden: Path, causal_logits: Logits) -> None:
    reference = np.load(golden / "gemma3" / "reference.npz")

    logits = causal_logits(import_hf(golden / "gemma3", name="g"), reference["ids"], prefill=5)

    np.testing.assert_allclose(logits, reference["logits"], atol=2e-4)


@pytest.mark.parametrize("case", CAUSAL)
def test_the_graph_is_valid_and_names_exactly_the_tensors_that_are_given(case: str, golden: Path) -> None:
    model = import_hf(golden / case, name=case)
    stubs = {i.name: i for i in model.graph.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}

    assert stubs.keys() == model.tensors.keys()
    for name, stub in stubs.items():
        array = model.tensors[name]()
        assert array.shape == tuple(stub.dims)
        assert onnx.helper.np_dtype_to_tensor_dtype(array.dtype) == stub.data_type


def test_the_specification_says_what_the_folder_says(copied: Callable[[str], Path]) -> None:
    folder = copied("qwen3")
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\nlicense: not-this-one\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "bos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "{{ x }}"}))

    model = import_hf(folder, name="tiny")

    spec = model.spec
    assert (spec.name, spec.kind, spec.architecture, spec.licence) == (
        "tiny",
        ModelKind.CAUSAL_LM,
        "qwen3",
        "apache-2.0",
    )
    assert (spec.layers, spec.hidden, spec.kv_heads, spec.head_dim) == (2, 64, 1, 32)
    assert (spec.vocabulary, spec.context_tokens) == (96, 128)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.add_bos) == (1, (7, 9), True)
    assert spec.parameters == sum(
        t.size for n, t in load_file(folder / "model.safetensors").items() if n != "lm_head.weight"
    )
    assert {"tokenizer_config.json", "generation_config.json", "config.json"} <= model.files.keys()


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>"}}],
                "special_tokens": {"<s>": {"ids": [1]}},
            },
            True,
        ),
        (
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>"}}],
                "special_tokens": {"<x>": {"ids": [5]}},
            },
            False,
        ),
        ({"type": "ByteLevel"}, False),
        (None, False),
    ],
)
def test_a_leading_token_is_found_in_the_post_processor(
    processor: object, expected: bool, copied: Callable[[str], Path]
) -> None:
    folder = copied("llama")
    nested = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]} if processor else None
    (folder / "tokenizer.json").write_text(json.dumps({"post_processor": nested}))

    assert import_hf(folder, name="m").spec.add_bos is expected


OLDER = {
    "llama3-rope": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-linear-rope": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
}


@pytest.mark.parametrize("case", OLDER)
def test_the_configuration_of_older_versions_of_transformers_means_the_same(
    case: str, copied: Callable[[str], Path], golden: Path
) -> None:
    older = copied(case)
    edit_config(older, rope_parameters=..., **OLDER[case])

    was, now = import_hf(older, name="m"), import_hf(golden / case, name="m")

    assert was.graph == now.graph
    for name in now.tensors:
        np.testing.assert_array_equal(was.tensors[name](), now.tensors[name]())


def test_inverse_frequencies_of_every_scaling_are_those_of_transformers(golden: Path) -> None:
    for case in json.loads((golden / "ropes.json").read_text()):
        given = case["config"]
        scaling = scaling_of(given["rope_type"], given, case["context"])
        rope = Rope(base=given["rope_theta"], dims=2 * len(case["inv_freq"]), scaling=scaling)

        np.testing.assert_allclose(inverse_frequencies(rope), case["inv_freq"], rtol=1e-5, err_msg=given["rope_type"])
        assert attention_factor(rope) == pytest.approx(case["factor"])


@pytest.mark.parametrize(("layers", "expected"), [(6, 5), (2, 2)])
def test_gemma_without_layer_types_sees_everything_in_every_sixth_layer(layers: int, expected: int) -> None:
    config = config_of(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 32,
                "num_hidden_layers": layers,
                "sliding_window": 16,
            },
        }
    )

    assert config.sliding_layers == tuple(range(expected))
    assert (config.heads, config.kv_heads, config.head_dim, config.vocabulary) == (8, 4, 256, 262_208)
    assert config.tied_embedding


def test_the_text_part_of_a_nested_model_is_imported(copied: Callable[[str], Path], golden: Path) -> None:
    folder = copied("gemma3")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    )
    rename = {"model.": "language_model.model."}
    edit_tensors(
        folder,
        lambda tensors: (
            {n.replace(*next(iter(rename.items())), 1): t for n, t in tensors.items()}
            | {"vision_tower.x.weight": np.zeros((2, 2), np.float32)}
        ),
    )

    nested, plain = import_hf(folder, name="g"), import_hf(golden / "gemma3", name="g")

    assert nested.graph == plain.graph
    for name in plain.tensors:
        np.testing.assert_array_equal(nested.tensors[name](), plain.tensors[name]())


def test_several_files_with_an_index_are_one_model(copied: Callable[[str], Path], golden: Path) -> None:
    folder = copied("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for file, part in parts.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    sharded, whole = import_hf(folder, name="m"), import_hf(golden / "llama", name="m")

    assert sharded.graph == whole.graph
    for name in whole.tensors:
        np.testing.assert_array_equal(sharded.tensors[name](), whole.tensors[name]())


@pytest.mark.parametrize(("called", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision_weights_stay_as_they_are(
    called: str,
    dtype: type,
    copied: Callable[[str], Path],
    causal_logits: Logits,
    lowered: Callable[..., ImportedModel],
) -> None:
    folder = copied("qwen2")
    edit_tensors(folder, lambda tensors: {n: t.astype(dtype) for n, t in tensors.items()})
    ids = np.arange(12)

    kept, widened = import_hf(folder, name="m"), import_hf(folder, name="m", quantise="fp32")

    assert (kept.spec.quantisation, kept.spec.import_error) == (called, None)
    matrices = {name for name, array in kept.tensors.items() if array().ndim == 2}
    assert {kept.tensors[name]().dtype for name in matrices} == {np.dtype(dtype)}
    for target in ("cpu", "cpu-exact"):
        logits = [causal_logits(lowered(model, target), ids, prefill=8) for model in (kept, widened)]
        np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_widen_exactly(dtype: type, copied: Callable[[str], Path], golden: Path) -> None:
    folder = copied("qwen2")
    edit_tensors(folder, lambda tensors: {n: t.astype(dtype) for n, t in tensors.items()})

    model = import_hf(folder, name="m", quantise="fp32")

    exact = load_file(golden / "qwen2" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    kept = model.tensors["blk.0.ffn_up.weight"]()
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(kept, exact.astype(dtype).astype(np.float32))
    assert model.spec.import_error is None


@pytest.mark.parametrize(("quantise", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision_kept_as_it_is_rounds_nothing(quantise: str, dtype: type, copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_tensors(folder, lambda tensors: {n: t.astype(dtype) for n, t in tensors.items()})

    assert import_hf(folder, name="m", quantise=quantise).spec.import_error is None


@pytest.mark.parametrize(
    ("quantise", "least", "most", "kl"),
    [("fp16", 1e-5, 5e-4, 1e-4), ("bf16", 1e-4, 4e-3, 5e-3), ("int8", 1e-3, 1e-2, 2e-2), ("int4", 2e-2, 0.12, 2.0)],
)
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_rounding_costs_what_the_specification_says(
    case: str, quantise: str, least: float, most: float, kl: float, golden: Path, causal_logits: Logits
) -> None:
    reference = np.load(golden / case / "reference.npz")
    model = import_hf(golden / case, name="m", quantise=quantise)

    logits = causal_logits(model, reference["ids"], prefill=int(reference["prefill"]))

    assert model.spec.quantisation == quantise
    assert model.spec.import_error is not None
    assert least < model.spec.import_error < most
    assert 0 < mean_kl(reference["logits"], logits) < kl


def test_four_bits_leave_the_head_and_the_embedding_at_eight(golden: Path) -> None:
    shapes = {"token_embd.weight": (96, 64), "blk.0.ffn_up.weight": (96, 64), "odd": (8, 33)}

    formats = choose_formats(shapes, "int4", fine=("token_embd.weight",))

    match formats["token_embd.weight"], formats["blk.0.ffn_up.weight"], formats["odd"]:
        case Blocked(bits=head), Blocked(bits=layer), Dense(dtype=odd):
            assert (head, layer, odd) == (8, 4, "float16")
        case other:
            pytest.fail(f"unexpected formats {other}")


def test_numbers_beyond_half_precision_are_refused_not_made_infinite(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_tensors(
        folder, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": np.full((96, 64), 1e6, np.float32)}
    )

    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight holds numbers up to 1e"):
        import_hf(folder, name="m", quantise="fp16")


def test_a_missing_tensor_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"})

    with pytest.raises(CorruptFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \[96, 64\] is missing"):
        import_hf(folder, name="m")


def test_a_shape_that_does_not_fit_is_named_with_both_shapes(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_config(folder, intermediate_size=128)

    with pytest.raises(CorruptFileError, match=r"gate_proj.*\[96, 64\].*\[128, 64\]"):
        import_hf(folder, name="m")


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.02])
def test_a_truncated_file_names_the_first_tensor_that_is_cut(kept: float, copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])

    with pytest.raises(CorruptFileError, match=r"tensor \S+ ends at byte [\d,]+, the file has [\d,]+"):
        import_hf(folder, name="m")


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, b"\xff" * 200, b"PK\x03\x04" + b"x" * 500])
def test_garbage_instead_of_weights_is_corrupt(data: bytes, copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").write_bytes(data)

    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        import_hf(folder, name="m")


def test_an_index_may_not_name_files_outside_the_folder(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))

    with pytest.raises(CorruptFileError, match=r"\.\./secret"):
        import_hf(folder, name="m")


def test_pickled_weights_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin"):
        import_hf(folder, name="m")


def test_a_tensor_type_that_we_do_not_read_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_tensors(folder, lambda tensors: tensors | {"model.norm.weight": np.ones(64, np.float64)})

    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight .* F64; supported are F32, F16, BF16"):
        import_hf(folder, name="m")


def test_a_tensor_left_over_means_a_variant_that_we_do_not_know(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_tensors(folder, lambda tensors: tensors | {"model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)})

    with pytest.raises(UnsupportedModelError, match=r"1 tensors .* model\.layers\.0\.self_attn\.o_proj\.bias"):
        import_hf(folder, name="m")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*'mamba'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"hidden_act": "relu"}, "relu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_we_do_not_support_is_named(changes: dict[str, object], named: str, copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_config(folder, **changes)

    with pytest.raises(UnsupportedModelError, match=named):
        import_hf(folder, name="m")


def test_an_unsupported_architecture_lists_the_supported_ones(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])

    with pytest.raises(UnsupportedModelError) as caught:
        import_hf(folder, name="m")

    assert "LlamaForCausalLM" in caught.value.hint
    assert "Qwen3ForCausalLM" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": ...},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0, "head_dim": ...},
        {"hidden_size": -64},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
    ],
)
def test_a_configuration_that_makes_no_model_is_corrupt(
    changes: dict[str, object], copied: Callable[[str], Path]
) -> None:
    folder = copied("llama")
    edit_config(folder, **changes)

    with pytest.raises(CorruptFileError, match=r"config\.json"):
        import_hf(folder, name="m")


def test_a_configuration_that_is_not_json_is_corrupt(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / "config.json").write_text('{"model_type": "llama", ')

    with pytest.raises(CorruptFileError, match=r"config\.json"):
        import_hf(folder, name="m")


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"config\.json"):
        import_hf(tmp_path, name="m")
