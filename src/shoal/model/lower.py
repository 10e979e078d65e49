"""Lowering: from the canonical graph to the one that ONNX Runtime runs fast on a CPU.

A pure, named, versioned pass.  Every call of a canonical function is replaced in its place:

- products in blocks become `MatMulNBits`; products of one input and one format (q, k, v; gate, up) become one.  Its fast kernel
  has no float zero points, so an affine block d * q + m is split into d * (q - z) and an offset, which is multiplied by the sum
  of the block's inputs (`shoal.model.products`);
- `CachedAttention` becomes `GroupQueryAttention` with rotation inside, taking q, k and v packed when they come out of one product;
  the engine rotates multiples of 16 dimensions only and says so at the first step, so that the lowering refuses others;
- norms become `SimplifiedLayerNormalization`, SiLU `QuickGelu(alpha=1)`; embeddings stay functions of standard operators.

Nothing is fused across the residual stream (ADR 1): the nodes between two residual additions depend on each other alone, so that
a shard is lowered to exactly the nodes that the whole model has there, and the cut changes no bit.  Graphs that are not canonical
pass through unchanged.
"""

from collections import Counter
from dataclasses import dataclass

import msgspec
import onnx
from onnx import TensorProto, helper

from shoal.errors import UnsupportedModelError
from shoal.model.derive import Derivation
from shoal.model.emit import MICROSOFT, Emitter, attribute
from shoal.model.functions import CACHED_ATTENTION, DOMAIN, SILU, UNBOUNDED
from shoal.model.products import Rounding, Stack, emit_stack, stacks_of
from shoal.model.spec import LOGITS, PAST_PREFIX, PRESENT_PREFIX, SEQLENS_K, TOTAL_SEQUENCE_LENGTH

VERSION = 4
ROTATED_MULTIPLE = 16
"""What the size of a head, and how much of it is rotated, must be whole multiples of (ONNX Runtime, CPU)."""


class Lowering(msgspec.Struct, frozen=True, kw_only=True):
    """Choices of a lowering.  `accuracy_level` 4 rounds activations to int8 per block, 0 keeps fp32 (slow with 8-bit weights)."""

    name: str
    accuracy_level: int


