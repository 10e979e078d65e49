"""Reading the frame of a GGUF file: metadata and where the tensors lie (GGUF versions 2 and 3, little-endian).

The `gguf` package has a reader, and we take its tables of types and sizes; but it believes every length in the file, so that one
flipped bit makes it loop for hours or fill the memory, and it spends seconds on large vocabularies.  This one checks each length
against what is left of the file before using it: any bytes give a `GgufFile`, CorruptFileError or UnsupportedModelError.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from shoal.errors import CorruptFileError, UnsupportedModelError

Bytes = NDArray[np.uint8]
Value = bool | int | float | str | list["Value"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NESTING = 4
MAX_ITEMS = 2**24
"""Of a list in the metadata: a hundred times the largest vocabulary, and what a list of Python objects may cost."""
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_DOWNLOAD_AGAIN = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as it lies in the file; `shape` is in C order (rows first)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    raw: Bytes

    def blocks(self) -> Bytes:
        """The bytes as [rows, blocks per row, bytes per block]."""
        _, type_bytes = GGML_QUANT_SIZES[self.type]
        return self.raw.reshape(math.prod(self.shape[:-1]), -1, type_bytes)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata by key and tensors by name, memory-mapped."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Map a file and read its frame; raises CorruptFileError, UnsupportedModelError (version, tensor type) or OSError."""
    if path.stat().st_size < len(MAGIC):
        raise CorruptFileError(f"{path.name} is too short for a GGUF file", hint=_DOWNLOAD_AGAIN)
    return parse_gguf(np.memmap(path, dtype=np.uint8, mode="r"))


def parse_gguf(data: Bytes) -> GgufFile:
    """Read the frame of a whole file in memory; `raw` of its tensors are views of *data*."""
    cursor = _Cursor(data.data)
    if cursor.take(4) != MAGIC:
        raise CorruptFileError(
            "not a GGUF file: it does not begin with GGUF", hint="check the path, or download it again"
        )
    version = int(cursor.scalar("I"))
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"GGUF version {version:#x} is not supported (only little-endian 2 and 3)", hint="convert the file anew"
        )
    tensor_count, key_count = int(cursor.scalar("Q")), int(cursor.scalar("Q"))
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(int(cursor.scalar("I")))
    headers = [_tensor_header(cursor) for _ in range(tensor_count)]
    start = _align(cursor.at, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    tensors = {name: _tensor(data, start, name, shape, kind, offset) for name, shape, kind, offset in headers}
    if len(tensors) != len(headers):
        raise CorruptFileError("two tensors of the file have one name", hint=_DOWNLOAD_AGAIN)
    return GgufFile(metadata, tensors)


@dataclass(slots=True)
class _Cursor:
    """A position in the file; nothing is read or reserved beyond its end."""

    data: memoryview
    at: int = 0

    def take(self, size_bytes: int) -> bytes:
        end = self.at + size_bytes
        if end > len(self.data):
            raise CorruptFileError(
                f"the file ends at byte {len(self.data)} inside its header, which needs at least {end}",
                hint=_DOWNLOAD_AGAIN,
            )
        taken = bytes(self.data[self.at : end])
        self.at = end
        return taken

    def scalar(self, code: str) -> bool | float:
        unpacked: tuple[bool | float] = struct.unpack("<" + code, self.take(struct.calcsize(code)))
        return unpacked[0]

    def string(self) -> str:
        raw = self.take(int(self.scalar("Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"a string before byte {self.at} is not UTF-8", hint=_DOWNLOAD_AGAIN) from error

    def value(self, kind: int, depth: int = 0) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < MAX_NESTING:
            return self.array(depth)
        if kind not in _SCALARS:
            raise CorruptFileError(f"metadata of unknown kind {kind} before byte {self.at}", hint=_DOWNLOAD_AGAIN)
        return self.scalar(_SCALARS[kind])

    def array(self, depth: int) -> list[Value]:
        kind, count = int(self.scalar("I")), int(self.scalar("Q"))
        if count > MAX_ITEMS:
            raise CorruptFileError(f"a list of {count} items before byte {self.at}", hint=_DOWNLOAD_AGAIN)
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        return [self.value(kind, depth + 1) for _ in range(count)]


def _align(at: int, alignment: Value) -> int:
    if not isinstance(alignment, int) or alignment <= 0:
        raise CorruptFileError(f"alignment {alignment!r} is not a positive number", hint=_DOWNLOAD_AGAIN)
    return -(-at // alignment) * alignment


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string()
    dimensions = int(cursor.scalar("I"))
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise CorruptFileError(
            f"tensor {name} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}", hint=_DOWNLOAD_AGAIN
        )
    shape = tuple(int(cursor.scalar("Q")) for _ in range(dimensions))[::-1]
    kind, offset = int(cursor.scalar("I")), int(cursor.scalar("Q"))
    if kind not in {int(t) for t in GGMLQuantizationType}:
        raise UnsupportedModelError(
            f"tensor {name} has the unknown type {kind}", hint="choose a file in Q4_K_M, Q8_0 or F16"
        )
    return name, shape, GGMLQuantizationType(kind), offset


def _tensor(
    data: Bytes, start: int, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> GgufTensor:
    block, type_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block or 0 in shape:
        raise CorruptFileError(f"tensor {name} of shape {shape} is not whole blocks of {block}", hint=_DOWNLOAD_AGAIN)
    begin = start + offset
    end = begin + math.prod(shape) // block * type_bytes
    if end > len(data):
        raise CorruptFileError(f"the file has {len(data)} bytes, but tensor {name} ends at {end}", hint=_DOWNLOAD_AGAIN)
    return GgufTensor(name, kind, shape, data[begin:end])
