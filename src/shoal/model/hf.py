"""From a Hugging Face folder (config.json and safetensors) to the canonical model, without PyTorch.

What the folder has and the graph would not use is refused: a tensor left over means a variant that we do not know.
"""

from collections.abc import Collection, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import UnknownModelError, UnsupportedModelError
from shoal.model.checkpoint import Checkpoint, open_checkpoint
from shoal.model.hf_config import config_of
from shoal.model.rope import inverse_frequencies
from shoal.model.sidecars import adds_bos, carried_files, licence_of, read_object, token_ids
from shoal.model.spec import ImportedModel, ModelKind, ModelSpec
from shoal.model.transformer import EMBEDDING_WEIGHT, HEAD_WEIGHT, TransformerConfig, build, matrix_shapes, vector_sizes
from shoal.model.weights import (
    Matrix,
    choose_formats,
    commonest,
    kept_formats,
    matrix_arrays,
    read_float32,
    worst_error,
)

_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_TOP = {EMBEDDING_WEIGHT: "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER_WITH_POST_NORMS = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_UNUSED = ("rotary_emb.inv_freq", *_HEADS)
"""Tensors that may be there and are not read: what the configuration says anyway, and a copy of a tied embedding."""
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Of a multi-modal model of which the text part is imported."""


def import_hf(folder: Path, *, name: str, quantise: str | None = None) -> ImportedModel:
    """Import a decoder-only model under *name*, its matrices as *quantise* (fp32, fp16, bf16, int8, int4; None: as they are).

    Raises CorruptFileError, UnsupportedModelError, UnknownModelError or OSError.
    """
    config = config_of(_required_config(folder))
    checkpoint = open_checkpoint(folder)
    rename = partial(_stored_name, checkpoint.stored, _prefix(checkpoint), config)
    shapes, vectors = matrix_shapes(config), {rename(n): (n, size) for n, size in vector_sizes(config).items()}
    if quantise is None:
        formats = kept_formats(checkpoint, {n: rename(n) for n in shapes})
    else:
        formats = choose_formats(shapes, quantise, fine=(EMBEDDING_WEIGHT, HEAD_WEIGHT))
    matrices = {n: Matrix(stored=rename(n), shape=shape, form=formats[n]) for n, shape in shapes.items()}
    _check(
        checkpoint, {m.stored: m.shape for m in matrices.values()} | {n: (size,) for n, (_, size) in vectors.items()}
    )
    # gemma's norms multiply by 1 + weight
    offset = 1.0 if config.architecture == "gemma3" else 0.0
    readers = matrix_arrays(checkpoint, matrices)
    readers |= {n: partial(read_float32, checkpoint, stored, (size,), offset) for stored, (n, size) in vectors.items()}
    readers |= {n: partial(inverse_frequencies, rope) for n, rope in config.rotations.items()}
    spec = msgspec.structs.replace(
        _spec(folder, config),
        name=name,
        quantisation=quantise or commonest(formats, shapes),
        import_error=worst_error(checkpoint, matrices),
    )
    return ImportedModel(spec=spec, graph=build(config, formats), tensors=readers, files=carried_files(folder))


def _required_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UnknownModelError(f"{folder} has no config.json", hint="name the folder of a Hugging Face model")
    return read_object(folder / "config.json")


def _prefix(checkpoint: Checkpoint) -> str:
    """What stands before `embed_tokens`; "model." (the usual) when that tensor is missing, for the message about it."""
    embedding = _TOP[EMBEDDING_WEIGHT]
    return next((p for p in _PREFIXES if p + embedding in checkpoint.stored), "model.")


def _stored_name(stored: Collection[str], prefix: str, config: TransformerConfig, ours: str) -> str:
    """The checkpoint's name of a tensor of `matrix_shapes` or `vector_sizes`."""
    if ours == HEAD_WEIGHT:
        return next((head for head in _HEADS if head in stored), _HEADS[0])
    if ours in _TOP:
        return prefix + _TOP[ours]
    _, layer, part, suffix = ours.split(".")
    parts = _LAYER_WITH_POST_NORMS if config.post_norms else _LAYER
    return f"{prefix}layers.{layer}.{parts[part]}.{suffix}"


def _check(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """All that is wanted is there, in its shape, and nothing else that could matter."""
    for stored, shape in wanted.items():
        checkpoint.check(stored, shape)
    left = [
        n for n in checkpoint.stored if n not in wanted and not n.endswith(_UNUSED) and not n.startswith(_OTHER_PARTS)
    ]
    if left:
        raise UnsupportedModelError(
            f"{len(left)} tensors have no place in this architecture, the first is {min(left)}",
            hint="this variant (mixture of experts, extra biases, adapters, ...) is not supported yet",
        )


def _spec(folder: Path, config: TransformerConfig) -> ModelSpec:
    """What the folder says about the model; the name and what rounding did are the caller's to add."""
    files = carried_files(folder)
    generation, said = read_object(folder / "generation_config.json"), read_object(folder / "config.json")
    said = said.get("text_config", {}) | said
    bos = next(iter(token_ids(generation.get("bos_token_id", said.get("bos_token_id")))), None)
    return ModelSpec(
        name="",
        kind=ModelKind.CAUSAL_LM,
        architecture=config.architecture,
        licence=licence_of(folder),
        parameters=sum(map(prod, matrix_shapes(config).values())) + sum(vector_sizes(config).values()),
        context_tokens=config.context_tokens,
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        bos_token_id=bos,
        eos_token_ids=_end_tokens(generation, said),
        add_bos=adds_bos(files, bos),
    )


def _end_tokens(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: those of the first source that names any (chat models end turns as generation_config.json says)."""
    return next((ids for source in sources if (ids := token_ids(source.get("eos_token_id")))), ())
