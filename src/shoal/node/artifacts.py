"""From a manifest in the store to what an engine loads: the one path that agents (fetching) and workers (loading) share."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from shoal.errors import UnavailableError
from shoal.ids import Digest, NodeId
from shoal.model.derive import Derivation, derive, is_view
from shoal.model.frontier import Block, blocks
from shoal.model.frontier import shard as shard_graph
from shoal.model.lower import lower
from shoal.model.spec import Array
from shoal.runtime.ports import Shard
from shoal.store.derived import DerivedKey
from shoal.store.fetch import Fetcher
from shoal.store.home import Store, read_graph
from shoal.store.library import decode_manifest
from shoal.store.manifest import Manifest, TensorEntry
from shoal.store.tensor import open_array

_KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A model's manifest and graph, cut into blocks; weights stay where they are."""

    digest: Digest
    manifest: Manifest
    graph: onnx.ModelProto
    blocks: tuple[Block, ...]


def open_artifact(store: Store, digest: Digest) -> Artifact:
    """Read manifest and graph from the store; raises UnavailableError when they are not here."""
    data = store.chunks.get(digest)
    if data is None:
        raise UnavailableError(
            f"manifest {digest} is not on this node", hint="pull the model, or name a node that has it"
        )
    manifest = decode_manifest(bytes(data), f"manifest {digest}")
    graph = read_graph(store.chunks, manifest)
    return Artifact(digest=digest, manifest=manifest, graph=graph, blocks=blocks(graph))


class Artifacts:
    """The artifacts that a node opened last, for any thread.

    A digest's manifest never changes, and cutting its graph into blocks keeps the interpreter busy for a fifth of a second.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._opened: OrderedDict[Digest, Artifact] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, digest: Digest) -> Artifact:
        """As `open_artifact`."""
        with self._lock:
            if digest not in self._opened:
                self._opened[digest] = open_artifact(self._store, digest)
            self._opened.move_to_end(digest)
            if len(self._opened) > _KEPT:
                self._opened.popitem(last=False)
            return self._opened[digest]


def fetch_artifact(fetcher: Fetcher, artifacts: Artifacts, digest: Digest, sources: Sequence[NodeId]) -> Artifact:
    """Have manifest, graph and small files here, from here or from *sources*.  Blocks: run it on a thread."""
    fetcher.model(digest, sources, lambda manifest: [manifest.graph, *(f.chunk for f in manifest.files)])
    return artifacts.open(digest)


def shard_tensors(artifact: Artifact, start: int, stop: int) -> tuple[TensorEntry, ...]:
    """The stored tensors that the blocks [*start*, *stop*) need, each once."""
    names = {t.name for block in artifact.blocks[start:stop] for t in block.tensors}
    return tuple(entry for entry in artifact.manifest.tensors if entry.name in names)


def fetch_shard(
    fetcher: Fetcher,
    artifact: Artifact,
    span: tuple[int, int],
    sources: Sequence[NodeId],
    arrived: Callable[[int], None],
) -> None:
    """Have the chunks of the half-open block range *span* here.  Blocks: run it on a thread."""
    wanted = [entry.chunk for entry in shard_tensors(artifact, *span)]
    fetcher.model(artifact.digest, sources, lambda _: wanted, arrived=arrived)


def load_shard(
    store: Store, artifact: Artifact, span: tuple[int, int], *, slots: int, context_tokens: int, threads: int
) -> Shard:
    """The lowered subgraph of *span* with its weights memory-mapped; derived tensors come from their cache."""
    part = shard_graph(artifact.graph, artifact.blocks, *span)
    lowered = lower(part, context_tokens=context_tokens or None)
    entries = {entry.name: entry for entry in artifact.manifest.tensors}
    opened: dict[str, Array] = {}

    def stored(name: str) -> Array:
        if name not in opened:
            opened[name] = open_array(store.chunks, entries[name])
        return opened[name]

    wanted = {t.name for t in lowered.graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    made = {d.name: _derived(store, lowered.name, d, entries, stored) for d in lowered.derived}
    tensors = {name: made[name] if name in made else stored(name) for name in wanted}
    stateful = any(block.kv_layers for block in artifact.blocks[slice(*span)])
    return Shard(
        graph=lowered.graph,
        tensors=tensors,
        slots=slots if stateful else 0,
        context_tokens=context_tokens if stateful else 0,
        threads=threads,
    )


def _derived(
    store: Store,
    lowering: str,
    derivation: Derivation,
    entries: Mapping[str, TensorEntry],
    stored: Callable[[str], Array],
) -> Array:
    if is_view(derivation.op):
        return derive(derivation.op, [stored(name) for name in derivation.inputs])
    key = DerivedKey(
        inputs=tuple(entries[name].chunk.digest for name in derivation.inputs), op=derivation.op, lowering=lowering
    )

    def make() -> dict[str, Array]:
        return {"value": derive(derivation.op, [stored(name) for name in derivation.inputs])}

    return store.derived.arrays(key, make)["value"]
