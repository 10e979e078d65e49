"""Where a node keeps its artifacts, and who may change them at once.

    <home>/models/<name>.json   manifests                   <home>/partial/   downloads that can be resumed
    <home>/chunks/ab/<digest>   chunks                      <home>/tmp/       files being written; dead ones are swept
    <home>/derived/             what lowerings computed     <home>/locks/     one file per model, one for fetches, and `gate`

Two rules make collecting safe without a database.  Who writes chunks of a model holds that model's lock until its manifest is
published; who fetches them from other nodes, the lock of fetches.  Locks are taken while holding `gate` for a moment; the
collector holds `gate` throughout and refuses to run while any is taken.  So it never sees a chunk whose manifest is still to
come, nor a temporary file of a live writer.
Reading takes no lock: files appear whole, and a mapped file that is removed stays readable.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from shoal.errors import UnavailableError
from shoal.ids import Digest
from shoal.store.derived import DerivedCache
from shoal.store.disk import DiskTier, home_named
from shoal.store.library import Library, check_name
from shoal.store.lock import try_locked
from shoal.store.manifest import Manifest
from shoal.store.quota import Quota
from shoal.store.tensor import read_chunk
from shoal.store.tier import Tier
from shoal.store.verified import Verified

_POLL_S = 0.1
_FETCHES = "+fetches"
"""The lock of fetches; no model can be called so (`check_name`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """The artifacts of one node.  `chunks` verifies what it gives; `disk` is the same tier unverified."""

    home: Path
    disk: DiskTier
    chunks: Tier
    library: Library
    derived: DerivedCache
    quota: Quota

    @property
    def tmp(self) -> Path:
        """Folder for files being written; swept by the next writer."""
        return self.home / "tmp"

    @property
    def partial(self) -> Path:
        """Folder for downloads that can be resumed."""
        return self.home / "partial"


def open_store(home: Path, *, quota_bytes: int | None = None) -> Store:
    """The store below *home*; folders are made when first written to."""
    tmp = home / "tmp"
    quota = Quota(quota_bytes, home / "chunks", home / "derived")
    disk = DiskTier(home / "chunks", tmp=tmp, quota=quota)
    chunks = Verified(disk)
    library = Library(home / "models", tmp=tmp, chunks=chunks)
    return Store(
        home=home,
        disk=disk,
        chunks=chunks,
        library=library,
        derived=DerivedCache(home / "derived", tmp=tmp, quota=quota),
        quota=quota,
    )


def missing_bytes(store: Store, manifest: Manifest) -> dict[Digest, int]:
    """Chunks of *manifest* that are not on disk with their right size (content is verified when it is read)."""
    return {digest: size for digest, size in manifest.chunks().items() if store.disk.size_bytes(digest) != size}


def read_graph(tier: Tier, manifest: Manifest) -> onnx.ModelProto:
    """The model's graph; initializers above 1 KiB are external stubs."""
    data = read_chunk(tier, manifest.graph.digest, f"graph of {manifest.spec.name}")
    return onnx.ModelProto.FromString(bytes(data))


def read_file(tier: Tier, manifest: Manifest, name: str) -> bytes | None:
    """A small file of the model, or None when the model has none of that name."""
    refs = {file.name: file.chunk for file in manifest.files}
    if name not in refs:
        return None
    return bytes(read_chunk(tier, refs[name].digest, f"file {name} of {manifest.spec.name}"))


@contextlib.contextmanager
def writing(store: Store, name: str, *, waiting: Callable[[], None] | None = None) -> Iterator[Path]:
    """Be the only writer of model *name* for the block; gives an empty folder for its temporary files.

    Waits for another writer of the same model, calling *waiting* once; sweeps what dead writers left when nobody else writes.
    """
    with _alone(store, check_name(name), waiting) as folder:
        yield folder


@contextlib.contextmanager
def fetching(store: Store, *, limit_s: float = float("inf")) -> Iterator[None]:
    """Be the only one who fetches for the block: partial files have one writer, and the link is not shared with ourselves.

    Raises UnavailableError when it is not our turn within *limit_s*.
    """
    with _alone(store, _FETCHES, None, limit_s=limit_s):
        yield


@contextlib.contextmanager
def _alone(
    store: Store, name: str, waiting: Callable[[], None] | None, *, limit_s: float = float("inf")
) -> Iterator[Path]:
    path, waited_s = store.home / "locks" / f"{name}.lock", 0.0
    with home_named(store.home), contextlib.ExitStack() as held:
        while not _enter(store, path, held):
            if waiting is not None:
                waiting()
                waiting = None
            if waited_s >= limit_s:
                raise UnavailableError(
                    f"another fetch, or `shoal gc`, is still at work in {store.home} after {limit_s:.0f} s",
                    hint="wait until it is done, then try again",
                )
            time.sleep(_POLL_S)
            waited_s += _POLL_S
        folder = store.tmp / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _enter(store: Store, path: Path, held: contextlib.ExitStack) -> bool:
    """Take the model's lock into *held*; False when gate or lock is taken."""
    with try_locked(store.home / "locks" / "gate") as at_gate:
        if not at_gate:
            return False
        attempt = contextlib.ExitStack()
        if not attempt.enter_context(try_locked(path)):
            attempt.close()
            return False
        held.push(attempt.pop_all())
        if not _writers(store, besides=path):
            shutil.rmtree(store.tmp, ignore_errors=True)
        return True


@contextlib.contextmanager
def nobody_writing(store: Store) -> Iterator[None]:
    """Keep writers out for the block; raises UnavailableError when there is one, and what `home_named` raises."""
    with home_named(store.home), try_locked(store.home / "locks" / "gate") as at_gate:
        writers = _writers(store) if at_gate else ["another `shoal gc`"]
        if writers:
            raise UnavailableError(
                f"{', '.join(writers)} is at work in {store.home}", hint="wait until it is done, then try again"
            )
        yield


@contextlib.contextmanager
def only_writer(store: Store, name: str) -> Iterator[bool]:
    """Whether the writer of model *name* is the only one; no other begins within the block."""
    with try_locked(store.home / "locks" / "gate") as at_gate:
        yield at_gate and not _writers(store, besides=store.home / "locks" / f"{check_name(name)}.lock")


def download_quota(store: Store) -> Quota:
    """The quota as it stands now for a download: unfinished ones count as well."""
    return Quota(store.quota.limit_bytes, store.home / "chunks", store.home / "derived", store.partial)


def _writers(store: Store, *, besides: Path | None = None) -> list[str]:
    """Who holds a lock, in words; to be asked at the gate."""
    return [
        "a fetch from another node" if path.stem == _FETCHES else f"a pull of {path.stem}"
        for path in sorted((store.home / "locks").glob("*.lock"))
        if path != besides and _is_locked(path)
    ]


def _is_locked(path: Path) -> bool:
    with try_locked(path) as free:
        return not free
