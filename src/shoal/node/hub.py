"""Models from a Hugging Face hub, by its own client (extra `hf`), which resumes and verifies by itself."""

import importlib.util
from pathlib import Path
from typing import Any

from shoal.errors import InvalidRequestError, ShoalError, StorageFullError, UnavailableError, UnknownModelError
from shoal.model.catalog import HfRef
from shoal.store.disk import full_disk_named

_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "1_Pooling/config.json")


def download_repository(ref: HfRef, folder: Path) -> Path:
    """Have the file or the folder that *ref* names below *folder*; raises InvalidRequestError without the extra.

    A path that ends in a slash is a folder, with everything in it (onnxruntime-genai models lie so); without a path it is
    the model at the repository's root: weights as safetensors, configuration, tokenizer.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InvalidRequestError(
            f"{ref} needs the Hugging Face client, which is not installed",
            hint="pip install 'shoal[hf]'",
            param="reference",
        )
    return _download(ref, folder)


def _download(ref: HfRef, folder: Path) -> Path:
    import huggingface_hub as hub  # noqa: PLC0415 an extra, and slow to import

    where: dict[str, Any] = {"repo_id": ref.repository, "revision": ref.revision, "local_dir": folder}
    try:
        with full_disk_named(folder):
            if ref.path and not ref.path.endswith("/"):
                return Path(hub.hf_hub_download(filename=ref.path, **where))
            patterns = [f"{ref.path}*"] if ref.path else list(_MODEL_FILES)
            hub.snapshot_download(allow_patterns=patterns, **where)
    except StorageFullError:
        raise
    except Exception as error:
        raise _hub_error(ref, error) from error
    found = folder / ref.path
    if not found.is_dir() or not any(found.iterdir()):
        raise UnknownModelError(f"{ref} holds no model", hint="name a file: hf:ORG/REPO/FILE", param="reference")
    return found


def _hub_error(ref: HfRef, error: Exception) -> ShoalError:
    """The client raises classes of its own and of its HTTP library; their names are what stays over its versions."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:  # kinds of "not found" that mean "no network"
        return _unreachable(ref, first)
    if kinds & {"GatedRepoError"}:
        return InvalidRequestError(
            f"{ref} asks for your consent to its licence",
            hint="accept it on its page, then `hf auth login`",
            param="reference",
        )
    if kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return UnknownModelError(
            f"{ref} does not exist: {first}", hint="check organisation, name, revision and file", param="reference"
        )
    return _unreachable(ref, first)


def _unreachable(ref: HfRef, said: str) -> UnavailableError:
    return UnavailableError(
        f"{ref} cannot be downloaded: {said}", hint="check the network and pull again: it goes on where it stopped"
    )
