"""Lowered graphs compute what canonical graphs do, whole or in pieces."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shoal.errors import UnsupportedModelError
from shoal.model.affine import Dense, Format
from shoal.model.derive import derive
from shoal.model.frontier import blocks, shard
from shoal.model.functions import DOMAIN
from shoal.model.gguf import import_gguf
from shoal.model.lower import Lowered, lower
from shoal.model.quantize import INT4, INT8
from shoal.model.rope import Rope
from shoal.model.spec import ImportedModel
from shoal.model.transformer import TransformerConfig

Tiny = Callable[..., ImportedModel]
Logits = Callable[..., np.ndarray]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
MIXED = {
    "blk.0.attn_v.weight": Type.Q6_K,
    "blk.0.attn_k.weight": Type.Q8_0,
    "blk.1.ffn_up.weight": Type.F16,
    "token_embd.weight": Type.Q8_0,
}


def operators(lowered: Lowered) -> list[str]:
    return [node.op_type for node in lowered.graph.graph.node]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "kind", [Type.F32, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q6_K], ids=lambda k: k.name
)
def test_the_exact_lowering_gives_the_canonical_logits(
    architecture: str, kind: Type, tiny: Tiny, run_model: Logits, run_lowered: Logits, token_ids: np.ndarray
) -> None:
    model = tiny(architecture, kind)

    reference = run_model(model, token_ids)

    assert reference.std() > 0.1
    np.testing.assert_allclose(run_lowered(model, token_ids), reference, atol=1e-3 * reference.std())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_past_the_sliding_window_give_the_logits_of_one_prefill(
    architecture: str, tiny: Tiny, run_model: Logits, run_lowered: Logits, token_ids: np.ndarray
) -> None:
    model = tiny(architecture, Type.Q4_K, types=MIXED)

    stepped = run_lowered(model, token_ids, (3, 1, 1, 16, *[1] * 19))

    reference = run_model(model, token_ids)
    np.testing.assert_allclose(stepped, reference, atol=1e-3 * reference.std())


@pytest.mark.parametrize("form", [Dense(), INT4, INT8], ids=["fp32", "int4", "int8"])
def test_every_variant_survives(
    form: Format,
    variant: TransformerConfig,
    random_model: Callable[..., ImportedModel],
    run_model: Logits,
    run_lowered: Logits,
) -> None:
    model = random_model(variant, form)
    ids = np.arange(20) * 7 % variant.vocabulary

    reference = run_model(model, ids)

    np.testing.assert_allclose(run_lowered(model, ids, (12, 1, 7)), reference, atol=1e-3 * reference.std())


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q8_0, Type.Q6_K], ids=lambda k: k.name)
def test_the_served_lowering_rounds_activations_and_no_more(
    kind: Type, tiny: Tiny, run_model: Logits, run_lowered: Logits, token_ids: np.ndarray
) -> None:
    model = tiny("llama", kind)
    reference = run_model(model, token_ids)

    served = run_lowered(model, token_ids, target="cpu")

    assert 0 < np.abs(served - reference).mean() < 0.05 * reference.std()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_untied_head_and_scaled_rotation_survive(
    architecture: str, tiny: Tiny, run_model: Logits, run_lowered: Logits, token_ids: np.ndarray
) -> None:
    scaling = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 3.0}
    model = tiny(architecture, Type.Q8_0, tied=False, metadata=scaling)

    reference = run_model(model, token_ids)

    np.testing.assert_allclose(run_lowered(model, token_ids), reference, atol=1e-3 * reference.std())


def test_products_of_one_input_and_format_are_one(tiny: Tiny) -> None:
    plain = lower(tiny("llama", Type.Q4_1).graph)
    mixed = lower(tiny("llama", Type.Q4_1, types={"blk.0.attn_v.weight": Type.Q6_K}).graph)

    # per layer: qkv, output, gate and up, down; then the head
    assert operators(plain).count("MatMulNBits") == 2 * 4 + 1
    assert operators(plain).count("Split") == 2
    assert operators(mixed).count("MatMulNBits") == 2 * 4 + 2
    assert operators(mixed).count("Split") == 3


def test_a_served_product_is_one_product_whatever_its_blocks_offsets(tiny: Tiny) -> None:
    affine = tiny("llama", Type.Q4_1).graph

    assert operators(lower(affine)).count("MatMul") == 0
    assert operators(lower(affine, target="cpu-exact")).count("MatMul") == 2 * 4 + 1


def test_stored_bytes_are_used_as_they_are_where_nothing_is_stacked(tiny: Tiny) -> None:
    lowered = lower(tiny("llama", Type.Q8_0).graph)
    names = {t.name for t in lowered.graph.graph.initializer}

    assert {"token_embd.weight.q", "blk.0.ffn_down.weight.q", "blk.0.attn_output.weight.q"} <= names
    assert [d.op for d in lowered.derived if d.inputs == ("token_embd.weight.q",)] == ["view:2"]
    assert "blk.0.attn_q.weight.q" not in names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_piece_is_lowered_to_the_piece_of_the_whole(architecture: str, tiny: Tiny) -> None:
    graph = tiny(architecture, Type.Q4_1, types=MIXED).graph
    chain = blocks(graph)
    whole = lower(graph)

    pieces = [lower(shard(graph, chain, i, i + 1)) for i in range(len(chain))]

    nodes = [n.SerializeToString(deterministic=True) for n in whole.graph.graph.node]
    assert [n.SerializeToString(deterministic=True) for p in pieces for n in p.graph.graph.node] == nodes
    assert {d for p in pieces for d in p.derived} == set(whole.derived)
    assert {p.name for p in pieces} == {whole.name}


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_shards_give_the_bits_of_the_whole(
    data: st.DataObject,
    tiny: Tiny,
    run_chain: Logits,
    with_derived: Callable[..., ImportedModel],
    token_ids: np.ndarray,
) -> None:
    model = tiny(data.draw(st.sampled_from(ARCHITECTURES)), Type.Q4_1, types=MIXED)
    chain = blocks(model.graph)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(chain) - 1), min_size=1)))
    steps = (20, 1, 1, 18)

    whole = run_chain([with_derived(model, lower(model.graph))], token_ids, steps)
    shards = [shard(model.graph, chain, a, b) for a, b in zip([0, *cuts], [*cuts, len(chain)], strict=True)]
    sharded = run_chain([with_derived(model, lower(s)) for s in shards], token_ids, steps)

    np.testing.assert_array_equal(sharded, whole)


@pytest.mark.parametrize(("head_dim", "rotary_dims"), [(24, 24), (100, 100), (32, 24)])
def test_heads_that_the_engine_cannot_rotate_are_refused_when_lowering(
    head_dim: int,
    rotary_dims: int,
    small_config: Callable[..., TransformerConfig],
    random_model: Callable[..., ImportedModel],
) -> None:
    config = small_config(head_dim=head_dim, rope=Rope(base=10_000.0, dims=rotary_dims))

    with pytest.raises(UnsupportedModelError, match=f"head_dim {head_dim}, of which {rotary_dims}"):
        lower(random_model(config).graph)


@pytest.mark.parametrize(("head_dim", "rotary_dims"), [(16, 16), (48, 48), (64, 32)])
def test_heads_of_whole_sixteens_run(
    head_dim: int,
    rotary_dims: int,
    small_config: Callable[..., TransformerConfig],
    random_model: Callable[..., ImportedModel],
    run_model: Logits,
    run_lowered: Logits,
) -> None:
    model = random_model(small_config(head_dim=head_dim, rope=Rope(base=10_000.0, dims=rotary_dims)))
    ids = np.arange(9) * 5 % 50

    np.testing.assert_allclose(run_lowered(model, ids, (6, 1, 2)), run_model(model, ids, (6, 1, 2)), atol=1e-3)


def test_lowering_is_repeatable(tiny: Tiny) -> None:
    model = tiny("gemma3", Type.Q4_1)

    first, second = lower(model.graph), lower(model.graph)

    assert first.graph.SerializeToString(deterministic=True) == second.graph.SerializeToString(deterministic=True)
    assert first.derived == second.derived


def test_the_context_bounds_the_rotary_tables_only(tiny: Tiny) -> None:
    graph = tiny("llama").graph

    bounded = {t.name: tuple(t.dims) for t in lower(graph, context_tokens=48).graph.graph.initializer}

    assert bounded["rope.inv_freq.cos.48"] == bounded["rope.inv_freq.sin.48"] == (48, 32)
    assert (128, 32) not in bounded.values()


def test_a_graph_that_is_not_canonical_passes_unchanged() -> None:
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    graph = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [info], [out])
    )

    lowered = lower(graph)

    assert lowered.graph is graph
    assert lowered.derived == ()


def test_targets_are_named_and_versioned(tiny: Tiny) -> None:
    graph = tiny("llama").graph

    assert lower(graph).name == "cpu/4"
    assert lower(graph, target="cpu-exact").name == "cpu-exact/4"
    with pytest.raises(UnsupportedModelError, match="tpu"):
        lower(graph, target="tpu")


def test_only_embeddings_remain_functions(tiny: Tiny) -> None:
    lowered = lower(tiny("qwen3", Type.Q4_K).graph)

    assert {node.op_type for node in lowered.graph.graph.node if node.domain == DOMAIN} == {"AffineEmbedding4"}
    assert [f.name for f in lowered.graph.functions] == ["AffineEmbedding4"]


def test_an_unknown_derivation_is_an_error() -> None:
    with pytest.raises(ValueError, match="guess"):
        derive("guess", [])


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_answers(smollm2_gguf: Path, run_lowered: Logits) -> None:
    model = import_gguf(smollm2_gguf, name="smollm2")
    # <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n
    prompt = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    answer = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.<|im_end|>

    logits = run_lowered(model, np.array(prompt + answer), target="cpu")

    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(("target", "most"), [("cpu-exact", 1e-6), ("cpu", 6e-3)])
def test_smollm2_is_close_to_transformers(
    target: str, most: float, smollm2_gguf: Path, golden: Path, run_lowered: Logits
) -> None:
    recorded = np.load(golden / "smollm2" / "reference.npz")
    model = import_gguf(smollm2_gguf, name="smollm2")

    logits = run_lowered(model, recorded["ids"], target=target).astype(np.float64)

    # the recorded 32 likeliest tokens and the rest as one: a lower bound of the KL divergence over the vocabulary
    chosen = np.take_along_axis(logits, recorded["top_tokens"], axis=-1)
    log_q = chosen - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    log_p = recorded["top_logits"] - recorded["logsumexp"][:, None]
    p, q = (np.concatenate([np.exp(x), 1 - np.exp(x).sum(-1, keepdims=True)], axis=-1) for x in (log_p, log_q))
    assert (p * np.log(p / q)).sum(-1).mean() < most
    if target == "cpu-exact":
        np.testing.assert_allclose(chosen, recorded["top_logits"], atol=2e-3)


def test_an_input_that_only_travels_through_a_shard_stays_an_input() -> None:
    graph = helper.make_graph(
        [helper.make_node("Silu", ["x"], ["y"], domain="shoal")],
        "shard",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("batch", 4)) for n in ("x", "mask", "unused")],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("batch", 4)) for n in ("y", "mask")],
    )

    lowered = lower(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("shoal", 1)])
    )

    assert [i.name for i in lowered.graph.graph.input] == ["x", "mask"]
