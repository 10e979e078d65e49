"""From an imported model to chunks and a manifest.

Tensors are asked for, hashed and written one by one, so that the peak of an import is one tensor.  Hashing before writing
lets a tensor that is already here (a second import, a tied embedding, another version of the model) cost no write at all.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import onnx

from shoal.errors import CorruptFileError, ShoalError, StorageFullError
from shoal.ids import Digest
from shoal.model.spec import Array, ImportedModel
from shoal.store.chunk import Data, ref_of
from shoal.store.home import Store
from shoal.store.manifest import ChunkRef, FileEntry, Manifest, Origin, TensorEntry
from shoal.store.quota import free_bytes, quota_error
from shoal.store.tensor import dtype_name, stored_bytes, to_raw
from shoal.store.tier import Tier


def write_model(
    store: Store,
    imported: ImportedModel,
    *,
    origin: Origin | None = None,
    written: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write every chunk of *imported* and return its manifest, not yet published.

    *written* is called with the bytes of each tensor.  Raises StorageFullError (before writing where the sizes tell) and
    CorruptFileError when a tensor is not what the graph says.
    """
    stubs = list(external_tensors(imported.graph))
    _check_room(store, imported.spec.name, sum(_stub_bytes(stub) for stub in stubs))
    entries = []
    for stub in stubs:
        entries.append(_write_tensor(store.disk, stub, imported.tensors))
        written(entries[-1].chunk.size_bytes)
    files = tuple(FileEntry(name=name, chunk=_put(store.disk, data)) for name, data in sorted(imported.files.items()))
    graph = _put(store.disk, imported.graph.SerializeToString(deterministic=True))
    return Manifest(spec=imported.spec, graph=graph, tensors=tuple(entries), files=files, origin=origin)


def _put(tier: Tier, data: Data) -> ChunkRef:
    ref = ref_of(data)
    tier.put(ref.digest, data)
    return ref


def _write_tensor(tier: Tier, stub: onnx.TensorProto, tensors: Mapping[str, Callable[[], Array]]) -> TensorEntry:
    if stub.name not in tensors:
        raise CorruptFileError(
            f"the graph has no data for tensor {stub.name}", hint="check that the model's files are complete"
        )
    dtype, shape = dtype_name(stub.data_type), tuple(stub.dims)
    try:
        raw = to_raw(tensors[stub.name](), dtype, shape)
    except CorruptFileError as error:
        raise CorruptFileError(
            f"tensor {stub.name}: {error.message}", hint="check that the model's files are complete"
        ) from error
    return TensorEntry(name=stub.name, dtype=dtype, shape=shape, chunk=_put(tier, raw))


def _check_room(store: Store, name: str, needed_bytes: int) -> None:
    """Refuse at once what cannot fit; what is on disk already for *name* itself is not counted against it."""
    limit_bytes = store.quota.limit_bytes
    if limit_bytes is not None:
        used_bytes = _held_by_others(store, name)
        if used_bytes + needed_bytes > limit_bytes:
            raise quota_error(needed_bytes=needed_bytes, used_bytes=used_bytes, limit_bytes=limit_bytes)
    free = free_bytes(store.home)
    if needed_bytes > free and store.library.find(name) is None:
        raise StorageFullError(
            f"{name} needs {needed_bytes} bytes on disk and {free} are free below {store.home}",
            hint="free space (`shoal rm NAME`, `shoal gc`), or set SHOAL_HOME to a folder on a larger disk",
        )


def _held_by_others(store: Store, name: str) -> int:
    chunks: dict[Digest, int] = {}
    for other in store.library.names():
        with contextlib.suppress(ShoalError):  # damaged or just being removed: the quota counts its chunks on disk
            chunks |= store.library.read(other).chunks() if other != name else {}
    return sum(chunks.values())


def _stub_bytes(stub: onnx.TensorProto) -> int:
    return stored_bytes(dtype_name(stub.data_type), stub.dims)


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """External initializers of the graph and of the graphs inside its control flow."""
    return _stubs_of(model.graph)


def _stubs_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from (tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        inner = [attribute.g, *attribute.graphs] if attribute.type in _GRAPHS else []
        for subgraph in inner:
            yield from _stubs_of(subgraph)


_GRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})
