"""From a Hugging Face folder of a BERT-type encoder, sentence-transformers folders included, to the canonical model."""

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.checkpoint import Checkpoint, open_checkpoint
from shoal.model.encoder import ACTIVATIONS, WORDS, EncoderConfig, build, float_shapes, matrix_shapes
from shoal.model.hf_config import model_type_of
from shoal.model.sidecars import carried_files, licence_of, read_object
from shoal.model.spec import ImportedModel, ModelKind, ModelSpec
from shoal.model.weights import (
    Matrix,
    choose_formats,
    commonest,
    kept_formats,
    matrix_arrays,
    read_float32,
    worst_error,
)

_PREFIXES = ("bert.", "")
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")
"""The parts of a checkpoint above the token vectors, and a constant that old versions saved."""


def import_encoder(folder: Path, *, name: str, quantise: str | None = None) -> ImportedModel:
    """Import a BERT-type model (sentence-transformers folders included) under *name*, as `import_hf` does.

    Raises CorruptFileError, UnsupportedModelError or OSError.
    """
    config = config_of(read_object(folder / "config.json"))
    checkpoint = open_checkpoint(folder)
    prefix = next((p for p in _PREFIXES if p + WORDS in checkpoint.stored), "")
    shapes, floats = matrix_shapes(config), float_shapes(config)
    _check(checkpoint, prefix, {**shapes, **floats})
    if quantise is None:
        formats = kept_formats(checkpoint, {n: prefix + n for n in shapes})
    else:
        formats = choose_formats(shapes, quantise, fine=(WORDS,))
    matrices = {n: Matrix(stored=prefix + n, shape=shape, form=formats[n]) for n, shape in shapes.items()}
    readers = matrix_arrays(checkpoint, matrices)
    readers |= {n: partial(read_float32, checkpoint, prefix + n, shape) for n, shape in floats.items()}
    spec = msgspec.structs.replace(
        _spec(folder, config),
        name=name,
        quantisation=quantise or commonest(formats, shapes),
        import_error=worst_error(checkpoint, matrices),
    )
    return ImportedModel(spec=spec, graph=build(config, formats), tensors=readers, files=carried_files(folder))


def config_of(config: Mapping[str, Any]) -> EncoderConfig:
    """Parse config.json; raises CorruptFileError or UnsupportedModelError."""
    model_type_of(config)
    try:
        parsed = msgspec.convert(config, EncoderConfig)
    except msgspec.ValidationError as error:
        raise CorruptFileError(f"config.json: {error}", hint="fetch the file again") from error
    if parsed.hidden_size < 1 or parsed.num_attention_heads < 1 or parsed.hidden_size % parsed.num_attention_heads:
        raise CorruptFileError(
            f"config.json: hidden size {parsed.hidden_size} does not divide among {parsed.num_attention_heads} heads",
            hint="fetch the file again",
        )
    for key, value, allowed in (
        ("hidden_act", parsed.hidden_act, tuple(ACTIVATIONS)),
        ("position_embedding_type", parsed.position_embedding_type, ("absolute",)),
        ("is_decoder", parsed.is_decoder, (False,)),
    ):
        if value not in allowed:
            raise UnsupportedModelError(
                f"{key} {value!r} of an encoder is not supported", hint=f"supported: {', '.join(map(str, allowed))}"
            )
    return parsed


def _check(checkpoint: Checkpoint, prefix: str, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        checkpoint.check(prefix + name, shape)
    bare = (stored.removeprefix(prefix) for stored in checkpoint.stored)
    left = [stored for stored in bare if stored not in wanted and not stored.startswith(_UNUSED)]
    if left:
        raise UnsupportedModelError(
            f"{len(left)} tensors have no place in a BERT encoder, the first is {min(left)}",
            hint="this variant is not supported yet; export it to ONNX and import that",
        )


def _spec(folder: Path, c: EncoderConfig) -> ModelSpec:
    longest = read_object(folder / "sentence_bert_config.json").get("max_seq_length")
    pooling, normalise = pooling_of(folder)
    return ModelSpec(
        name="",
        kind=ModelKind.ENCODER,
        architecture="bert",
        licence=licence_of(folder),
        parameters=sum(map(prod, (matrix_shapes(c) | float_shapes(c)).values())),
        context_tokens=min(c.max_position_embeddings, longest)
        if isinstance(longest, int)
        else c.max_position_embeddings,
        vocabulary=c.vocab_size,
        hidden=c.hidden_size,
        layers=c.num_hidden_layers,
        pooling=pooling,
        normalise=normalise,
    )


def pooling_of(folder: Path) -> tuple[str, bool]:
    """How token vectors become an embedding, and whether it is normalised, as modules.json says.

    Without that file: the mean, not normalised, as sentence-transformers does with a bare encoder.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return "mean", False
    try:
        modules = msgspec.json.decode(path.read_bytes(), type=list[_Module])
    except msgspec.MsgspecError as error:
        raise CorruptFileError(f"{path} is not a list of modules: {error}", hint="fetch the file again") from error
    kinds = {module.type.rsplit(".", 1)[-1]: module.path for module in modules}
    unknown = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UnsupportedModelError(
            f"{path} lists {', '.join(sorted(unknown))}", hint="supported are Transformer, Pooling and Normalize"
        )
    return _pooling(read_object(folder / kinds.get("Pooling", "1_Pooling") / "config.json")), "Normalize" in kinds


class _Module(msgspec.Struct):
    type: str
    path: str = ""


def _pooling(said: Mapping[str, Any]) -> str:
    """The one mode that 1_Pooling/config.json switches on."""
    prefix = "pooling_mode_"
    modes = sorted(key.removeprefix(prefix) for key, value in said.items() if key.startswith(prefix) and value is True)
    match modes or [str(said.get("pooling_mode", "mean"))]:
        case ["mean_tokens"] | ["mean"]:
            return "mean"
        case ["cls_token"] | ["cls"]:
            return "cls"
        case _:
            raise UnsupportedModelError(
                f"pooling by {' and '.join(modes)} is not supported", hint="supported are mean and cls"
            )
