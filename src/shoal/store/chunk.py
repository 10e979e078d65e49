"""Names of bytes: a chunk is addressed by the BLAKE3 of its content (ADR 2)."""

import re

from blake3 import blake3

from shoal.errors import DigestMismatchError
from shoal.ids import Digest
from shoal.store.manifest import ChunkRef

Data = bytes | bytearray | memoryview

_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(data: Data) -> Digest:
    """BLAKE3 of *data*, 64 lower-case hexadecimal characters."""
    return Digest(blake3(data).hexdigest())


def size_of(data: Data) -> int:
    """Bytes of *data*, whatever its item size."""
    return data.nbytes if isinstance(data, memoryview) else len(data)


def ref_of(data: Data) -> ChunkRef:
    """Name and size of *data*."""
    return ChunkRef(digest=digest_of(data), size_bytes=size_of(data))


def parse_digest(text: str) -> Digest | None:
    """*text* as a digest, or None when it is none (a stray file, a malformed key)."""
    return Digest(text) if _DIGEST.fullmatch(text) else None


def check(digest: Digest, data: Data) -> None:
    """Raise DigestMismatchError unless *data* is what *digest* says."""
    actual = digest_of(data)
    if actual != digest:
        raise DigestMismatchError(
            f"chunk {digest} has digest {actual} ({size_of(data)} bytes)",
            hint="the bytes are damaged; pull the model again or fetch it from another node",
        )
