"""The `Tier` port: a place that holds chunks.

Every tier behaves like a dict from digest to bytes; what sets tiers apart is where the bytes lie.  Since the key is a hash
of the value, a `put` under a key that is there changes nothing.  Tiers wrap tiers (`Verified(DiskTier(...))`), and the order
of wrapping is the policy.
"""

from typing import Protocol

from shoal.ids import Digest
from shoal.store.chunk import Data


class Tier(Protocol):
    """Holds chunks by digest."""

    def get(self, digest: Digest) -> memoryview | None:
        """The chunk's bytes, read-only (memory-mapped where that is possible), or None when it is not here."""
        ...

    def put(self, digest: Digest, data: Data) -> None:
        """Keep *data* under *digest*, whole or not at all; raises StorageFullError."""
        ...

    def drop(self, digest: Digest) -> None:
        """Forget the chunk; harmless when it is not here."""
        ...
