"""Where a language model is cut, and what its shards are."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.errors import InvalidRequestError
from shoal.model.affine import Blocked, Format
from shoal.model.frontier import blocks, shard
from shoal.model.rope import Rope
from shoal.model.transformer import TransformerConfig, build, matrix_shapes

Array = NDArray[np.generic]
LAYERS = 3
HIDDEN = 32
CONFIG = TransformerConfig(
    architecture="llama",
    layers=LAYERS,
    hidden=HIDDEN,
    ffn=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=64,
    context_tokens=64,
    norm_epsilon=1e-5,
    rope=Rope(base=1e4, dims=8),
    tied_embedding=True,
)
RESIDUALS = ["embedding"] + [f"blk.{n}.{part}_residual" for n in range(LAYERS) for part in ("attn", "ffn")]


def noise(shape: Sequence[int], seed: int) -> Array:
    """Numbers in [-1, 1) without visible order."""
    count = int(np.prod(shape))
    return (np.sin(np.arange(count) * 12.9898 + seed) * 43758.5453 % 2 - 1).reshape(tuple(shape))


def filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with random weights in place of the stubs."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            array = noise(tensor.dims, len(tensor.name)) * (127 if dtype == np.uint8 else 0.3)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
    return model


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))


def step_of(tokens: int, past: int) -> dict[str, Array]:
    feeds: dict[str, Array] = {
        "input_ids": np.arange(3, 3 + tokens)[None] * 7 % CONFIG.vocabulary,
        "position_ids": np.arange(past, past + tokens)[None],
        "logit_rows": np.array([tokens - 1]),
    }
    for layer in range(LAYERS):
        for part in ("key", "value"):
            cache = noise((1, CONFIG.kv_heads, past, CONFIG.head_dim), layer)
            feeds[f"past_key_values.{layer}.{part}"] = cache.astype(np.float32)
    return feeds


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return filled(build(CONFIG, {}))


def test_a_language_model_is_cut_along_its_residual_stream(decoder: onnx.ModelProto) -> None:
    chain = blocks(decoder)

    assert [[o.name for o in b.outputs] for b in chain[:-1]] == [[name] for name in RESIDUALS]
    assert {(o.dtype, o.shape, o.bytes_per_token, o.bytes_fixed) for b in chain[:-1] for o in b.outputs} == {
        ("float32", (1, "T", HIDDEN), 4 * HIDDEN, 0)
    }
    assert [i.name for i in chain[0].inputs] == ["input_ids"]
    assert [o.name for o in chain[-1].outputs] == ["logits"]


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_scale": 5.6, "post_norms": True, "qk_norm": True, "tied_embedding": False},
        {"attention_bias": True, "layers": 1},
        {"window": 8, "sliding_layers": (0, 2), "local_rope": Rope(base=1e4, dims=8), "logit_softcap": 30.0},
        {"vocabulary": 100_000, "layers": 40},
    ],
    ids=["gemma-like", "one layer", "sliding", "large vocabulary"],
)
def test_every_architecture_is_cut_at_the_same_places(changes: dict[str, object]) -> None:
    config = CONFIG.__class__(**{f: getattr(CONFIG, f) for f in CONFIG.__struct_fields__} | changes)

    chain = blocks(build(config, {}))

    first = "scaled_embedding" if config.embedding_scale != 1 else "embedding"
    expected = [first] + [f"blk.{n}.{part}_residual" for n in range(config.layers) for part in ("attn", "ffn")]
    assert [[o.name for o in b.outputs] for b in chain[:-1]] == [[name] for name in expected]


def test_block_quantised_weights_do_not_move_the_cuts() -> None:
    four_bits: dict[str, Format] = {
        n: Blocked(bits=4, block=32, zero_point=8, affine=True) for n in matrix_shapes(CONFIG)
    }

    quantised, dense = blocks(build(CONFIG, four_bits)), blocks(build(CONFIG, {}))

    assert [b.outputs for b in quantised] == [b.outputs for b in dense]
    assert [b.flops_per_token for b in quantised] == [b.flops_per_token for b in dense]
    assert quantised[1].weights_bytes < dense[1].weights_bytes / 4


def test_equal_layers_are_of_one_kind(decoder: onnx.ModelProto) -> None:
    kinds = [b.kind for b in blocks(decoder)]

    assert len(set(kinds)) == 4
    assert len(set(kinds[1:-1:2])) == 1
    assert len(set(kinds[2:-1:2])) == 1


def test_a_cache_belongs_to_the_block_of_its_layer(decoder: onnx.ModelProto) -> None:
    chain = blocks(decoder)

    assert [b.kv_layers for b in chain] == [(), (0,), (), (1,), (), (2,), (), ()]
    assert {b.kv_bytes_per_token for b in chain} == {0, 2 * CONFIG.kv_heads * CONFIG.head_dim * 4}


def test_work_of_a_block_is_two_per_weight_and_the_attention(decoder: onnx.ModelProto) -> None:
    feed_forward = blocks(decoder)[2]

    products = 2 * 3 * HIDDEN * CONFIG.ffn
    assert products <= feed_forward.flops_per_token <= products + 10 * CONFIG.ffn


@settings(max_examples=15)
@given(cuts=st.sets(st.integers(1, 2 * LAYERS + 1)), tokens=st.integers(1, 5), past=st.integers(0, 7))
def test_shards_one_after_another_equal_the_decoder(
    decoder: onnx.ModelProto, cuts: set[int], tokens: int, past: int
) -> None:
    feeds = step_of(tokens, past)
    chain = blocks(decoder)
    steps = {k: v for k, v in feeds.items() if k != "input_ids"}
    found: dict[str, Array] = {}
    carried: dict[str, Array] = {"input_ids": feeds["input_ids"]}

    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(chain)], strict=True):
        outputs = run(shard(decoder, chain, start, stop), carried | steps)
        carried = {b.name: outputs[b.name] for b in chain[stop - 1].outputs}
        found |= outputs

    for name, array in run(decoder, feeds).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_shard_holds_only_what_is_its_own(decoder: onnx.ModelProto) -> None:
    part = shard(decoder, blocks(decoder), 3, 5)  # layer 1

    onnx.checker.check_model(part, full_check=True)
    assert [i.name for i in part.graph.input] == [
        "blk.0.ffn_residual",
        "position_ids",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert [o.name for o in part.graph.output] == ["blk.1.ffn_residual", "present.1.key", "present.1.value"]
    assert all(t.name.startswith(("blk.1.", "rope.")) for t in part.graph.initializer)
    assert {f.name for f in part.functions} == {"Linear", "Silu", "CachedAttention"}


def test_stubs_stay_stubs() -> None:
    model = build(CONFIG, {})

    part = shard(model, blocks(model), 1, 2)

    stubs = {t.name for t in part.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert "blk.0.attn_q.weight" in stubs


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 1), (-1, 2), (0, 99)])
def test_a_range_that_is_none_is_refused(decoder: onnx.ModelProto, start: int, stop: int) -> None:
    with pytest.raises(InvalidRequestError, match="8 blocks"):
        shard(decoder, blocks(decoder), start, stop)


def test_blocks_of_another_graph_are_refused(decoder: onnx.ModelProto) -> None:
    other = blocks(
        build(CONFIG.__class__(**{f: getattr(CONFIG, f) for f in CONFIG.__struct_fields__} | {"layers": 2}), {})
    )

    with pytest.raises(InvalidRequestError, match="chain ends at node"):
        shard(decoder, other, 0, 1)


def test_a_graph_without_weights_is_one_block() -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [1, "T"])],
        [info("y", TensorProto.FLOAT, [1, "T"])],
    )

    chain = blocks(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))

    assert len(chain) == 1
    assert chain[0].tensors == ()


def test_a_product_keeps_its_activation() -> None:
    """Nothing crosses between a product and what is computed element by element from it."""
    nodes = []
    weights = []
    x = "x"
    for i in range(4):
        weights.append(numpy_helper.from_array(noise((8, 8), i).astype(np.float32), f"w{i}"))
        nodes += [helper.make_node("MatMul", [x, f"w{i}"], [f"a{i}"]), helper.make_node("Relu", [f"a{i}"], [f"r{i}"])]
        x = f"r{i}"
    info = helper.make_tensor_value_info
    ends = [info("x", TensorProto.FLOAT, [1, 8])], [info("r3", TensorProto.FLOAT, [1, 8])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *ends, weights), opset_imports=[helper.make_opsetid("", 17)]
    )

    assert [b.outputs[0].name for b in blocks(model)] == ["r0", "r1", "r2", "r3"]
