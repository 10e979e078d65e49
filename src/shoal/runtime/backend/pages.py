"""Cache memory of all slots: reserved for the whole context, committed on touch, given back slot by slot (ADR 7).

One private anonymous mapping holds all layers; within a layer the slots lie one after another, so that neighbours are one array
for the engine.  The system commits a page when it is first written, so that a slot costs what its sequence fills, not
what its context could.  A slot begins at a page, for which a few positions more are reserved than anybody uses.  Shared mappings
were rejected: dropping their pages keeps the memory.  Huge pages are declined: heads lie far apart, and each would commit
2 MiB at its first position.
"""

import math
import mmap
from collections.abc import Mapping, Sequence

import numpy as np

from shoal.runtime.backend.roles import CacheTensor
from shoal.runtime.request import Array


class SlotPages:
    """Arrays `[slots, heads, positions, head_dim]` by input name, over one mapping; at least *context_tokens* positions."""

    def __init__(self, caches: Sequence[CacheTensor], slots: int, context_tokens: int) -> None:
        lengths = [_whole_pages(c, context_tokens) for c in caches]
        self._strides = [c.bytes_per_position() * n for c, n in zip(caches, lengths, strict=True)]
        self._starts = np.cumsum([0, *(slots * stride for stride in self._strides)]).tolist()
        self.reserved_bytes = self._starts[-1]
        self._map = _reserve(max(self.reserved_bytes, mmap.PAGESIZE))
        self.arrays: Mapping[str, Array] = {}
        for cache, positions, at in zip(caches, lengths, self._starts, strict=False):
            shape = (slots, cache.heads, positions, cache.head_dim)
            flat = np.frombuffer(self._map, cache.dtype, count=math.prod(shape), offset=at)
            self.arrays[cache.past] = flat.reshape(shape)

    def give_back(self, slot: int) -> bool:
        """Return the pages of a slot to the system, keeping the addresses; False where it cannot do that."""
        if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(mmap, "MAP_PRIVATE"):
            return False
        for start, stride in zip(self._starts, self._strides, strict=False):
            self._map.madvise(mmap.MADV_DONTNEED, start + slot * stride, stride)
        return True


def _reserve(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    return area


def _whole_pages(cache: CacheTensor, positions: int) -> int:
    """So many positions that a slot of this cache is a whole number of pages."""
    step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, cache.bytes_per_position())
    return -(-positions // step) * step
