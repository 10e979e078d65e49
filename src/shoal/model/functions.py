"""The operators of the canonical graph that the standard lacks, as ONNX functions with bodies in standard operators.

A model that carries these definitions runs in any engine of opset 23 (slowly: weights are dequantised at every step), which makes
it the reference of every lowering; a lowering in turn replaces a call one for one and never has to recognise a pattern.
Rejected: writing the bodies out in the graph (pattern matching, 30 nodes per product), and engine operators in the canonical
graph (ADR 1: the artifact is engine-neutral).

    Linear(x, w)                            x [1, T, K] times the transpose of w [N, K]
    BlockLinear<bits>(x, q, d)              the same, w in blocks (shoal.model.affine)
    AffineLinear<bits>(x, q, d, m)
    Embedding(ids, w), BlockEmbedding<bits>(ids, q, d), AffineEmbedding<bits>(ids, q, d, m)     rows of w: [1, T, K]
    Silu(x)                                 x * sigmoid(x)
    CachedAttention(q, k, v, past_key, past_value, position_ids, inv_freq) -> y, present_key, present_value
                                            q [1, T, heads * head_dim], k and v [1, T, kv_heads * head_dim]; rotates q and k;
                                            a query sees itself and the `window` - 1 positions before it
"""

from collections.abc import Iterable

import onnx
from onnx import parser

from shoal.model.affine import Blocked, Dense, Format

DOMAIN = "shoal"
OPSET = 23
UNBOUNDED = 2**31 - 1
"""The `window` of a layer that sees everything."""

LINEAR = "Linear"
EMBEDDING = "Embedding"
SILU = "Silu"
CACHED_ATTENTION = "CachedAttention"


def operator(kind: str, form: Format) -> str:
    """Name of the variant of LINEAR or EMBEDDING for a weight format, e.g. `AffineLinear4`."""
    match form:
        case Dense():
            return kind
        case Blocked(affine=affine, bits=bits):
            return f"{'Affine' if affine else 'Block'}{kind}{bits}"


def definitions(operators: Iterable[str]) -> list[onnx.FunctionProto]:
    """Definitions of the named operators, in the order of their names."""
    sources = _sources()
    return [
        parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{sources[op]}')
        for op in sorted(operators)
    ]


def _sources() -> dict[str, str]:
    sources = {LINEAR: _DENSE_LINEAR, EMBEDDING: _DENSE_EMBEDDING, SILU: _SILU, CACHED_ATTENTION: _CACHED_ATTENTION}
    for bits in (4, 8):
        for affine in (False, True):
            prefix = "Affine" if affine else "Block"
            sources[f"{prefix}{LINEAR}{bits}"] = _blocked_linear(f"{prefix}{LINEAR}{bits}", bits, affine=affine)
            sources[f"{prefix}{EMBEDDING}{bits}"] = _blocked_embedding(
                f"{prefix}{EMBEDDING}{bits}", bits, affine=affine
            )
    return sources


def _dequantise(bits: int, *, affine: bool, lead: str) -> str:
    """Text that turns q, d (and m) into `w` with the last two axes joined; `lead` are Reshape's codes for the axes before those."""
    unpack = _UNPACK_4.replace("LEAD", lead) if bits == 4 else "  u = Identity(q)\n"
    offset = (
        "  m1 = Cast<to = 1>(m)\n  m2 = Unsqueeze(m1, last)\n  b = Add(a, m2)\n" if affine else "  b = Identity(a)\n"
    )
    return unpack + _SCALE + offset + f"  joined = Constant<value_ints = [{lead}, -1]>()\n  w = Reshape(b, joined)\n"


def _blocked_linear(name: str, bits: int, *, affine: bool) -> str:
    body = _dequantise(bits, affine=affine, lead="0")
    arrays = "q, d, m" if affine else "q, d"
    return (
        f"{name} <zero_point>(x, {arrays}) => (y) {{\n{body}  t = Transpose<perm = [1, 0]>(w)\n  y = MatMul(x, t)\n}}"
    )


