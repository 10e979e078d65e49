"""The canonical graph of a BERT-type encoder.

    input_ids, attention_mask, token_type_ids   int64 [B, T]
    last_hidden_state                           float [B, T, hidden]

The token vectors `[B, T, hidden]` are the only tensor between two sublayers: the square mask is cheap and comes from an input,
so that every shard derives its own (`shoal.model.graph`) and only the attention mask travels.  Pooling and normalisation are
facts of the spec, not nodes: whoever wants token vectors (late interaction, tagging) gets them.  Tensors keep the names of the
checkpoint.
"""

from collections.abc import Mapping

import msgspec
import onnx

from shoal.model.affine import Format
from shoal.model.canonical import GraphWriter, Shape
from shoal.model.functions import EMBEDDING, LINEAR
from shoal.model.spec import ATTENTION_MASK, INPUT_IDS

TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - no password
MASK = "mask"
LAST_HIDDEN_STATE = "last_hidden_state"
WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
"""By the name in `hidden_act`: operator and attributes."""


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the graph depends on, under the names of config.json; absent keys have the defaults of Transformers' BertConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 30_522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False


def matrix_shapes(c: EncoderConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes [outputs, inputs] of the weights that may be stored in blocks."""
    square = (c.hidden_size, c.hidden_size)
    layer = {f"attention.self.{part}": square for part in ("query", "key", "value")} | {
        "attention.output.dense": square,
        "intermediate.dense": (c.intermediate_size, c.hidden_size),
        "output.dense": (c.hidden_size, c.intermediate_size),
    }
    return {WORDS: (c.vocab_size, c.hidden_size)} | {
        f"encoder.layer.{i}.{name}.weight": shape for i in range(c.num_hidden_layers) for name, shape in layer.items()
    }


def float_shapes(c: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is always fp32: biases, norms and the two small tables."""
    norms = ["embeddings.LayerNorm"]
    for i in range(c.num_hidden_layers):
        norms += [f"encoder.layer.{i}.attention.output.LayerNorm", f"encoder.layer.{i}.output.LayerNorm"]
    shapes: dict[str, tuple[int, ...]] = {
        POSITIONS: (c.max_position_embeddings, c.hidden_size),
        TYPES: (c.type_vocab_size, c.hidden_size),
    }
    shapes |= {f"{norm}.{part}": (c.hidden_size,) for norm in norms for part in ("weight", "bias")}
    products = {name: shape for name, shape in matrix_shapes(c).items() if name != WORDS}
    return shapes | {name.removesuffix("weight") + "bias": (shape[0],) for name, shape in products.items()}


def build(c: EncoderConfig, formats: Mapping[str, Format]) -> onnx.ModelProto:
    """Build the graph; `formats` says how each matrix of `matrix_shapes` is stored (absent: fp32), all are external stubs."""
    g = GraphWriter(matrix_shapes(c), formats)
    for name in (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS):
        g.input(name, ("B", "T"), dtype="int64")
    _mask(g)
    x = _embed(g, c)
    for layer in range(c.num_hidden_layers):
        at = f"encoder.layer.{layer}."
        x = _add_norm(g, c, f"{at}attention.output", (x, _attention(g, c, at, x)), f"{at}attention.out")
        output = LAST_HIDDEN_STATE if layer == c.num_hidden_layers - 1 else f"{at}out"
        x = _add_norm(g, c, f"{at}output", (x, _feed_forward(g, c, at, x)), output)
    g.output(LAST_HIDDEN_STATE, _hidden(c))
    return g.model()


def _hidden(c: EncoderConfig) -> Shape:
    return ("B", "T", c.hidden_size)


def _embed(g: GraphWriter, c: EncoderConfig) -> str:
    hidden = _hidden(c)
    words = g.weighted(EMBEDDING, INPUT_IDS, WORDS, "embeddings.words", ("B", "T"))
    types = g.node(
        "Gather", [g.stub(TYPES, (c.type_vocab_size, c.hidden_size)), TOKEN_TYPE_IDS], "embeddings.types", hidden
    )
    table = g.stub(POSITIONS, (c.max_position_embeddings, c.hidden_size))
    length = _untyped(g, "Shape", [INPUT_IDS], "embeddings.length", start=1, end=2)
    places = g.node("Slice", [table, g.integers("zero", (0,)), length], "embeddings.positions", ("T", c.hidden_size))
    tokens = g.node("Add", [words, types], "embeddings.tokens", hidden)
    return _norm(
        g, c, "embeddings.LayerNorm", g.node("Add", [tokens, places], "embeddings.sum", hidden), "embeddings.out"
    )


def _mask(g: GraphWriter) -> None:
    """Bool [B, 1, T, T]: which keys each query sees.  The engine wants the query axis spelled out; a comparison that always holds
    gives it without `Shape`, whose result would travel as one more tensor.
    """
    seen = _untyped(g, "Cast", [ATTENTION_MASK], "mask.seen", to=onnx.TensorProto.BOOL)
    keys = _untyped(g, "Unsqueeze", [seen, g.integers("mask.key_axes", (1, 2))], "mask.keys")
    queries = _untyped(g, "Unsqueeze", [ATTENTION_MASK, g.integers("mask.query_axes", (1, 3))], "mask.queries")
    every = _untyped(g, "Equal", [queries, queries], "mask.every_query")
    _untyped(g, "And", [keys, every], MASK)


def _attention(g: GraphWriter, c: EncoderConfig, at: str, x: str) -> str:
    q, k, v = (_linear(g, f"{at}attention.self.{part}", x) for part in ("query", "key", "value"))
    heads = {"q_num_heads": c.num_attention_heads, "kv_num_heads": c.num_attention_heads}
    y = g.node("Attention", [q, k, v, MASK], f"{at}attention.self", _hidden(c), **heads)
    return _linear(g, f"{at}attention.output.dense", y)


def _feed_forward(g: GraphWriter, c: EncoderConfig, at: str, x: str) -> str:
    inner = _linear(g, f"{at}intermediate.dense", x)
    operator_name, attributes = ACTIVATIONS[c.hidden_act]
    active = g.node(operator_name, [inner], f"{at}intermediate.active", ("B", "T", c.intermediate_size), **attributes)
    return _linear(g, f"{at}output.dense", active)


def _linear(g: GraphWriter, name: str, x: str) -> str:
    """Product and bias."""
    rows = g.matrices[f"{name}.weight"][0]
    y = g.weighted(LINEAR, x, f"{name}.weight", f"{name}.product", ("B", "T"))
    return g.node("Add", [y, g.stub(f"{name}.bias", (rows,))], name, ("B", "T", rows))


def _add_norm(g: GraphWriter, c: EncoderConfig, name: str, branches: tuple[str, str], output: str) -> str:
    """Normalise the sum of the residual and a sublayer's result."""
    return _norm(g, c, f"{name}.LayerNorm", g.node("Add", list(branches), f"{name}.sum", _hidden(c)), output)


def _norm(g: GraphWriter, c: EncoderConfig, name: str, x: str, output: str) -> str:
    scale, bias = (g.stub(f"{name}.{part}", (c.hidden_size,)) for part in ("weight", "bias"))
    return g.node("LayerNormalization", [x, scale, bias], output, _hidden(c), axis=-1, epsilon=c.layer_norm_eps)


def _untyped(g: GraphWriter, op: str, inputs: list[str], output: str, **attributes: int) -> str:
    """Add a node whose result is not fp32: shape inference finds its type."""
    node = onnx.helper.make_node(op, inputs, [output], name=output)
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
    g.graph.node.append(node)
    return output
