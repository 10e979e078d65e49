"""How many bytes may lie on disk.

Models are never deleted to make room: a user who pulled one expects it to be there offline.  What would pass the quota is
refused, with the numbers.  Other processes share the folders, so the count is taken again from disk before refusing.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import StorageFullError


def used_bytes(root: Path) -> int:
    """Bytes of all files below *root*; files that vanish meanwhile count nothing."""
    return sum(_size(path) for path in root.rglob("*"))


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0


class Quota:
    """A bound on the bytes below *roots*; `limit_bytes` None means unbounded."""

    def __init__(self, limit_bytes: int | None, *roots: Path) -> None:
        self.limit_bytes = limit_bytes
        self._roots = roots
        self._used_bytes: int | None = None

    def check(self, size_bytes: int) -> None:
        """Raise StorageFullError when *size_bytes* more do not fit."""
        if self.limit_bytes is None or (
            self._used_bytes is not None and self._used_bytes + size_bytes <= self.limit_bytes
        ):
            return
        self._used_bytes = sum(used_bytes(root) for root in self._roots)
        if self._used_bytes + size_bytes > self.limit_bytes:
            raise quota_error(needed_bytes=size_bytes, used_bytes=self._used_bytes, limit_bytes=self.limit_bytes)

    @contextlib.contextmanager
    def room_for(self, size_bytes: int) -> Iterator[None]:
        """Count *size_bytes* when the block succeeds; raises StorageFullError before it when they do not fit."""
        self.check(size_bytes)
        yield
        if self._used_bytes is not None:
            self._used_bytes += size_bytes


def quota_error(*, needed_bytes: int, used_bytes: int, limit_bytes: int) -> StorageFullError:
    """The refusal, in numbers."""
    return StorageFullError(
        f"{needed_bytes} bytes more do not fit: {used_bytes} of the quota's {limit_bytes} bytes are used",
        hint=f"free space with `shoal rm NAME` and `shoal gc`, or set quota_bytes to at least {used_bytes + needed_bytes}",
    )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of *folder*, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
