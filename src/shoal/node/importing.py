"""Any supported file or folder to a model, with the tokenizer that a GGUF file carries inside."""

from pathlib import Path

from shoal.model.load import GGUF_MAGIC, import_model
from shoal.model.spec import ImportedModel
from shoal.model.tokenizer import tokenizer_files_from_gguf


def import_files(path: Path, name: str, quantise: str | None) -> ImportedModel:
    """Import *path* as *name*; `quantise` None keeps the file's own numbers.  Raises what the importers raise."""
    imported = import_model(path, name=name, quantise=quantise)
    gguf = _gguf(path)
    if gguf is None:
        return imported
    files = {**tokenizer_files_from_gguf(gguf), **imported.files}
    return ImportedModel(spec=imported.spec, graph=imported.graph, tensors=imported.tensors, files=files)


def _gguf(path: Path) -> Path | None:
    """The GGUF file at *path* or alone in the folder *path*; content decides, as in `import_model`."""
    candidates = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    for candidate in candidates:
        with candidate.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                return candidate
    return None