def _blocked_embedding(name: str, bits: int, *, affine: bool) -> str:
    arrays = "qdm" if affine else "qd"
    tables = ", ".join(f"all_{a}" for a in arrays)
    gathers = "".join(f"  {a} = Gather<axis = 0>(all_{a}, ids)\n" for a in arrays)
    body = _dequantise(bits, affine=affine, lead="0, 0")
    return f"{name} <zero_point>(ids, {tables}) => (y) {{\n{gathers}{body}  y = Identity(w)\n}}"


_UNPACK_4 = """\
  mask = Constant<value = uint8 {15}>()
  four = Constant<value = uint8 {4}>()
  even = BitwiseAnd(q, mask)
  odd = BitShift<direction = "RIGHT">(q, four)
  axis = Constant<value_ints = [-1]>()
  even1 = Unsqueeze(even, axis)
  odd1 = Unsqueeze(odd, axis)
  pairs = Concat<axis = -1>(even1, odd1)
  row = Constant<value_ints = [LEAD, 0, -1]>()
  u = Reshape(pairs, row)
"""

_SCALE = """\
  last = Constant<value_ints = [-1]>()
  n = Cast<to = 1>(u)
  z = Constant<value_float: float = @zero_point>()
  c = Sub(n, z)
  d1 = Cast<to = 1>(d)
  d2 = Unsqueeze(d1, last)
  a = Mul(c, d2)
"""

_DENSE_LINEAR = """\
Linear(x, w) => (y) {
  f = Cast<to = 1>(w)
  t = Transpose<perm = [1, 0]>(f)
  y = MatMul(x, t)
}"""

_DENSE_EMBEDDING = """\
Embedding(ids, w) => (y) {
  rows = Gather<axis = 0>(w, ids)
  y = Cast<to = 1>(rows)
}"""

_SILU = """\
Silu(x) => (y) {
  s = Sigmoid(x)
  y = Mul(x, s)
}"""

# Key positions are 0 .. P + T - 1 and position_ids those of the queries, so the mask is the same whatever the step's size.
_CACHED_ATTENTION = """\
CachedAttention <heads, kv_heads, scale, interleaved, rotary_dims, rotary_scale, window, softcap, max_positions>
(q, k, v, past_key, past_value, position_ids, inv_freq) => (y, present_key, present_value) {
  last = Constant<value_ints = [-1]>()
  first = Constant<value_ints = [0]>()
  p = Cast<to = 1>(position_ids)
  p1 = Unsqueeze(p, last)
  angle = Mul(p1, inv_freq)
  factor = Constant<value_float: float = @rotary_scale>()
  c = Cos(angle)
  s = Sin(angle)
  cos = Mul(c, factor)
  sin = Mul(s, factor)
  rq = RotaryEmbedding
    <num_heads: int = @heads, interleaved: int = @interleaved, rotary_embedding_dim: int = @rotary_dims>(q, cos, sin)
  rk = RotaryEmbedding
    <num_heads: int = @kv_heads, interleaved: int = @interleaved, rotary_embedding_dim: int = @rotary_dims>(k, cos, sin)
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  past = Shape<start = 2, end = 3>(past_key)
  new = Shape<start = 1, end = 2>(q)
  both = Add(past, new)
  total = Squeeze(both)
  keys = Range(zero, total, one)
  queries = Squeeze(position_ids, first)
  queries1 = Unsqueeze(queries, last)
  distance = Sub(queries1, keys)
  reach = Constant<value_int: int = @window>()
  near = Less(distance, reach)
  causal = GreaterOrEqual(distance, zero)
  mask = And(near, causal)
  y, present_key, present_value = Attention
    <q_num_heads: int = @heads, kv_num_heads: int = @kv_heads, scale: float = @scale, softcap: float = @softcap>
    (rq, rk, v, mask, past_key, past_value)
}"""
