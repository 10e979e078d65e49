"""A tier in memory: the fake of tests and rehearsals, and a cache in front of slower tiers."""

from shoal.ids import Digest
from shoal.store.chunk import Data


class MemoryTier:
    """A dict of chunks; copies what it is given, so that later writes to the source change nothing."""

    def __init__(self) -> None:
        self._chunks: dict[Digest, bytes] = {}

    def get(self, digest: Digest) -> memoryview | None:
        data = self._chunks.get(digest)
        return None if data is None else memoryview(data)

    def put(self, digest: Digest, data: Data) -> None:
        self._chunks.setdefault(digest, bytes(data))

    def drop(self, digest: Digest) -> None:
        self._chunks.pop(digest, None)
