"""The canonical graph: standard operators, one answer however a text is cut into steps."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from shoal.model.affine import Blocked, Dense, Format
from shoal.model.functions import DOMAIN
from shoal.model.gguf_blocks import block_types
from shoal.model.rope import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    attention_factor,
    inverse_frequencies,
)
from shoal.model.spec import ImportedModel
from shoal.model.transformer import Activation, TransformerConfig, build, matrix_shapes

Logits = Callable[..., np.ndarray]
Config = Callable[..., TransformerConfig]
Model = Callable[..., ImportedModel]
IDS = np.arange(20) * 7 % 50
Q4 = Blocked(bits=4, block=32, zero_point=0, affine=True)


@pytest.mark.parametrize("form", [Dense(), Q4], ids=["dense", "blocked"])
def test_types_and_shapes_agree_throughout(variant: TransformerConfig, form: Format) -> None:
    graph = build(variant, dict.fromkeys(matrix_shapes(variant), form))

    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)

    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info
    }
    assert shapes["blk.1.ffn_residual"] == [1, "T", 64]
    produced = {output for node in graph.graph.node for output in node.output}
    assert produced <= set(shapes) | {o.name for o in graph.graph.output}


def test_a_call_has_a_definition_and_a_body_of_standard_operators(variant: TransformerConfig) -> None:
    graph = build(variant, {})

    called = {node.op_type for node in graph.graph.node if node.domain == DOMAIN}

    assert called == {f.name for f in graph.functions}
    assert {node.domain for f in graph.functions for node in f.node} == {""}
    assert {o.domain for o in graph.opset_import} == {"", DOMAIN}


def test_only_the_residual_stream_crosses_a_layer(small_config: Config) -> None:
    graph = build(small_config(), {}).graph
    outside = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    at = next(i for i, node in enumerate(graph.node) if "blk.0.attn_residual" in node.output) + 1

    before = {output for node in graph.node[:at] for output in node.output}
    after = {name for node in graph.node[at:] for name in node.input} - outside

    assert before & after == {"blk.0.attn_residual"}


def test_steps_of_any_size_give_the_logits_of_one_prefill(
    variant: TransformerConfig, random_model: Model, run_model: Logits
) -> None:
    model = random_model(variant)

    whole = run_model(model, IDS)
    stepped = run_model(model, IDS, (5, 1, 1, 8, 5))

    assert whole.std() > 0.1
    np.testing.assert_allclose(stepped, whole, atol=3e-5 * whole.std())


def test_a_window_hides_what_is_older(small_config: Config, random_model: Model, run_model: Logits) -> None:
    model = random_model(small_config(layers=1, window=4, sliding_layers=(0,)))
    other = IDS.copy()
    other[2] += 1

    difference = np.abs(run_model(model, IDS) - run_model(model, other)).max(axis=-1)

    assert (difference[2:6] > 1e-3).all()
    assert not difference[6:].any()


def test_sliding_layers_rotate_by_their_own_frequencies(small_config: Config) -> None:
    yarn = Rope(base=1e4, dims=16, scaling=YarnScaling(factor=4.0, original_context_tokens=8))
    config = small_config(window=4, sliding_layers=(0,), rope=yarn, local_rope=Rope(base=100.0, dims=16))

    calls = [node for node in build(config, {}).graph.node if node.op_type == "CachedAttention"]

    assert [call.input[-1] for call in calls] == ["rope_local.inv_freq", "rope.inv_freq"]
    scales = [a.f for call in calls for a in call.attribute if a.name == "rotary_scale"]
    assert scales == [1.0, pytest.approx(attention_factor(yarn))]


def test_logits_stay_below_their_cap(small_config: Config, random_model: Model, run_model: Logits) -> None:
    logits = run_model(random_model(small_config(logit_softcap=0.5)), IDS)

    assert 0.3 < np.abs(logits).max() <= 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"attention_scale": 0.7},
        {"attention_softcap": 1.0},
        {"embedding_scale": 3.0, "attention_bias": True},
        {"rope": Rope(base=1e4, dims=16, interleaved=True)},
        {"rope": Rope(base=1e4, dims=8)},
        {
            "rope": Rope(
                base=1e4, dims=16, scaling=YarnScaling(factor=1.0, original_context_tokens=8, attention_factor=2.0)
            )
        },
        {"activation": Activation.GELU_TANH},
    ],
    ids=str,
)
def test_every_setting_matters(
    change: dict[str, object], small_config: Config, random_model: Model, run_model: Logits
) -> None:
    plain, changed = (
        run_model(random_model(small_config(**c)), IDS)
        for c in ({"attention_bias": "attention_bias" in change}, change)
    )

    assert np.abs(changed - plain).max() > 1e-3


FORMS = {Dense(dtype="float16"), Dense(dtype="bfloat16"), *(kind.form for kind in block_types().values())}


@pytest.mark.parametrize("form", sorted(FORMS, key=repr), ids=repr)
def test_a_stored_format_computes_what_its_numbers_in_fp32_do(
    form: Format, small_config: Config, random_model: Model, in_fp32: Model, run_model: Logits
) -> None:
    config = small_config(tied_embedding=True)
    stored = random_model(config, form)

    logits = run_model(stored, IDS)

    np.testing.assert_allclose(logits, run_model(in_fp32(stored, config, form), IDS), atol=1e-4, rtol=1e-4)


def test_frequencies_follow_their_papers() -> None:
    plain = inverse_frequencies(Rope(base=10_000.0, dims=8))
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)

    llama3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=1000)
    scaled = inverse_frequencies(Rope(base=10_000.0, dims=8, scaling=llama3))
    # wavelengths 6, 63, 628, 6283: the first two are shorter than 1000 / 4, the last longer than 1000
    np.testing.assert_allclose(scaled[[0, 1, 3]], [1, 0.1, 0.001 / 8], rtol=1e-6)
    assert 0.01 / 8 < scaled[2] < 0.01

    np.testing.assert_allclose(
        inverse_frequencies(Rope(base=10_000.0, dims=8, scaling=LinearScaling(factor=2.0))), plain / 2
    )
    by_factors = Rope(base=10_000.0, dims=8, scaling=FactorScaling(factors=(1.0, 2.0, 4.0, 8.0)))
    np.testing.assert_allclose(inverse_frequencies(by_factors), plain / [1, 2, 4, 8], rtol=1e-6)


def test_yarn_keeps_short_waves_and_scales_attention() -> None:
    yarn = YarnScaling(factor=4.0, original_context_tokens=4096)
    rope = Rope(base=10_000.0, dims=64, scaling=yarn)
    ratio = inverse_frequencies(rope) / inverse_frequencies(Rope(base=10_000.0, dims=64))

    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(0.25)
    assert (np.diff(ratio) <= 1e-6).all()
    assert attention_factor(rope) == pytest.approx(1.1386, abs=1e-4)
    assert attention_factor(Rope(base=10_000.0, dims=64)) == 1.0
