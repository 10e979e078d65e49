"""Tensors as chunks: raw little-endian bytes in C order, memory-mapped back as arrays.

The element type is named as numpy (with ml_dtypes) names it: `float32`, `bfloat16`, `uint8`, `uint4`.  Types below one byte
stay packed two (four) to a byte as ONNX packs them, and come back as flat `uint8` arrays: an engine takes them like that.
"""

import math
import sys
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from shoal.errors import CorruptFileError, DigestMismatchError, UnavailableError, UnsupportedModelError
from shoal.ids import Digest
from shoal.model.spec import Array
from shoal.store.manifest import TensorEntry
from shoal.store.tier import Tier

_PACKED_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}


def dtype_name(element_type: int) -> str:
    """Name of an ONNX element type; raises UnsupportedModelError for strings and undefined types."""
    if element_type in {onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED}:
        name = onnx.TensorProto.DataType.Name(element_type)
        raise UnsupportedModelError(f"a tensor of type {name} cannot be stored as raw bytes")
    return str(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def stored_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor as stored."""
    count = math.prod(shape)
    bits = _PACKED_BITS.get(dtype)
    return count * np_dtype(dtype).itemsize if bits is None else -(-count * bits // 8)


def np_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy type of a name of ours."""
    extra = getattr(ml_dtypes, name, None)
    return np.dtype(name if extra is None else extra)


def to_raw(array: Array, dtype: str, shape: tuple[int, ...]) -> memoryview:
    """*array* as stored (no copy where it lies so already); raises CorruptFileError when it is not *shape* of *dtype*."""
    bits = _PACKED_BITS.get(dtype)
    if bits is not None and str(array.dtype) == dtype:
        array = _pack(array, bits)
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if raw.nbytes != stored_bytes(dtype, shape):
        raise CorruptFileError(
            f"{raw.nbytes} bytes are no {dtype} tensor of shape {list(shape)} ({stored_bytes(dtype, shape)} bytes)"
        )
    return raw.data


def _pack(array: Array, bits: int) -> NDArray[np.uint8]:
    """Elements of *bits* bits, lowest bits first, as ONNX packs them."""
    per_byte = 8 // bits
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
    padded[: flat.size] = flat
    lanes = padded.reshape(-1, per_byte) << (np.arange(per_byte, dtype=np.uint8) * bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(lanes, axis=1).astype(np.uint8)
    return packed


def open_array(tier: Tier, entry: TensorEntry) -> Array:
    """The tensor, read-only and mapped where *tier* maps; wrap *tier* in `Verified` unless it was verified before.

    Shape is `entry.shape`, or flat packed `uint8` for types below one byte.  Raises UnavailableError when the chunk is not
    here and DigestMismatchError when its size is wrong.
    """
    data = read_chunk(tier, entry.chunk.digest, f"tensor {entry.name}")
    wanted_bytes = stored_bytes(entry.dtype, entry.shape)
    if data.nbytes != wanted_bytes:
        shape = list(entry.shape)
        raise DigestMismatchError(
            f"tensor {entry.name} has {data.nbytes} bytes where {entry.dtype} {shape} has {wanted_bytes}",
            hint="pull the model again",
        )
    if entry.dtype in _PACKED_BITS:
        return np.frombuffer(data, np.uint8)
    return np.frombuffer(data, np_dtype(entry.dtype)).reshape(entry.shape)


def read_chunk(tier: Tier, digest: Digest, what: str) -> memoryview:
    """The chunk's bytes; raises UnavailableError that says *what* is missing."""
    data = tier.get(digest)
    if data is None:
        raise UnavailableError(
            f"{what} (chunk {digest}) is not on this machine",
            hint="pull the model again, or fetch it from a node that has it",
        )
    return data
