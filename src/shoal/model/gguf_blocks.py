"""GGUF's tensor types as our block formats, number for number (layouts: ggml-quants of llama.cpp).

Each stored array is computed on its own from the mapped file, so that an import holds one array at a time.  Only bits move: 4-bit
numbers change their order within a block, 5- and 6-bit numbers get a byte each.  The scales of K types are d (fp16) times a
6-bit or 8-bit number: at most 19 significant bits, exact in fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from shoal.errors import UnsupportedModelError
from shoal.model.affine import Array, Blocked, Bytes, Dense, Format
from shoal.model.gguf_file import GgufTensor

Part = Callable[[Bytes], Array]


@dataclass(frozen=True, slots=True)
class BlockType:
    """A quantised type: our format, and how each of its arrays is computed from raw blocks [rows, blocks, bytes]."""

    form: Blocked
    parts: Mapping[str, Part]


def dense_types() -> dict[Type, Dense]:
    """Types that are plain numbers."""
    return {Type.F32: Dense(dtype="float32"), Type.F16: Dense(dtype="float16"), Type.BF16: Dense(dtype="bfloat16")}


def block_types() -> dict[Type, BlockType]:
    """Quantised types that we keep exactly."""
    q4_0 = Blocked(bits=4, block=32, zero_point=8, affine=False)
    q4_1 = Blocked(bits=4, block=32, zero_point=0, affine=True)
    q8_0 = Blocked(bits=8, block=32, zero_point=128, affine=False)
    q5_1 = Blocked(bits=8, block=32, zero_point=128, affine=True)
    q4_k = Blocked(bits=4, block=32, zero_point=0, affine=True, scale="float32")
    q5_k = Blocked(bits=8, block=32, zero_point=128, affine=True, scale="float32")
    q6_k = Blocked(bits=8, block=16, zero_point=128, affine=False, scale="float32")
    return {
        Type.Q4_0: BlockType(q4_0, {".q": lambda r: _reorder(r[..., 2:]), ".d": lambda r: _half(r, 0)}),
        Type.Q4_1: BlockType(
            q4_1, {".q": lambda r: _reorder(r[..., 4:]), ".d": lambda r: _half(r, 0), ".m": lambda r: _half(r, 2)}
        ),
        Type.Q5_0: BlockType(q8_0, {".q": lambda r: _five(r[..., 2:], 128 - 16), ".d": lambda r: _half(r, 0)}),
        Type.Q5_1: BlockType(
            q5_1, {".q": lambda r: _five(r[..., 4:], 128), ".d": lambda r: _half(r, 0), ".m": lambda r: _half(r, 2)}
        ),
        Type.Q8_0: BlockType(q8_0, {".q": lambda r: r[..., 2:] ^ np.uint8(128), ".d": lambda r: _half(r, 0)}),
        Type.Q4_K: BlockType(q4_k, {".q": _q4_k, ".d": _k_scale, ".m": _k_minimum}),
        Type.Q5_K: BlockType(q5_k, {".q": _q5_k, ".d": _k_scale, ".m": _k_minimum}),
        Type.Q6_K: BlockType(q6_k, {".q": _q6_k, ".d": _q6_k_scale}),
    }


def format_of(tensor: GgufTensor) -> Format:
    """Our format for a matrix; raises UnsupportedModelError that names a type which we cannot keep."""
    dense, blocks = dense_types(), block_types()
    if tensor.type in dense:
        return dense[tensor.type]
    if tensor.type in blocks:
        return blocks[tensor.type].form
    known = ", ".join(t.name for t in (*dense, *blocks))
    raise UnsupportedModelError(
        f"tensor {tensor.name} has the type {tensor.type.name}", hint=f"choose a file with the types {known}"
    )


def dense_array(tensor: GgufTensor) -> Array:
    """The numbers of a plain tensor, in their own dtype, mapped."""
    dtypes = {Type.F32: np.dtype("<f4"), Type.F16: np.dtype("<f2"), Type.BF16: np.dtype(ml_dtypes.bfloat16)}
    numbers: Array = tensor.raw.view(dtypes[tensor.type]).reshape(tensor.shape)
    return numbers


def block_array(tensor: GgufTensor, suffix: str) -> Array:
    """One stored array of a quantised tensor: ".q", ".d" or ".m"."""
    return np.ascontiguousarray(block_types()[tensor.type].parts[suffix](tensor.blocks()))


def _half(raw: Bytes, at: int) -> Array:
    return np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16)[..., 0]


def _reorder(raw: Bytes) -> Bytes:
    """Nibbles of 16 bytes from (j, j + 16) to (2j, 2j + 1) per byte."""
    even, odd = raw[..., 0::2], raw[..., 1::2]
    low = (even & np.uint8(0x0F)) | (odd << np.uint8(4))
    high = (even >> np.uint8(4)) | (odd & np.uint8(0xF0))
    return np.concatenate([low, high], axis=-1)


def _five(raw: Bytes, shift: int) -> Bytes:
    """5-bit numbers (4 bytes of high bits, 16 of nibbles) plus *shift*, one per byte."""
    high = np.unpackbits(raw[..., :4], axis=-1, bitorder="little")
    low = np.concatenate([raw[..., 4:] & np.uint8(0x0F), raw[..., 4:] >> np.uint8(4)], axis=-1)
    five: Bytes = (low | (high << np.uint8(4))) + np.uint8(shift)
    return five


def _sub_blocks(parts: Array, per_super: int) -> Array:
    """Join [rows, super-blocks, per_super, ...] to [rows, blocks, ...]."""
    return parts.reshape(parts.shape[0], parts.shape[1] * per_super, *parts.shape[3:])


def _k_six_bits(raw: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 scales and 8 minima (6 bits each) of Q4_K and Q5_K, packed in bytes 4 to 16."""
    d, m, both = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = [d & np.uint8(0x3F), (both & np.uint8(0x0F)) | ((d >> np.uint8(2)) & np.uint8(0x30))]
    minima = [m & np.uint8(0x3F), (both >> np.uint8(4)) | ((m >> np.uint8(2)) & np.uint8(0x30))]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def _k_scale(raw: Bytes) -> Array:
    return _sub_blocks(_half(raw, 0).astype(np.float32)[..., None] * _k_six_bits(raw)[0].astype(np.float32), 8)


