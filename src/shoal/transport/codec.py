"""How activations are written: exactly, in half precision, or as 8-bit integers per token.

RAW keeps every bit of any dtype.  FP16 and INT8 apply to float32 and record what they lose:

- FP16: |error| <= 2**-11 |x| + 2**-25; values beyond +-65504 are held at that bound.
- INT8: each row of the last axis (one token) has its own float32 scale, the largest magnitude / 127; |error| <= scale / 2 plus
  float32 rounding (rows below 1e-30 become zero).  A row that holds NaN or infinity comes back as NaN: the fault stays visible.

Each may be followed by zstd.  Sizes in a received description are never believed: decoding allocates only what the payload
proves, and at most what the caller allows.
"""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType

import ml_dtypes
import numpy as np
import zstandard
from numpy.typing import NDArray

from shoal.errors import InvalidRequestError, MalformedFrameError
from shoal.transport.parse import shown

Array = NDArray[np.generic]
Buffer = bytes | memoryview

_ZSTD_LEVEL = 1  # links that need zstd are slower than any level, but the boards behind them are slow too
_ZSTD_PIECE_BYTES = 1 << 20
_FP16_MAX = 65504.0
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 of it are still finite
_MAX_AXES = 32  # what every numpy allows
_DTYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        np.dtype(code).name: np.dtype(code)
        for code in (
            "?",
            "<i1",
            "<i2",
            "<i4",
            "<i8",
            "<u1",
            "<u2",
            "<u4",
            "<u8",
            "<f2",
            "<f4",
            "<f8",
            ml_dtypes.bfloat16,
        )
    }
)
_NAMES: Mapping[np.dtype[np.generic], str] = MappingProxyType({kind: name for name, kind in _DTYPES.items()})


class Codec(StrEnum):
    """Names as they stand in a frame's table and in a plan's edge."""

    RAW = "raw"
    FP16 = "fp16"
    INT8 = "int8"
    RAW_ZSTD = "raw+zstd"
    FP16_ZSTD = "fp16+zstd"
    INT8_ZSTD = "int8+zstd"

    @property
    def base(self) -> "Codec":
        """Without compression."""
        return Codec(self.value.removesuffix("+zstd"))

    @property
    def compressed(self) -> bool:
        """Whether zstd follows."""
        return self.value.endswith("+zstd")


def dtype_name(dtype: np.dtype[np.generic]) -> str:
    """The name of *dtype*, whether it travels or not: numpy takes microseconds to make one."""
    return _NAMES.get(dtype) or dtype.name


def name_of(dtype: np.dtype[np.generic]) -> str:
    """The name under which arrays of *dtype* travel; raises InvalidRequestError when they do not."""
    name = dtype_name(dtype)
    if name not in _DTYPES:
        raise InvalidRequestError(f"dtype {name!r} does not travel", hint=f"known are {', '.join(_DTYPES)}")
    return name


def dtype_of(name: str) -> np.dtype[np.generic]:
    """The little-endian dtype called *name*; raises MalformedFrameError for one that does not travel."""
    kind = _DTYPES.get(name)
    if kind is None:
        raise MalformedFrameError(f"dtype {shown(name)!r} does not travel; known are {', '.join(_DTYPES)}")
    return kind


def applied(codec: Codec, dtype: str) -> Codec:
    """What *codec* comes to for a tensor of *dtype*: the lossy ones are for float32, anything else stays exact."""
    if dtype == "float32" or codec is Codec.RAW:
        return codec
    return Codec.RAW_ZSTD if codec.compressed else Codec.RAW


def encode(array: Array, codec: Codec) -> list[Buffer]:
    """Bytes of *array* under *codec*, as parts to be written one after another.

    Raises InvalidRequestError for a dtype that does not travel, or a lossy codec on anything but float32.
    """
    name = name_of(array.dtype)
    exact = np.asarray(array, dtype=_DTYPES[name], order="C")
    if codec is Codec.RAW:
        return [_bytes_of(exact)]
    if codec is not applied(codec, name):
        raise InvalidRequestError(f"codec {codec} is for float32, not {name}", hint="use `applied` to choose")
    parts = _encode_base(exact, codec.base)
    if not codec.compressed:
        return parts
    return [zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(b"".join(parts))]


