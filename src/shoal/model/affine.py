"""How a weight matrix is stored: dense, or in blocks of affine-quantised numbers.

Every block format of GGUF and of our own quantiser is one formula, w = d * (q - zero_point) + m, with one d (and m, if any) per
block of consecutive elements of a row.  `q` lies in memory as ONNX Runtime's MatMulNBits reads it, so that lowering uses the
bytes as they are: uint8 [rows, blocks, block] for 8 bits; for 4 bits uint8 [rows, blocks, block / 2] with element 2j in the low
and 2j + 1 in the high nibble.  8-bit numbers are shifted so that the zero point is 128, that kernel's default.  5- and 6-bit
numbers take a whole byte: exact, and the engine has no kernel for them.

A tensor `blk.0.attn_q.weight` in blocks is stored as the arrays `blk.0.attn_q.weight.q`, `.d` and, if affine, `.m`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

FLOAT_DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Dense(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Plain numbers; `dtype` is float32, float16 or bfloat16."""

    dtype: str = "float32"


class Blocked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """w = d * (q - zero_point) + m.  `bits` is 4 or 8, `scale` the dtype of d and m, `affine` says whether there is an m."""

    bits: int
    block: int
    zero_point: int
    affine: bool
    scale: str = "float16"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Name endings of the stored arrays, in the order of the operators' inputs."""
        return (".q", ".d", ".m") if self.affine else (".q", ".d")


Format = Dense | Blocked


@dataclass(frozen=True, slots=True)
class Blocks:
    """Arrays of one matrix in blocks: q uint8 [rows, blocks, bytes], d and m [rows, blocks]."""

    q: Bytes
    d: Array
    m: Array | None = None

    def part(self, suffix: str) -> Array:
        """Return the array stored under a name ending (".q", ".d", ".m")."""
        found = {".q": self.q, ".d": self.d, ".m": self.m}[suffix]
        if found is None:
            raise KeyError(suffix)
        return found


def part_shape(suffix: str, form: Blocked, shape: tuple[int, int]) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of the array that `suffix` names, for a matrix of *shape* [rows, columns]."""
    rows, columns = shape
    blocks = columns // form.block
    if suffix == ".q":
        return "uint8", (rows, blocks, form.block * form.bits // 8)
    return form.scale, (rows, blocks)


def pack_nibbles(values: Bytes) -> Bytes:
    """Pack numbers below 16 two to a byte along the last axis, the even element in the low nibble."""
    packed: Bytes = values[..., 0::2] | (values[..., 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: Bytes) -> Bytes:
    """Undo `pack_nibbles`."""
    pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def dequantise(blocks: Blocks, form: Blocked) -> Floats:
    """Return the matrix [rows, columns] in fp32."""
    q = unpack_nibbles(blocks.q) if form.bits == 4 else blocks.q
    w = (q.astype(np.float32) - np.float32(form.zero_point)) * blocks.d.astype(np.float32)[..., None]
    if blocks.m is not None:
        w += blocks.m.astype(np.float32)[..., None]
    return w.reshape(len(w), -1)