def _k_minimum(raw: Bytes) -> Array:
    return _sub_blocks(-(_half(raw, 2).astype(np.float32)[..., None] * _k_six_bits(raw)[1].astype(np.float32)), 8)


def _q4_k(raw: Bytes) -> Array:
    groups = raw[..., 16:].reshape(*raw.shape[:2], 4, 32)
    return _sub_blocks(_reorder(groups).reshape(*raw.shape[:2], 8, 16), 8)


def _q5_k(raw: Bytes) -> Array:
    groups = raw[..., 48:].reshape(*raw.shape[:2], 4, 1, 32) >> np.array([[0], [4]], np.uint8) & np.uint8(0x0F)
    high = raw[..., 16:48].reshape(*raw.shape[:2], 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    five = groups.reshape(*raw.shape[:2], 8, 32) | (high << np.uint8(4))
    return _sub_blocks(five + np.uint8(128), 8)


def _q6_k(raw: Bytes) -> Array:
    low = raw[..., :128].reshape(*raw.shape[:2], 2, 1, 64) >> np.array([[0], [4]], np.uint8) & np.uint8(0x0F)
    high = raw[..., 128:192].reshape(*raw.shape[:2], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & np.uint8(3)
    six = low.reshape(*raw.shape[:2], 8, 32) | (high.reshape(*raw.shape[:2], 8, 32) << np.uint8(4))
    return _sub_blocks(six.reshape(*raw.shape[:2], 16, 16) + np.uint8(128 - 32), 16)


def _q6_k_scale(raw: Bytes) -> Array:
    scales = raw[..., 192:208].view(np.int8).astype(np.float32)
    return _sub_blocks(_half(raw, 208).astype(np.float32)[..., None] * scales, 16)
