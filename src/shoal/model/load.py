"""One door for every format: what a path holds decides, not what it is called."""

from pathlib import Path

from shoal.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError
from shoal.model import genai
from shoal.model.genai import import_genai
from shoal.model.gguf import import_gguf
from shoal.model.hf import import_hf
from shoal.model.hf_config import model_type_of
from shoal.model.hf_encoder import import_encoder
from shoal.model.lower import check_attention
from shoal.model.onnx import import_onnx
from shoal.model.sidecars import read_object
from shoal.model.spec import ImportedModel

GGUF_MAGIC = b"GGUF"
ONNX_FIRST_BYTE = b"\x08"
"""Tag of `ModelProto.ir_version`, which every writer puts first."""
_TAKEN = "a GGUF file, an ONNX file, a Hugging Face folder (config.json, *.safetensors) or an onnxruntime-genai folder"


def import_model(path: Path, *, name: str, quantise: str | None = None) -> ImportedModel:
    """Import whatever model lies at *path*; *quantise* is for safetensors alone (`import_hf`).

    Raises UnknownModelError, UnsupportedModelError, CorruptFileError, InvalidRequestError or OSError.
    """
    imported = _imported(path, name, quantise)
    check_attention(imported.graph.graph)
    return imported


def _imported(path: Path, name: str, quantise: str | None) -> ImportedModel:
    if not path.exists():
        raise UnknownModelError(f"there is nothing at {path}", hint=f"give the path of {_TAKEN}")
    if path.is_file():
        return _file(path, name, quantise)
    if (path / genai.CONFIG).is_file():
        _refuse_rounding(quantise, "an onnxruntime-genai folder")
        return import_genai(path, name=name)
    found = _graphs(path)
    if any(path.glob("*.safetensors")) or ((path / "config.json").is_file() and not found):
        return _transformers(path, name, quantise)
    if len(found) == 1:
        return _file(found[0], name, quantise)
    listed = ", ".join(str(f.relative_to(path)) for f in found[:8])
    raise UnsupportedModelError(
        f"{path} holds several models: {listed}" if found else f"{path} holds no model",
        hint=f"give the path of {_TAKEN}",
    )


def _graphs(folder: Path) -> list[Path]:
    """Model files of a folder; exporters put ONNX files one level down."""
    return sorted(f for pattern in ("*.onnx", "onnx/*.onnx", "*.gguf") for f in folder.glob(pattern))


def _transformers(folder: Path, name: str, quantise: str | None) -> ImportedModel:
    if model_type_of(read_object(folder / "config.json")) == "bert":
        return import_encoder(folder, name=name, quantise=quantise)
    return import_hf(folder, name=name, quantise=quantise)


def _file(path: Path, name: str, quantise: str | None) -> ImportedModel:
    with path.open("rb") as opened:
        head = opened.read(8)
    if head.startswith(GGUF_MAGIC):
        _refuse_rounding(quantise, "a GGUF file")
        return import_gguf(path, name=name)
    if path.suffix == ".safetensors":
        raise UnsupportedModelError(
            f"{path} holds tensors without a config.json", hint=f"give the folder {path.parent}"
        )
    if path.suffix == ".onnx" or head.startswith(ONNX_FIRST_BYTE):
        _refuse_rounding(quantise, "an ONNX file")
        return import_onnx(path, name=name)
    raise UnsupportedModelError(
        f"{path} {f'begins with {head!r}' if head else 'is empty'}, which is no model that we know",
        hint=f"give the path of {_TAKEN}",
    )


def _refuse_rounding(quantise: str | None, what: str) -> None:
    """Only floating-point checkpoints are rounded at import: other files keep the numbers that they come with."""
    if quantise is not None:
        raise InvalidRequestError(
            f"{what} keeps the numbers that it comes with, it cannot be imported as {quantise}",
            hint="leave quantise away, or import the model's safetensors folder",
            param="quantise",
        )