def lowering_named(target: str) -> Lowering:
    """`cpu` is what is served; `cpu-exact` keeps activations in fp32.  Raises UnsupportedModelError for another target."""
    levels = {"cpu": 4, "cpu-exact": 0}
    if target not in levels:
        raise UnsupportedModelError(f"no lowering for {target!r}", hint=f"choose one of {', '.join(levels)}")
    return Lowering(name=f"{target}/{VERSION}", accuracy_level=levels[target])


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph for one engine.  `derived` are those of its initializers that the canonical model does not hold."""

    name: str
    graph: onnx.ModelProto
    derived: tuple[Derivation, ...]


def lower(graph: onnx.ModelProto, *, target: str = "cpu", context_tokens: int | None = None) -> Lowered:
    """Lower a canonical graph, or a piece of one cut at the residual stream.

    `context_tokens` bounds the rotary tables (default: what the model was made for).  Raises UnsupportedModelError for a
    target that we do not know, and for attention that its engine cannot run.
    """
    lowering = lowering_named(target)
    if DOMAIN not in {node.domain for node in graph.graph.node}:
        return Lowered(lowering.name, graph, ())
    source = graph.graph
    check_attention(source)
    emitter = Emitter(source, {t.name: tuple(t.dims) for t in source.initializer})
    stacks = stacks_of(source)
    packed = _packed_attention(source, stacks)
    first_calls = {stack.first.call: stack for stack in stacks}
    taken_in = {name for stack in stacks for product in stack.products for name in (product.call, product.output)}
    for node in source.node:
        if stack := first_calls.get(node.output[0]):
            fine = lowering.accuracy_level > 0 and stack.output == LOGITS
            rounding = Rounding(accuracy_level=lowering.accuracy_level, fine=fine)
            emit_stack(emitter, stack, rounding=rounding, split=stack not in packed.values())
        elif node.output[0] in taken_in:
            continue
        elif node.domain == DOMAIN and node.op_type == CACHED_ATTENTION:
            _attention(emitter, node, packed.get(node.name), context_tokens)
        else:
            _other(emitter, node)
    return Lowered(lowering.name, _finished(emitter, graph), tuple(emitter.derived.values()))


def _packed_attention(graph: onnx.GraphProto, stacks: list[Stack]) -> dict[str, Stack]:
    """Calls of CachedAttention (by name) that alone consume one stack, as q, k and v in this order."""
    uses = Counter(name for node in graph.node for name in node.input)
    by_outputs = {tuple(p.output for p in stack.products): stack for stack in stacks}
    calls = [node for node in graph.node if node.domain == DOMAIN and node.op_type == CACHED_ATTENTION]
    return {
        node.name: by_outputs[tuple(node.input[:3])]
        for node in calls
        if tuple(node.input[:3]) in by_outputs and all(uses[name] == 1 for name in node.input[:3])
    }


def check_attention(graph: onnx.GraphProto) -> None:
    """Raise UnsupportedModelError for canonical attention that the engine cannot run."""
    head_dims = {
        i.name: i.type.tensor_type.shape.dim[-1].dim_value for i in graph.input if i.name.startswith(PAST_PREFIX)
    }
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == CACHED_ATTENTION:
            head_dim, rotary_dims = head_dims[node.input[3]], int(attribute(node, "rotary_dims"))
            if head_dim % ROTATED_MULTIPLE or rotary_dims % ROTATED_MULTIPLE:
                raise UnsupportedModelError(
                    f"{node.name} has head_dim {head_dim}, of which {rotary_dims} are rotated; the engine's attention on a CPU "
                    f"needs multiples of {ROTATED_MULTIPLE}",
                    hint="choose another model of this family: most have heads of 64, 80, 96 or 128",
                )


def _attention(emitter: Emitter, node: onnx.NodeProto, packed: Stack | None, context_tokens: int | None) -> None:
    q, k, v, past_key, past_value, _, inv_freq = node.input
    positions = context_tokens or int(attribute(node, "max_positions"))
    window = int(attribute(node, "window"))
    shape = (positions, emitter.shapes[inv_freq][0])
    scale = attribute(node, "rotary_scale")
    tables = [
        emitter.derive(f"{inv_freq}.{kind}.{positions}", f"{kind}:{positions}:{scale!r}", [inv_freq], shape)
        for kind in ("cos", "sin")
    ]
    query = [packed.output, "", ""] if packed else [q, k, v]
    emitter.node(
        "GroupQueryAttention",
        [*query, past_key, past_value, SEQLENS_K, TOTAL_SEQUENCE_LENGTH, *tables],
        node.output,
        domain=MICROSOFT,
        num_heads=int(attribute(node, "heads")),
        kv_num_heads=int(attribute(node, "kv_heads")),
        scale=attribute(node, "scale"),
        do_rotary=1,
        rotary_interleaved=int(attribute(node, "interleaved")),
        local_window_size=-1 if window == UNBOUNDED else window,
        softcap=attribute(node, "softcap"),
    )


def _other(emitter: Emitter, node: onnx.NodeProto) -> None:
    if node.domain == DOMAIN and node.op_type == SILU:
        emitter.node("QuickGelu", node.input, node.output, domain=MICROSOFT, alpha=1.0)
    elif node.domain == "" and node.op_type == "RMSNormalization":
        emitter.node(
            "SimplifiedLayerNormalization", node.input, node.output, axis=-1, epsilon=attribute(node, "epsilon")
        )
    else:
        emitter.copy(node)


def _finished(emitter: Emitter, original: onnx.ModelProto) -> onnx.ModelProto:
    """Past and present become one buffer of M positions; the lengths say how much of it is filled."""
    model = emitter.model(original)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith((PAST_PREFIX, PRESENT_PREFIX)):
            value.type.tensor_type.shape.dim[2].dim_param = "M"
    if any(node.op_type == "GroupQueryAttention" for node in model.graph.node):
        model.graph.input.append(helper.make_tensor_value_info(SEQLENS_K, TensorProto.INT32, (1,)))
        model.graph.input.append(helper.make_tensor_value_info(TOTAL_SEQUENCE_LENGTH, TensorProto.INT32, ()))
    return model
