"""Folders that follow the onnxruntime-genai convention: already lowered, for the provider that genai_config.json declares."""

from pathlib import Path

import msgspec

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.onnx import import_onnx
from shoal.model.sidecars import adds_bos, carried_files, token_ids
from shoal.model.spec import INPUT_IDS, LOGITS, PAST_PREFIX, PRESENT_PREFIX, ImportedModel, ModelKind

CONFIG = "genai_config.json"
DEFAULT_PROVIDER = "cpu"


class _SessionOptions(msgspec.Struct):
    provider_options: list[dict[str, object]] = []


class _Names(msgspec.Struct):
    """Inputs and outputs of the decoder, with the defaults of onnxruntime-genai."""

    input_ids: str = INPUT_IDS
    logits: str = LOGITS
    past_key_names: str = f"{PAST_PREFIX}%d.key"
    past_value_names: str = f"{PAST_PREFIX}%d.value"
    present_key_names: str = f"{PRESENT_PREFIX}%d.key"
    present_value_names: str = f"{PRESENT_PREFIX}%d.value"


class _Decoder(msgspec.Struct):
    filename: str = "model.onnx"
    head_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_key_value_heads: int = 0
    session_options: _SessionOptions = msgspec.field(default_factory=_SessionOptions)
    inputs: _Names = msgspec.field(default_factory=_Names)
    outputs: _Names = msgspec.field(default_factory=_Names)


class _Model(msgspec.Struct):
    decoder: _Decoder
    type: str = "genai"
    context_length: int = 0
    vocab_size: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class _Genai(msgspec.Struct):
    model: _Model


def import_genai(folder: Path, *, name: str) -> ImportedModel:
    """Take a folder as it is; raises CorruptFileError, UnsupportedModelError, UnknownModelError or OSError."""
    said = _parse(folder)
    decoder = said.decoder
    _expect_names(decoder)
    if Path(decoder.filename).name != decoder.filename:
        raise CorruptFileError(
            f"{CONFIG} names {decoder.filename!r}, not a file of {folder}", hint="do not trust this folder"
        )
    model = import_onnx(folder / decoder.filename, name=name)
    if model.spec.kind is not ModelKind.CAUSAL_LM:
        inputs = [value.name for value in model.graph.graph.input]
        raise UnsupportedModelError(
            f"{decoder.filename} is not a decoder with a cache: its inputs are {', '.join(inputs[:8])}",
            hint="only decoder-only models are taken from genai folders",
        )
    files = {**model.files, **carried_files(folder, (CONFIG,))}
    spec = msgspec.structs.replace(
        model.spec,
        architecture=said.type,
        context_tokens=said.context_length or model.spec.context_tokens,
        vocabulary=said.vocab_size or model.spec.vocabulary,
        hidden=decoder.hidden_size or model.spec.hidden,
        bos_token_id=said.bos_token_id,
        eos_token_ids=token_ids(said.eos_token_id) or model.spec.eos_token_ids,
        add_bos=adds_bos(files, said.bos_token_id),
        lowered_for=_provider(decoder),
    )
    return ImportedModel(spec=spec, graph=model.graph, tensors=model.tensors, files=files)


def _parse(folder: Path) -> _Model:
    path = folder / CONFIG
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Genai).model
    except msgspec.MsgspecError as error:
        raise CorruptFileError(
            f"{path} does not describe a decoder-only model: {error}",
            hint="fetch the file again; pipelines are not supported",
        ) from error


def _expect_names(decoder: _Decoder) -> None:
    """Sessions feed inputs by their names, so those must be the convention's."""
    usual = _Names()
    for said in (decoder.inputs, decoder.outputs):
        for field in usual.__struct_fields__:
            if getattr(said, field) != getattr(usual, field):
                raise UnsupportedModelError(
                    f"{CONFIG} calls {field} {getattr(said, field)!r}; only {getattr(usual, field)!r} is supported",
                    hint="export the folder with the model builder of onnxruntime-genai",
                )


def _provider(decoder: _Decoder) -> str:
    """The first execution provider that the folder was made for."""
    names = [key.lower() for options in decoder.session_options.provider_options for key in options]
    return names[0] if names else DEFAULT_PROVIDER
