"""The canonical graph: standard operators, one answer however a text is cut into steps."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from shoal.model.affine import FLOAT_DTYPES, Blocked, Blocks, Dense, Format, dequantise, part_shape
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
from shoal.model.transformer import Activation, TransformerConfig, build, matrix_shapes, vector_sizes

Logits = Callable[..., np.ndarray]
Q4 = Blocked(bits=4, block=32, zero_point=0, affine=True)


def config(**changes: object) -> TransformerConfig:
    base = TransformerConfig(
        architecture="llama",
        layers=2,
        hidden=64,
        ffn=96,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=50,
        context_tokens=32,
        norm_epsilon=1e-5,
        rope=Rope(base=10_000.0, dims=16),
    )
    return TransformerConfig(**{f: getattr(base, f) for f in base.__struct_fields__} | changes)


VARIANTS = {
    "plain": config(),
    "tied": config(tied_embedding=True),
    "biased": config(attention_bias=True),
    "normed": config(qk_norm=True, post_norms=True, activation=Activation.GELU_TANH, embedding_scale=8.0),
    "windowed": config(window=4, sliding_layers=(0,), local_rope=Rope(base=100.0, dims=16)),
    "capped": config(logit_softcap=30.0, attention_softcap=50.0),
}


def arrays_of(c: TransformerConfig, numbers: Callable[..., np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    shapes = matrix_shapes(c) | {name: (size,) for name, size in vector_sizes(c).items()}
    made = {n: numbers(i, s) / np.float32(s[-1] ** (0.5 * (len(s) - 1))) for i, (n, s) in enumerate(shapes.items())}
    made |= {name: inverse_frequencies(rope) for name, rope in c.rotations.items()}
    return {name: lambda array=array: array for name, array in made.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", [Dense(), Q4], ids=["dense", "blocked"])
def test_types_and_shapes_agree_throughout(variant: str, form: Format) -> None:
    c = VARIANTS[variant]
    graph = build(c, dict.fromkeys(matrix_shapes(c), form))

    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)

    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info
    }
    assert shapes["blk.1.ffn_residual"] == [1, "T", 64]
    produced = {output for node in graph.graph.node for output in node.output}
    assert produced <= set(shapes) | {o.name for o in graph.graph.output}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_call_has_a_definition_and_a_body_of_standard_operators(variant: str) -> None:
    graph = build(VARIANTS[variant], {})

    called = {node.op_type for node in graph.graph.node if node.domain == DOMAIN}

    assert called == {f.name for f in graph.functions}
    assert {node.domain for f in graph.functions for node in f.node} == {""}
    assert {o.domain for o in graph.opset_import} == {"", DOMAIN}


def test_only_the_residual_stream_crosses_a_layer() -> None:
    graph = build(config(), {}).graph
    outside = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    at = next(i for i, node in enumerate(graph.node) if "blk.0.attn_residual" in node.output) + 1

    before = {output for node in graph.node[:at] for output in node.output}
    after = {name for node in graph.node[at:] for name in node.input} - outside

    assert before & after == {"blk.0.attn_residual"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_any_size_give_the_logits_of_one_prefill(
    variant: str, numbers: Callable[..., np.ndarray], run_model: Logits, model_of: Callable[..., ImportedModel]
) -> None:
    c = VARIANTS[variant]
    model = model_of(build(c, {}), arrays_of(c, numbers))
    ids = np.arange(20) * 7 % c.vocabulary

    whole = run_model(model, ids)
    stepped = run_model(model, ids, (5, 1, 1, 8, 5))

    assert whole.std() > 0.1
    np.testing.assert_allclose(stepped, whole, atol=2e-5)


def test_a_window_hides_what_is_older(
    numbers: Callable[..., np.ndarray], run_model: Logits, model_of: Callable[..., ImportedModel]
) -> None:
    c = config(layers=1, window=4, sliding_layers=(0,))
    model = model_of(build(c, {}), arrays_of(c, numbers))
    ids = np.arange(12) * 7 % c.vocabulary
    other = ids.copy()
    other[2] += 1

    difference = np.abs(run_model(model, ids) - run_model(model, other)).max(axis=-1)

    assert (difference[2:6] > 1e-3).all()
    assert not difference[6:].any()


def test_logits_stay_below_their_cap(
    numbers: Callable[..., np.ndarray], run_model: Logits, model_of: Callable[..., ImportedModel]
) -> None:
    c = config(logit_softcap=0.5)
    model = model_of(build(c, {}), arrays_of(c, numbers))

    logits = run_model(model, np.arange(6))

    assert 0.3 < np.abs(logits).max() <= 0.5


FORMS = {Dense(dtype="float16"), Dense(dtype="bfloat16"), *(kind.form for kind in block_types().values())}


def blocks_of(numbers: Callable[..., np.ndarray], seed: int, form: Blocked, shape: tuple[int, int]) -> Blocks:
    parts = {suffix: part_shape(suffix, form, shape) for suffix in form.suffixes}
    q = (np.abs(numbers(seed, parts[".q"][1])) * 1e6).astype(np.uint32).astype(np.uint8)
    d, *m = (
        numbers(seed + i, parts[s][1]).astype(parts[s][0]) * np.float16(2.0**-form.bits)
        for i, s in enumerate(form.suffixes[1:])
    )
    return Blocks(q, d, *m)


@pytest.mark.parametrize("form", sorted(FORMS, key=repr), ids=repr)
def test_a_stored_format_computes_what_its_numbers_in_fp32_do(
    form: Format, numbers: Callable[..., np.ndarray], run_model: Logits, model_of: Callable[..., ImportedModel]
) -> None:
    c = config(tied_embedding=True)
    plain = arrays_of(c, numbers)
    stored, exact = dict(plain), dict(plain)
    for seed, (name, shape) in enumerate(matrix_shapes(c).items()):
        match form:
            case Dense(dtype=dtype):
                array = plain[name]().astype(FLOAT_DTYPES[dtype])
                stored[name] = lambda array=array: array
                exact[name] = lambda array=array: array.astype(np.float32)
            case Blocked():
                blocks = blocks_of(numbers, seed, form, shape)
                stored |= {name + s: lambda s=s, blocks=blocks: blocks.part(s) for s in form.suffixes}
                exact[name] = lambda blocks=blocks: dequantise(blocks, form)
    ids = np.arange(20) * 7 % c.vocabulary

    logits = run_model(model_of(build(c, dict.fromkeys(matrix_shapes(c), form)), stored), ids)

    np.testing.assert_allclose(logits, run_model(model_of(build(c, {}), exact), ids), atol=1e-4, rtol=1e-4)


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
