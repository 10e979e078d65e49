"""How activations are written: exactly, in half precision, or as 8-bit integers per token.

RAW keeps every bit of any dtype.  The others apply to float32 and record what they lose:

- FP16: |error| <= 2**-11 |x| + 2**-25; values beyond +-65504 are held at that bound.
- INT8: each row of the last axis (one token) has its own float32 scale, the largest magnitude / 127; |error| <= scale / 2 plus
  float32 rounding (rows below 1e-30 become zero).  A row that holds NaN or infinity comes back as NaN: the fault stays visible.
- INT8_PEAKS: as INT8, but the four largest magnitudes of a row travel beside it as float32.  Hidden states have a few channels
  that are far larger than the rest and set its scale; without them it is as fine as the rest needs.  24 bytes more a row.

Each may be followed by zstd.  Sizes in a received description are never believed: decoding allocates only what the payload
proves, and at most what the caller allows.
"""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any

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
_PEAKS = 4
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
    INT8_PEAKS = "int8+peaks"
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
        case Codec.INT8_PEAKS:
            width = _width(shape)
            return count + _rows(shape) * (4 + _peaks(width) * (4 + _index_of(width).itemsize))
        case _:
            return item_bytes * count


def _encode_base(array: Array, codec: Codec) -> list[Buffer]:
    if codec is Codec.FP16:
        return [_bytes_of(np.clip(array.astype(np.float32, copy=False), -_FP16_MAX, _FP16_MAX).astype("<f2"))]
    if codec is Codec.INT8:
        return _encode_int8(_as_rows(array))
    if codec is Codec.INT8_PEAKS:
        return _encode_peaks(_as_rows(array))
    return [_bytes_of(array)]


def _as_rows(array: Array) -> NDArray[np.float32]:
    return array.astype(np.float32, copy=False).reshape(_rows(array.shape), _width(array.shape))


def _encode_peaks(rows: NDArray[np.float32]) -> list[Buffer]:
    width = rows.shape[1]
    count = _peaks(width)
    if not rows.size:
        return _encode_int8(rows)
    at, row = _largest(np.abs(rows), count), np.arange(len(rows))[:, None]
    peaks, rest = rows[row, at], rows.copy()
    with np.errstate(invalid="ignore"):
        rest[row, at] = peaks * 0  # NaN for a peak that is not finite: it would stand in a row that looks sound
    scale, steps = _encode_int8(rest)
    return [scale, _bytes_of(peaks.astype("<f4")), _bytes_of(at.astype(_index_of(width))), steps]


def _largest(magnitudes: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """[rows, count] where the largest of each row are; uses *magnitudes* up.  A few passes are quicker than a partition."""
    row, found = np.arange(len(magnitudes)), np.empty((len(magnitudes), count), np.intp)
    for place in range(count):
        found[:, place] = magnitudes.argmax(axis=1)  # of NaN the first
        magnitudes[row, found[:, place]] = -1
    return found


def _encode_int8(rows: NDArray[np.float32]) -> list[Buffer]:
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
    if codec not in {Codec.INT8, Codec.INT8_PEAKS}:
        return _view(data, kind, shape)
    rows, width = _rows(shape), _width(shape)
    if not rows * width:
        return np.empty(shape, np.float32)
    scale = np.frombuffer(data, dtype="<f4", count=rows)
    steps = np.frombuffer(data[len(data) - rows * width :], dtype=np.int8)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that we did not write is no reason to warn
        flat: NDArray[np.float32] = steps.reshape(rows, width).astype(np.float32) * scale[:, None]
    if codec is Codec.INT8_PEAKS:
        _put_peaks(flat, data[4 * rows :])
    return flat.reshape(shape)


def _put_peaks(rows: NDArray[np.float32], data: Buffer) -> None:
    """Over the rest, except where a row is not finite: that stays so."""
    count, width = rows.shape[0] * _peaks(rows.shape[1]), rows.shape[1]
    peaks = np.frombuffer(data, dtype="<f4", count=count).reshape(len(rows), -1)
    at = np.frombuffer(data[4 * count :], dtype=_index_of(width), count=count).reshape(peaks.shape)
    if at.max() >= width:
        raise MalformedFrameError(f"a peak at {at.max()} of a row of {width}")
    row = np.arange(len(rows))[:, None]
    rows[row, at] = peaks + rows[:, :1] * 0  # NaN in a row that is


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


def _width(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) else 1


def _peaks(width: int) -> int:
    """How many values of a row travel beside it."""
    return min(_PEAKS, width)


def _index_of(width: int) -> np.dtype[Any]:
    return np.dtype("<u2" if width <= 1 << 16 else "<u4")


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
