"""What an ONNX graph says about itself: which kind of model it is, and its sizes.

The kind follows from names alone: the convention of `shoal.model.spec` makes a causal model, token ids and a mask in and vectors
per token out make an encoder, anything else maps tensors to tensors.  Facts that a graph does not state (context, end tokens)
come from config.json and its neighbours where the folder has them.
"""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import onnx

from shoal.model.hf_encoder import pooling_of
from shoal.model.sidecars import adds_bos, carried_files, licence_of, read_object, token_ids
from shoal.model.spec import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST_PREFIX, PRESENT_PREFIX, ModelKind, ModelSpec

_QUANTISATIONS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
}
"""By the element type of most weight bytes."""
_TOKEN_VECTORS_RANK = 3


def describe(model: onnx.ModelProto, folder: Path, name: str) -> ModelSpec:
    """Specification of the graph; *folder* is where its file lies."""
    match kind_of(model.graph):
        case ModelKind.CAUSAL_LM:
            return _causal(model, folder, name)
        case ModelKind.ENCODER:
            return _encoder(model, folder, name)
        case ModelKind.TENSOR:
            return ModelSpec(
                name=name,
                kind=ModelKind.TENSOR,
                architecture="onnx",
                licence=licence_of(folder),
                parameters=_parameters(model.graph),
                quantisation=_quantisation(model.graph),
            )


def kind_of(graph: onnx.GraphProto) -> ModelKind:
    """Which kind of model has these inputs and outputs."""
    inputs, outputs = {v.name for v in graph.input}, {v.name for v in graph.output}
    past = {n.removeprefix(PAST_PREFIX) for n in inputs if n.startswith(PAST_PREFIX)}
    present = {n.removeprefix(PRESENT_PREFIX) for n in outputs if n.startswith(PRESENT_PREFIX)}
    if INPUT_IDS in inputs and LOGITS in outputs and past and past == present:
        return ModelKind.CAUSAL_LM
    vectors = _token_vectors(graph)
    if {INPUT_IDS, ATTENTION_MASK} <= inputs and not past and vectors is not None and LOGITS not in outputs:
        return ModelKind.ENCODER
    return ModelKind.TENSOR


def _token_vectors(graph: onnx.GraphProto) -> onnx.ValueInfoProto | None:
    """The first output that has one vector per token."""
    return next((v for v in graph.output if len(v.type.tensor_type.shape.dim) == _TOKEN_VECTORS_RANK), None)


def _causal(model: onnx.ModelProto, folder: Path, name: str) -> ModelSpec:
    config, generation = _config(folder), read_object(folder / "generation_config.json")
    caches = [v for v in model.graph.input if v.name.startswith(PAST_PREFIX)]
    _, kv_heads, _, head_dim = ([*_sizes(caches[0]), 0, 0, 0, 0])[:4]
    logits = next(v for v in model.graph.output if v.name == LOGITS)
    bos = next(iter(token_ids(generation.get("bos_token_id", config.get("bos_token_id")))), None)
    return ModelSpec(
        name=name,
        kind=ModelKind.CAUSAL_LM,
        architecture=str(config.get("model_type", "onnx")),
        licence=licence_of(folder),
        parameters=_parameters(model.graph),
        context_tokens=_number(config, "max_position_embeddings"),
        vocabulary=_sizes(logits)[-1] or _number(config, "vocab_size"),
        hidden=_number(config, "hidden_size"),
        layers=len({v.name.split(".")[1] for v in caches}),
        kv_heads=kv_heads,
        head_dim=head_dim,
        bos_token_id=bos,
        eos_token_ids=token_ids(generation.get("eos_token_id")) or token_ids(config.get("eos_token_id")),
        add_bos=adds_bos(carried_files(folder), bos),
        quantisation=_quantisation(model.graph),
    )


def _encoder(model: onnx.ModelProto, folder: Path, name: str) -> ModelSpec:
    config, vectors = _config(folder), _token_vectors(model.graph)
    pooling, normalise = pooling_of(folder)
    return ModelSpec(
        name=name,
        kind=ModelKind.ENCODER,
        architecture=str(config.get("model_type", "onnx")),
        licence=licence_of(folder),
        parameters=_parameters(model.graph),
        context_tokens=_number(config, "max_position_embeddings"),
        vocabulary=_number(config, "vocab_size"),
        hidden=_sizes(vectors)[-1] if vectors else 0,
        layers=_number(config, "num_hidden_layers"),
        pooling=pooling,
        normalise=normalise,
        quantisation=_quantisation(model.graph),
    )


def _config(folder: Path) -> dict[str, Any]:
    said = read_object(folder / "config.json")
    nested = said.get("text_config")
    return nested | said if isinstance(nested, dict) else said


def _number(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes of the axes, 0 for a dynamic one."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _block_products(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, dict[str, int]]]:
    """Products with weights in blocks, whose arrays are packed: their attributes tell the sizes."""
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    return [(n, {a.name: a.i for a in n.attribute}) for n in nodes]


def _parameters(graph: onnx.GraphProto) -> int:
    """Number of weights: integers that are indices or shapes do not count."""
    blocked = _block_products(graph)
    packed = {name for node, _ in blocked for name in node.input[1:]}
    types = onnx.TensorProto.DataType
    plain = [t for t in graph.initializer if t.name not in packed and types.Name(t.data_type).lower() in _QUANTISATIONS]
    return sum(prod(t.dims) for t in plain) + sum(a["N"] * a["K"] for _, a in blocked)


def _quantisation(graph: onnx.GraphProto) -> str:
    if blocked := _block_products(graph):
        return f"int{min(attributes.get('bits', 4) for _, attributes in blocked)}"
    counts: Counter[str] = Counter()
    for tensor in graph.initializer:
        element = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        if element in _QUANTISATIONS:
            counts[_QUANTISATIONS[element]] += prod(tensor.dims)
    return counts.most_common(1)[0][0] if counts else ""