def decode(data: Buffer, codec: Codec, dtype: str, shape: Sequence[int], *, max_bytes: int) -> Array:
    """The array that `encode` was given (up to the codec's loss), a read-only view of *data* where that is possible.

    Raises MalformedFrameError when *data* does not have exactly the bytes that dtype and shape ask for, or these are more than
    *max_bytes*.
    """
    kind = dtype_of(dtype)
    _check_shape(shape, kind.itemsize, max_bytes)
    if codec is Codec.RAW:  # how frames travel on a fast link: in between two steps every question is felt
        _check_size(data, kind.itemsize * math.prod(shape), dtype, shape)
        return _view(data, kind, shape)
    if codec is not applied(codec, dtype):
        raise MalformedFrameError(f"codec {codec} is for float32, not {dtype}")
    size = encoded_bytes(codec, kind.itemsize, shape)
    plain = _unzstd(data, size) if codec.compressed else data
    _check_size(plain, size, dtype, shape)
    return _decode_base(plain, codec.base, kind, shape)


def encoded_bytes(codec: Codec, item_bytes: int, shape: Sequence[int]) -> int:
    """Size under an uncompressed codec; of a compressed one it is the size before zstd."""
    count = math.prod(shape)
    match codec.base:
        case Codec.FP16:
            return 2 * count
        case Codec.INT8:
            return count + 4 * _rows(shape)
        case _:
            return item_bytes * count


def _encode_base(array: Array, codec: Codec) -> list[Buffer]:
    if codec is Codec.FP16:
        return [_bytes_of(np.clip(array.astype(np.float32, copy=False), -_FP16_MAX, _FP16_MAX).astype("<f2"))]
    if codec is Codec.INT8:
        return _encode_int8(array.astype(np.float32, copy=False))
    return [_bytes_of(array)]


def _encode_int8(array: NDArray[np.float32]) -> list[Buffer]:
    rows = array.reshape(_rows(array.shape), array.shape[-1] if array.ndim else 1)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.abs(rows).max(axis=1, initial=0.0)
        # A subnormal scale would lose its own digits, and 1 / scale could overflow: such rows are zero for any model.
        scale = np.where(largest < np.float32(1e-30), np.float32(0), np.minimum(largest / np.float32(127), _MAX_SCALE))
        scale = np.where(np.isfinite(largest), scale, np.float32(np.nan)).astype("<f4")
        steps = np.divide(rows, scale[:, None], out=np.zeros_like(rows), where=scale[:, None] > 0)
    return [_bytes_of(scale), _bytes_of(np.rint(steps).astype(np.int8))]


def _decode_base(data: Buffer, codec: Codec, kind: np.dtype[np.generic], shape: Sequence[int]) -> Array:
    if codec is Codec.FP16:
        return np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(shape)
    if codec is not Codec.INT8:
        return _view(data, kind, shape)
    rows = _rows(shape)
    scale = np.frombuffer(data, dtype="<f4", count=rows)
    steps = np.frombuffer(data[4 * rows :], dtype=np.int8)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that we did not write is no reason to warn
        flat = steps.reshape(rows, -1).astype(np.float32) * scale[:, None] if steps.size else np.empty(0, np.float32)
    return flat.reshape(shape)


def _view(data: Buffer, kind: np.dtype[np.generic], shape: Sequence[int]) -> Array:
    view = np.ndarray(shape, kind, data)
    return view if view.flags.aligned else view.copy()


def _check_size(data: Buffer, size: int, dtype: str, shape: Sequence[int]) -> None:
    if len(data) != size:
        raise MalformedFrameError(
            f"{len(data)} bytes came for a {dtype} tensor of shape {tuple(shape)}, which has {size}"
        )


def _check_shape(shape: Sequence[int], item_bytes: int, max_bytes: int) -> None:
    """An axis of no entries does not excuse the others: numpy multiplies them all."""
    if len(shape) > _MAX_AXES or min(shape, default=0) < 0:
        raise MalformedFrameError(f"a shape of {len(shape)} axes, or one below 0, is not one of a tensor")
    sides = [side or 1 for side in shape] if 0 in shape else shape
    if math.prod(sides) * item_bytes > max_bytes:
        raise MalformedFrameError(f"a tensor of shape {tuple(shape)} is larger than {max_bytes} bytes")


def _unzstd(data: Buffer, size: int) -> bytes:
    """At most *size* + 1 bytes of what *data* decompresses to: a bomb costs no more than the tensor it claims to be."""
    pieces: list[bytes] = []
    left = size + 1
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            while left > 0 and (piece := reader.read(min(left, _ZSTD_PIECE_BYTES))):
                pieces.append(piece)
                left -= len(piece)
    except zstandard.ZstdError as error:
        raise MalformedFrameError(f"{len(data)} compressed bytes do not decompress: {error}") from error
    return b"".join(pieces)


def _rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1]) if len(shape) else 1


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
