"""Cache memory of one slot: reserved for the whole context, committed on touch, given back on release (ADR 7).

One private anonymous mapping per slot holds all layers.  The system commits a page when it is first written, so that a slot costs
what its sequence fills, not what its context could.  Shared mappings were rejected: dropping their pages keeps the memory.
Huge pages are declined: heads lie far apart, and each would commit 2 MiB at its first position.
"""

import math
import mmap
from collections.abc import Mapping, Sequence

import numpy as np

from shoal.runtime.backend.roles import CacheTensor
from shoal.runtime.request import Array


class SlotPages:
    """Arrays `[1, heads, context, head_dim]` by input name, over one mapping."""

    def __init__(self, caches: Sequence[CacheTensor], context_tokens: int) -> None:
        sizes = [_whole_pages(c.bytes_per_position() * context_tokens) for c in caches]
        self.reserved_bytes = sum(sizes)
        self._map = _reserve(max(self.reserved_bytes, mmap.PAGESIZE))
        self.arrays: Mapping[str, Array] = {}
        starts = np.cumsum([0, *sizes])
        for cache, at in zip(caches, starts.tolist(), strict=False):
            shape = (1, cache.heads, context_tokens, cache.head_dim)
            flat = np.frombuffer(self._map, cache.dtype, count=math.prod(shape), offset=at)
            self.arrays[cache.past] = flat.reshape(shape)

    def give_back(self) -> bool:
        """Return the pages to the system, keeping the addresses; False where it cannot do that."""
        if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(mmap, "MAP_PRIVATE"):
            return False
        self._map.madvise(mmap.MADV_DONTNEED)
        return True


def _reserve(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    return area


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
