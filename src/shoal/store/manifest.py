"""The list of chunks that is a model (ADR 2): small, signed later, fetched first.

A manifest is the unit of naming: a model's version is the digest of its manifest's bytes.  Tensors are chunks of raw little-endian
bytes in C order (sub-byte types packed as ONNX packs them); the graph is a serialized `onnx.ModelProto` with external stubs.
"""

import msgspec

from shoal.ids import Digest
from shoal.model.spec import ModelSpec

MANIFEST_VERSION = 1


class ChunkRef(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by content: `digest` is BLAKE3 of exactly `size_bytes` bytes."""

    digest: Digest
    size_bytes: int


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One initializer; `dtype` is ONNX's element type in lower case (`float32`, `float16`, `uint8`, `uint4`, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: ChunkRef


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A small file that travels with the model, for example `tokenizer.json`."""

    name: str
    chunk: ChunkRef


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a model was imported from: an equal origin need not be imported again.

    `reference` is canonical (a local file is named without its folder: manifests travel); `sha256` is that of the main
    file's bytes; `quantise` is what the importer was asked for ("" for the file's own numbers).
    """

    reference: str
    sha256: str = ""
    quantise: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A model as stored and exchanged."""

    version: int = MANIFEST_VERSION
    spec: ModelSpec
    graph: ChunkRef
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...] = ()
    origin: Origin | None = None

    def chunks(self) -> dict[Digest, int]:
        """Size in bytes of every chunk, each once: graph, then files, then tensors."""
        refs = (self.graph, *(f.chunk for f in self.files), *(t.chunk for t in self.tensors))
        return {ref.digest: ref.size_bytes for ref in refs}

    def size_bytes(self) -> int:
        """Bytes of all chunks, each counted once."""
        return sum(self.chunks().values())
