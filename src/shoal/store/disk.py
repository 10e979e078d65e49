"""A tier on disk: one file per chunk, uncompressed, so that each is page-aligned and can be memory-mapped (ADR 2).

A chunk appears whole or not at all: bytes go to a temporary file, which is renamed.  A process that dies leaves at most a
temporary file, which the next writer or `shoal gc` removes.  Against a power cut, everything is synced once before a manifest
is published (`sync_all`): a model has hundreds of chunks, and a sync for each took 8 s of a pull of 10 s on an SSD.  A chunk
that was torn nevertheless fails its digest when it is read, is dropped, and is fetched again.

Small chunks are read instead of mapped: a mapping holds a file descriptor, and half of a model's tensors are a few kilobytes.
"""

import contextlib
import errno
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shoal.errors import InvalidRequestError, SettingsError, StorageFullError
from shoal.ids import Digest
from shoal.store.chunk import Data, check, parse_digest, size_of
from shoal.store.quota import Quota

MAP_FROM_BYTES = 64 * 1024

_BINARY = getattr(os, "O_BINARY", 0)  # Windows alone has a text mode
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_OURS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Translate "no space left", "disk quota exceeded" and "file too large" into StorageFullError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFullError(
            f"cannot write below {folder}: {error.strerror}",
            hint="free space on that disk (`shoal rm NAME`, `shoal gc`), or set SHOAL_HOME to a folder on a larger one",
        ) from error


@contextlib.contextmanager
def home_named(home: Path) -> Iterator[None]:
    """Translate what a home says that cannot be used: StorageFullError when it is full, SettingsError when it is not ours to write.

    Errors about other files (a model that is being pulled) pass as they are; those of a full disk name no file.
    """
    try:
        with full_disk_named(home):
            yield
    except OSError as error:
        if error.errno not in _NOT_OURS or not _about(error, home):
            raise
        raise SettingsError(
            f"cannot write to home {home}: {error.strerror}: {error.filename}",
            hint="set SHOAL_HOME to a folder that you may write to",
            param="home",
        ) from error


def _about(error: OSError, home: Path) -> bool:
    """Whether the file that *error* names is *home*, lies below it, or is a folder above it that was to be made."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    return path is not None and (path.is_relative_to(home) or home.is_relative_to(path))


def sync_folder(folder: Path) -> None:
    """Make a rename in *folder* last through a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all() -> None:
    """Make everything that was written so far last through a power cut, where the system can."""
    if hasattr(os, "sync"):
        os.sync()


def write_whole(path: Path, data: Data, *, tmp: Path, sync: bool) -> None:
    """Write *path* so that it holds all of *data* or is left as it was; *tmp* is a folder on the same file system.

    With *sync* it lasts through a power cut when this returns.  Others may read it as the umask says: nothing here is secret
    (keys are `shoal.trust`'s), and the users of a group may share a home.
    """
    with full_disk_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.mkdir(parents=True, exist_ok=True)
        handle, part = _temporary(tmp, path.name[:16])
        try:
            try:
                _write_all(handle, memoryview(data))
                if sync:
                    os.fsync(handle)
            finally:
                os.close(handle)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(path.parent)


def _temporary(folder: Path, prefix: str) -> tuple[int, Path]:
    """A new file that only we write, opened; unlike those of `tempfile` its mode is what the umask leaves of 0644."""
    while True:
        part = folder / f"{prefix}.{secrets.token_hex(8)}"
        with contextlib.suppress(FileExistsError):
            return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o644), part


def _write_all(handle: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(handle, data) :]


def _mapped(file: BinaryIO) -> memoryview:
    if os.fstat(file.fileno()).st_size < MAP_FROM_BYTES:
        return memoryview(file.read())
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class DiskTier:
    """Chunks at `root/ab/<digest>`; `tmp` must be on the same file system."""

    def __init__(self, root: Path, *, tmp: Path, quota: Quota) -> None:
        self._root = root
        self._tmp = tmp
        self._quota = quota

    def get(self, digest: Digest) -> memoryview | None:
        try:
            with self._path(digest).open("rb") as file:
                return _mapped(file)
        except FileNotFoundError:
            return None

    def put(self, digest: Digest, data: Data) -> None:
        if self.size_bytes(digest) == size_of(data):
            return
        with self._quota.room_for(size_of(data)):
            write_whole(self._path(digest), data, tmp=self._tmp, sync=False)

    def take(self, digest: Digest, part: Path) -> None:
        """Make the file *part* (on the same file system) the chunk, if its content is; else raises DigestMismatchError."""
        with self._quota.room_for(part.stat().st_size):
            with part.open("rb") as file:
                check(digest, _mapped(file))
            path = self._path(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)

    def drop(self, digest: Digest) -> None:
        self._path(digest).unlink(missing_ok=True)

    def size_bytes(self, digest: Digest) -> int | None:
        """Size of the chunk's file, without reading it; None when it is not here."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def sizes_bytes(self) -> dict[Digest, int]:
        """Every chunk here, with the size of its file."""
        found = ((parse_digest(path.name), path) for path in self._root.glob("??/*"))
        return {digest: path.stat().st_size for digest, path in found if digest is not None}

    def _path(self, digest: Digest) -> Path:
        if parse_digest(digest) is None:  # others name chunks too, and this name becomes a path of this machine
            raise InvalidRequestError(f"{digest[:80]!r} is no digest", hint="one has 64 hexadecimal digits, 0 to f")
        return self._root / digest[:2] / digest
