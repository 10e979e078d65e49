"""Models from a Hugging Face hub, by its own client (extra `hf`), which resumes by itself.

The hub's list of files comes first: it says which of them make the model (repositories hold the same weights in several forms),
how many bytes will come, and the SHA-256 of each large one, which the client does not compare.
"""

import contextlib
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from shoal.errors import (
    DigestMismatchError,
    InvalidRequestError,
    ShoalError,
    UnavailableError,
    UnknownModelError,
    UntrustedError,
)
from shoal.model.catalog import HfRef
from shoal.node.download import check_room, sha256_of
from shoal.node.progress import Progress
from shoal.store.disk import full_disk_named
from shoal.store.quota import Quota, used_bytes

_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_MORE = ("README.md", "1_Pooling/config.json")
_WHOLE = "model.safetensors"
_LOOK_S = 0.5


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a repository; `sha256` empty: the hub does not say (small files are kept by another hash)."""

    path: str
    size_bytes: int = 0
    sha256: str = ""


def download_repository(ref: HfRef, folder: Path, progress: Progress, quota: Quota) -> Path:
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
    commit, files = _listed(ref)
    wanted = chosen(ref, files)
    if not wanted:
        raise UnknownModelError(f"{ref} holds no model", hint="name a file: hf:ORG/REPO/FILE", param="reference")
    total_bytes = sum(file.size_bytes for file in wanted)
    check_room(str(ref), folder, max(0, total_bytes - used_bytes(folder)), quota)
    progress.start(f"downloading {ref}", total_bytes or None)
    with _watched(folder, progress):
        for file in wanted:
            _fetch(ref, commit, file, folder)
    return folder / ref.path


def chosen(ref: HfRef, files: Sequence[HubFile]) -> list[HubFile]:
    """Those of *files* that *ref* names."""
    if ref.path.endswith("/"):
        return [file for file in files if file.path.startswith(ref.path)]
    if ref.path:
        # External data of an ONNX file lies beside it, under a name that begins alike.
        beside = ref.path if ref.path.endswith(".onnx") else None
        found = [file for file in files if file.path == ref.path or (beside and file.path.startswith(beside))]
        return found if ref.path in {file.path for file in found} else []
    here = [file for file in files if "/" not in file.path]
    weights = _one_copy([file for file in here if file.path.endswith(".safetensors")])
    return weights and weights + [f for f in files if f.path in _MORE or (f in here and f.path.endswith(_SUFFIXES))]


def _one_copy(weights: list[HubFile]) -> list[HubFile]:
    """Without what holds the same numbers again: Mistral's `consolidated` form, variants beside a whole model."""
    whole = [file for file in weights if file.path == _WHOLE]
    return whole or [file for file in weights if not file.path.startswith("consolidated")] or weights


def _listed(ref: HfRef) -> tuple[str, list[HubFile]]:
    """The commit that the revision means now, and its files."""
    import huggingface_hub as hub  # noqa: PLC0415 an extra, and slow to import

    with _translated(ref):
        info = hub.HfApi().model_info(ref.repository, revision=ref.revision, files_metadata=True)
    files = [
        HubFile(path=file.rfilename, size_bytes=file.size or 0, sha256=file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or []
    ]
    if any(".." in PurePosixPath(file.path).parts for file in files):
        raise UntrustedError(f"{ref} lists files outside its folder", hint="do not use this repository")
    return info.sha or ref.revision, files


def _fetch(ref: HfRef, commit: str, file: HubFile, folder: Path) -> None:
    import huggingface_hub as hub  # noqa: PLC0415 as above
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415 as above

    disable_progress_bars()  # ours is drawn already
    with _translated(ref), full_disk_named(folder):
        path = Path(hub.hf_hub_download(ref.repository, file.path, revision=commit, local_dir=folder))
    actual = sha256_of(path) if file.sha256 else ""
    if actual != file.sha256:
        path.unlink()
        raise DigestMismatchError(
            f"{file.path} of {ref} has SHA-256 {actual}, the hub says {file.sha256}",
            hint="pull again; nothing was imported",
        )


@contextlib.contextmanager
def _watched(folder: Path, progress: Progress) -> Iterator[None]:
    """Tell *progress* of the bytes that are below *folder* and of those that arrive, whichever way the client fetches them."""
    done, seen_bytes = threading.Event(), 0

    def look() -> None:
        nonlocal seen_bytes
        now_bytes = used_bytes(folder)
        progress.advance(max(0, now_bytes - seen_bytes))
        seen_bytes = max(seen_bytes, now_bytes)

    def watch() -> None:
        while not done.wait(_LOOK_S):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        look()


@contextlib.contextmanager
def _translated(ref: HfRef) -> Iterator[None]:
    try:
        yield
    except ShoalError:
        raise
    except Exception as error:
        raise _hub_error(ref, error) from error


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
