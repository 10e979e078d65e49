"""The canonical graph of a decoder-only transformer, from a description that no file format owns.

Tensors have the names of GGUF (`blk.0.attn_q.weight`), matrices the shape [outputs, inputs].  Importers translate their files to
`TransformerConfig` and these names; differences between architectures are values of the description, not code paths by name.
The only tensor alive between two sublayers is the residual stream `[1, T, hidden]`: these are the cuts.
"""

import math
from collections.abc import Mapping
from enum import StrEnum

import msgspec
import onnx

from shoal.model.affine import Format
from shoal.model.canonical import GraphWriter, Shape
from shoal.model.functions import CACHED_ATTENTION, EMBEDDING, LINEAR, SILU, UNBOUNDED
from shoal.model.rope import Rope, attention_factor
from shoal.model.spec import INPUT_IDS, LOGIT_ROWS, LOGITS, PAST_PREFIX, POSITION_IDS, PRESENT_PREFIX

EMBEDDING_WEIGHT = "token_embd.weight"
HEAD_WEIGHT = "output.weight"
INV_FREQ = "rope.inv_freq"
LOCAL_INV_FREQ = "rope_local.inv_freq"


class Activation(StrEnum):
    """Of the gate in the feed-forward layer."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the graph depends on, except the formats of the weights.

    Norms multiply by their weight as stored: an importer of a format that stores gemma's `weight - 1` adds the 1.
    `sliding_layers` see themselves and `window` - 1 positions before, and rotate by `local_rope` if there is one.
    """

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int
    norm_epsilon: float
    rope: Rope
    local_rope: Rope | None = None
    window: int = 0
    sliding_layers: tuple[int, ...] = ()
    attention_scale: float | None = None
    """None: 1 / sqrt(head_dim)."""
    attention_bias: bool = False
    """On q, k and v (qwen2)."""
    qk_norm: bool = False
    """RMS norm of each head of q and k before rotation (qwen3, gemma3)."""
    post_norms: bool = False
    """Norms of a sublayer's output before the residual addition (gemma3)."""
    activation: Activation = Activation.SILU
    embedding_scale: float = 1.0
    tied_embedding: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0

    @property
    def rotations(self) -> dict[str, Rope]:
        """Tensors of inverse frequencies that the graph takes; their values: `rope.inverse_frequencies`."""
        ropes = {INV_FREQ: self.rope}
        return ropes | {LOCAL_INV_FREQ: self.local_rope} if self.local_rope and self.sliding_layers else ropes


