"""Any supported file or folder to a model, with the tokenizer that a GGUF file carries inside."""

from pathlib import Path

from shoal.model.load import import_model
from shoal.model.spec import ImportedModel
from shoal.model.tokenizer import tokenizer_files_from_gguf


def import_files(path: Path, name: str, quantise: str | None) -> ImportedModel:
    """Import *path* as *name*; `quantise` None keeps the file's own numbers.  Raises what the importers raise."""
    imported = import_model(path, name=name) if quantise is None else import_model(path, name=name, quantise=quantise)
    if path.suffix != ".gguf":
        return imported
    files = {**tokenizer_files_from_gguf(path), **imported.files}
    return ImportedModel(spec=imported.spec, graph=imported.graph, tensors=imported.tensors, files=files)
