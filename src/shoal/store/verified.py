"""A tier that believes nobody: bytes are compared with their digest on the way in and on the way out.

Hashing costs about a second per few gigabytes, once per load, and reads the pages that the engine is about to read anyway.
"""

from shoal.errors import DigestMismatchError
from shoal.ids import Digest
from shoal.store.chunk import Data, check
from shoal.store.tier import Tier


class Verified:
    """Checks BLAKE3 around *tier*; a chunk that fails is dropped, so that the next pull or fetch brings a good one."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    def get(self, digest: Digest) -> memoryview | None:
        """The chunk; raises DigestMismatchError after dropping bytes that are not what *digest* says."""
        data = self._tier.get(digest)
        if data is None:
            return None
        try:
            check(digest, data)
        except DigestMismatchError:
            self._tier.drop(digest)
            raise
        return data

    def put(self, digest: Digest, data: Data) -> None:
        """Keep the chunk; raises DigestMismatchError and keeps nothing when *data* is something else."""
        check(digest, data)
        self._tier.put(digest, data)

    def drop(self, digest: Digest) -> None:
        self._tier.drop(digest)
