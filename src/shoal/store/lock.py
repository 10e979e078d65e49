"""Locks between processes, held on files: the system releases them when their process dies, however it dies."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold *path* for the block if nobody else does; the value says whether we do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _opened(path)
    try:
        yield _locked(handle)
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    """The lock's file, made unless it is there; one that another user made can be locked by whoever may read it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS} or not path.exists():
            raise
        return os.open(path, os.O_RDONLY)


def _locked(handle: int) -> bool:
    try:
        _try_lock(handle)
    except OSError:
        return False
    return True
