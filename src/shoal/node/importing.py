"""The importer of every pull: any supported file or folder to a model."""

from pathlib import Path

from shoal.model.load import import_model
from shoal.model.spec import ImportedModel


def import_files(path: Path, name: str, quantise: str | None) -> ImportedModel:
    """Import *path* as *name*; `quantise` None keeps the file's own numbers.  Raises what the importers raise."""
    return import_model(path, name=name, quantise=quantise)