def matrix_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes [outputs, inputs] of the weights that may be stored in blocks."""
    c = config
    layer = {
        "attn_q": (c.heads * c.head_dim, c.hidden),
        "attn_k": (c.kv_heads * c.head_dim, c.hidden),
        "attn_v": (c.kv_heads * c.head_dim, c.hidden),
        "attn_output": (c.hidden, c.heads * c.head_dim),
        "ffn_gate": (c.ffn, c.hidden),
        "ffn_up": (c.ffn, c.hidden),
        "ffn_down": (c.hidden, c.ffn),
    }
    shapes = {EMBEDDING_WEIGHT: (c.vocabulary, c.hidden)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(c.layers) for name, shape in layer.items()}
    return shapes if c.tied_embedding else shapes | {HEAD_WEIGHT: (c.vocabulary, c.hidden)}


def vector_sizes(config: TransformerConfig) -> dict[str, int]:
    """Names and sizes of the fp32 vectors that come from the file: norms and biases."""
    c = config
    layer = {"attn_norm.weight": c.hidden, "ffn_norm.weight": c.hidden}
    if c.attention_bias:
        layer |= {"attn_q.bias": c.heads * c.head_dim} | dict.fromkeys(
            ("attn_k.bias", "attn_v.bias"), c.kv_heads * c.head_dim
        )
    if c.qk_norm:
        layer |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), c.head_dim)
    if c.post_norms:
        layer |= dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), c.hidden)
    return {f"blk.{i}.{name}": size for i in range(c.layers) for name, size in layer.items()} | {
        "output_norm.weight": c.hidden
    }


def build(config: TransformerConfig, formats: Mapping[str, Format]) -> onnx.ModelProto:
    """Build the canonical graph; `formats` says how each matrix of `matrix_shapes` is stored (absent: fp32).

    Initializers are stubs for external data, named as in `shoal.model.affine`; so are the vectors of `vector_sizes` (fp32) and
    the inverse frequencies of `config.rotations` (fp32 [dims / 2]).
    """
    g = GraphWriter(matrix_shapes(config), formats)
    for name, rope in config.rotations.items():
        g.stub(name, (rope.dims // 2,))
    x = _embed(g, config)
    for layer in range(config.layers):
        x = _feed_forward(g, config, layer, _attention(g, config, layer, x))
    _head(g, config, x)
    return g.model()


def _norm(g: GraphWriter, c: TransformerConfig, x: str, weight: str, shape: Shape) -> str:
    """RMS norm over the last axis; the output is named after its weight."""
    size = shape[-1]
    assert isinstance(size, int)
    output = weight.removesuffix(".weight") + ".out"
    return g.node("RMSNormalization", [x, g.stub(weight, (size,))], output, shape, axis=-1, epsilon=c.norm_epsilon)


def _embed(g: GraphWriter, c: TransformerConfig) -> str:
    ids = g.input(INPUT_IDS, (1, "T"), dtype="int64")
    g.input(POSITION_IDS, (1, "T"), dtype="int64")
    x = g.weighted(EMBEDDING, ids, EMBEDDING_WEIGHT, "embedding", (1, "T"))
    if c.embedding_scale == 1.0:
        return x
    scale = g.scalar("embedding_scale", c.embedding_scale)
    return g.node("Mul", [x, scale], "scaled_embedding", (1, "T", c.hidden))


def _attention(g: GraphWriter, c: TransformerConfig, layer: int, x: str) -> str:
    at = f"blk.{layer}."
    hidden = (1, "T", c.hidden)
    normed = _norm(g, c, x, at + "attn_norm.weight", hidden)
    q = _projection(g, c, at + "attn_q", normed, c.heads)
    k = _projection(g, c, at + "attn_k", normed, c.kv_heads)
    v = _projection(g, c, at + "attn_v", normed, c.kv_heads)
    if c.qk_norm:
        q = _head_norm(g, c, at + "attn_q", q, c.heads)
        k = _head_norm(g, c, at + "attn_k", k, c.kv_heads)
    y = _cached_attention(g, c, layer, (q, k, v))
    out = g.weighted(LINEAR, y, at + "attn_output.weight", at + "attn_output", (1, "T"))
    if c.post_norms:
        out = _norm(g, c, out, at + "post_attention_norm.weight", hidden)
    return g.node("Add", [x, out], at + "attn_residual", hidden)


def _projection(g: GraphWriter, c: TransformerConfig, name: str, x: str, heads: int) -> str:
    size = heads * c.head_dim
    y = g.weighted(LINEAR, x, f"{name}.weight", name, (1, "T"))
    if not c.attention_bias:
        return y
    return g.node("Add", [y, g.stub(f"{name}.bias", (size,))], f"{name}_biased", (1, "T", size))


def _head_norm(g: GraphWriter, c: TransformerConfig, name: str, x: str, heads: int) -> str:
    dim = c.head_dim
    by_head = (1, "T", heads, dim)
    split = g.node("Reshape", [x, g.integers(f"heads.{heads}", (0, 0, heads, dim))], f"{name}_heads", by_head)
    normed = _norm(g, c, split, f"{name}_norm.weight", by_head)
    return g.node("Reshape", [normed, g.integers("joined_heads", (0, 0, -1))], f"{name}_normed", (1, "T", heads * dim))


def _cached_attention(g: GraphWriter, c: TransformerConfig, layer: int, qkv: tuple[str, str, str]) -> str:
    at = f"blk.{layer}."
    sliding = layer in c.sliding_layers
    local = sliding and c.local_rope is not None
    rope = c.local_rope if local and c.local_rope else c.rope
    past = [g.input(f"{PAST_PREFIX}{layer}.{part}", (1, c.kv_heads, "P", c.head_dim)) for part in ("key", "value")]
    y = g.call(
        CACHED_ATTENTION,
        [*qkv, *past, POSITION_IDS, LOCAL_INV_FREQ if local else INV_FREQ],
        at + "attn",
        (1, "T", c.heads * c.head_dim),
        heads=c.heads,
        kv_heads=c.kv_heads,
        scale=c.attention_scale if c.attention_scale is not None else 1 / math.sqrt(c.head_dim),
        interleaved=int(rope.interleaved),
        rotary_dims=rope.dims,
        rotary_scale=attention_factor(rope),
        window=c.window if sliding else UNBOUNDED,
        softcap=c.attention_softcap,
        max_positions=c.context_tokens,
    )
    presents = [
        g.output(f"{PRESENT_PREFIX}{layer}.{part}", (1, c.kv_heads, "P+T", c.head_dim)) for part in ("key", "value")
    ]
    g.graph.node[-1].output.extend(presents)
    return y


def _feed_forward(g: GraphWriter, c: TransformerConfig, layer: int, x: str) -> str:
    at = f"blk.{layer}."
    hidden, inner = (1, "T", c.hidden), (1, "T", c.ffn)
    normed = _norm(g, c, x, at + "ffn_norm.weight", hidden)
    gate = g.weighted(LINEAR, normed, at + "ffn_gate.weight", at + "ffn_gate", (1, "T"))
    up = g.weighted(LINEAR, normed, at + "ffn_up.weight", at + "ffn_up", (1, "T"))
    match c.activation:
        case Activation.SILU:
            active = g.call(SILU, [gate], at + "ffn_active", inner)
        case Activation.GELU_TANH:
            active = g.node("Gelu", [gate], at + "ffn_active", inner, approximate="tanh")
    product = g.node("Mul", [active, up], at + "ffn_product", inner)
    out = g.weighted(LINEAR, product, at + "ffn_down.weight", at + "ffn_down", (1, "T"))
    if c.post_norms:
        out = _norm(g, c, out, at + "post_ffw_norm.weight", hidden)
    return g.node("Add", [x, out], at + "ffn_residual", hidden)


def _head(g: GraphWriter, c: TransformerConfig, x: str) -> None:
    logits = (1, "R", c.vocabulary)
    rows = g.node("Gather", [x, g.input(LOGIT_ROWS, ("R",), dtype="int64")], "logit_hidden", (1, "R", c.hidden), axis=1)
    normed = _norm(g, c, rows, "output_norm.weight", (1, "R", c.hidden))
    weight = EMBEDDING_WEIGHT if c.tied_embedding else HEAD_WEIGHT
    capped = c.logit_softcap > 0
    y = g.weighted(LINEAR, normed, weight, "logits_uncapped" if capped else LOGITS, (1, "R"))
    if capped:
        cap = g.scalar("logit_softcap", c.logit_softcap)
        flat = g.node("Tanh", [g.node("Div", [y, cap], "logits_scaled", logits)], "logits_flat", logits)
        g.node("Mul", [flat, cap], LOGITS, logits)
    g.output(LOGITS, logits)
