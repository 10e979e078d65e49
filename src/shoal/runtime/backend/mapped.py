"""Weights that lie in mapped files: which arrays do, and giving their pages back to the system.

A file is read to be verified, and again by the engine that packs it; each page so touched counts as this process's memory until the
system wants it back.  Most are never read again.  Dropping them keeps mapping and contents: a page that is read after all comes
back from the system's cache of the file, else from the disk.
"""

import mmap
from collections.abc import Iterable

import numpy as np

from shoal.runtime.request import Array


def is_mapped(array: Array) -> bool:
    """Whether the array's memory belongs to a mapping or another buffer, rather than to numpy's heap."""
    return _owner(array) is not None


def drop_pages(arrays: Iterable[Array]) -> None:
    """Give back the pages of *arrays* that are read-only mappings of files, where the system can.

    Writable mappings are left alone: theirs may be the only copy.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    areas = {id(area): area for array in arrays if (area := _mapping(array)) is not None}
    for area in areas.values():
        area.madvise(mmap.MADV_DONTNEED)


def _mapping(array: Array) -> mmap.mmap | None:
    """The read-only mapping that *array* lies in, or None."""
    owner = _owner(array)
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) and memoryview(owner).readonly else None


def _owner(array: Array) -> object:
    """What the array's memory belongs to, when that is no array; None: numpy's heap."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner
