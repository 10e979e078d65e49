"""Cache of what lowerings compute from stored tensors (repacked blocks, fused weights), memory-mapped like any chunk.

The key is (digests of the inputs, operation, name and version of the lowering): content addressing makes it safe to share
between models and never stale.  A derivation may give several arrays; they are kept as chunks with a small index that is
written last.  It is only a cache: without room on disk the fresh arrays are used, and `shoal gc` may drop all of it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from blake3 import blake3

from shoal.errors import DigestMismatchError, StorageFullError, UnavailableError
from shoal.ids import Digest
from shoal.model.spec import Array
from shoal.store.chunk import ref_of
from shoal.store.disk import DiskTier, write_whole
from shoal.store.manifest import TensorEntry
from shoal.store.quota import Quota
from shoal.store.tensor import open_array, to_raw
from shoal.store.verified import Verified


class DerivedKey(msgspec.Struct, frozen=True, kw_only=True):
    """What determines a derived value; `lowering` carries its version, for example "cpu-2"."""

    inputs: tuple[Digest, ...]
    op: str
    lowering: str

    def digest(self) -> Digest:
        """Name of the key's index file."""
        return Digest(blake3(msgspec.msgpack.encode(self)).hexdigest())


class DerivedCache:
    """Indexes at `root/index/<key>.json`, arrays at `root/ab/<digest>`."""

    def __init__(self, root: Path, *, tmp: Path, quota: Quota) -> None:
        self._index = root / "index"
        self._tmp = tmp
        self._tier = Verified(DiskTier(root, tmp=tmp, quota=quota))

    def arrays(self, key: DerivedKey, make: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
        """The arrays of *key*, read-only and mapped; made by *make* and kept when they are not here yet."""
        found = self._find(key)
        if found is not None:
            return found
        made = dict(make())
        try:
            self._keep(key, made)
        except (StorageFullError, FileNotFoundError):
            # No room, or `shoal gc` swept our temporary file: the answer is in our hands all the same.
            return made
        return self._find(key) or made

    def _find(self, key: DerivedKey) -> dict[str, Array] | None:
        try:
            entries = msgspec.json.decode(self._path(key).read_bytes(), type=tuple[TensorEntry, ...])
            return {entry.name: open_array(self._tier, entry) for entry in entries}
        except (FileNotFoundError, msgspec.MsgspecError, UnavailableError, DigestMismatchError):
            return None  # absent or damaged is the same to a cache: it is made again

    def _keep(self, key: DerivedKey, made: Mapping[str, Array]) -> None:
        entries = tuple(self._keep_array(name, array) for name, array in made.items())
        write_whole(self._path(key), msgspec.json.encode(entries), tmp=self._tmp, sync=False)

    def _keep_array(self, name: str, array: Array) -> TensorEntry:
        raw = to_raw(array, str(array.dtype), array.shape)
        ref = ref_of(raw)
        self._tier.put(ref.digest, raw)
        return TensorEntry(name=name, dtype=str(array.dtype), shape=array.shape, chunk=ref)

    def _path(self, key: DerivedKey) -> Path:
        return self._index / f"{key.digest()}.json"
