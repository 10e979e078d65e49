"""What may go: chunks that no manifest in use names, derived tensors, downloads that were not finished, temporary files."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.ids import Digest
from shoal.store.home import Store, nobody_writing, only_writer
from shoal.store.library import decode_manifest
from shoal.store.quota import used_bytes


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """What collecting would free, or has freed, in bytes."""

    chunks: int
    chunks_bytes: int
    derived_bytes: int
    partial_bytes: int
    """Unfinished downloads: removing them only costs their resumption."""
    tmp_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.chunks_bytes + self.derived_bytes + self.partial_bytes + self.tmp_bytes


def collect(store: Store, *, in_use: Iterable[Digest] = (), dry_run: bool = False) -> Garbage:
    """Remove garbage (or, with *dry_run*, only count it); raises UnavailableError while somebody writes.

    *in_use* are manifests to keep with their chunks although no name in the library leads to them.  A manifest
    that does not parse raises CorruptFileError: what it named must not be thrown away on a guess.
    """
    with nobody_writing(store):
        loose = _unreferenced(store, in_use)
        folders = [store.home / "derived", store.partial, store.tmp]
        derived, partial, tmp = (used_bytes(folder) for folder in folders)
        if not dry_run:
            _remove(store, loose, folders)
        return Garbage(
            chunks=len(loose),
            chunks_bytes=sum(loose.values()),
            derived_bytes=derived,
            partial_bytes=partial,
            tmp_bytes=tmp,
        )


@contextlib.contextmanager
def withdrawn_on_failure(store: Store, name: str) -> Iterator[None]:
    """Drop the chunks that the block, the writer of model *name*, wrote before it failed or was interrupted.

    A chunk may have found another owner meanwhile: those that a manifest names stay, and while somebody else writes all of
    them are left to `collect`.
    """
    before = store.disk.sizes_bytes()
    try:
        yield
    except BaseException:
        with contextlib.suppress(ShoalError, OSError), only_writer(store, name) as alone:
            for digest in _unreferenced(store, ()).keys() - before.keys() if alone else ():
                store.disk.drop(digest)
        raise


def _unreferenced(store: Store, in_use: Iterable[Digest]) -> dict[Digest, int]:
    kept: set[Digest] = set()
    for name in store.library.names():
        kept |= store.library.read(name).chunks().keys()
        kept.add(store.library.digest(name))
    for digest in in_use:
        data = store.chunks.get(digest)
        if data is not None:
            kept |= {digest, *decode_manifest(data, f"manifest {digest}").chunks()}
    return {digest: size for digest, size in store.disk.sizes_bytes().items() if digest not in kept}


def _remove(store: Store, loose: dict[Digest, int], folders: list[Path]) -> None:
    for digest in loose:
        store.disk.drop(digest)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
