"""The offsets of affine blocks as further columns of the same product.

A fast kernel computes y = sum over blocks of d * sum((q - z) * x) with an integer z per block.  An affine block
w = d * (q - z0) + m has its zero anywhere.  So each block is given the integer z that is nearest to it, and what is left,
r = m + d * (z - z0), is at most d / 2 where that zero is among its numbers: one number per block, to be multiplied by the sum
of the block's inputs.  These sums are appended to the input, and the r to the matrix, as blocks of their own: at 4 bits as two
digits (the second of what the first leaves), at 8 bits as one.

The digits state r to 1/225 (4 bits) or 1/255 of the largest r in their block, about a thousandth of d.  The files themselves
state m no finer: the last place of an fp16 m of 8 d is d / 256.  The sums are rounded like every input of the kernel; as
r is small, that costs little.  A block of one number (d = 0) has all of it in r, and makes the digits of up to 31 others
coarser.

Rejected: a product of its own for m + z d in fp32, exact, with the block sums as input.  On SmolLM2 (Q4_1, one thread of an AMD
EPYC) it took 15 % of a decode step.  The same in 8 bits about the kernel's default z took the mean KL from 2.96e-3 to 3.60e-3
nats, where the digits of r have 2.76e-3.  The exact lowering still has the product.
"""

from dataclasses import dataclass

import numpy as np

from shoal.model.affine import Array, Bytes, Floats, pack_nibbles

DIGITS = {4: 2, 8: 1}
"""Digits of an offset, by the bits of the numbers."""


@dataclass(frozen=True, slots=True)
class Offsets:
    """Of a matrix [rows, blocks of *block*]: each block's integer zero, and the further blocks that hold the rest.

    `zeros` uint8 [rows, blocks], `codes` uint8 [rows, extra, block] about the zero 2^(bits - 1), `scales` fp32 [rows, extra].
    """

    zeros: Bytes
    codes: Bytes
    scales: Floats


def extra_blocks(blocks: int, block: int, bits: int) -> int:
    """How many blocks the offsets of *blocks* blocks take."""
    return DIGITS[bits] * -(-blocks // block)


def offsets_of(d: Array, m: Array, *, zero_point: float, bits: int, block: int) -> Offsets:
    """Split m of blocks w = d * (q - zero_point) + m; d and m are [rows, blocks]."""
    scale, shift = d.astype(np.float32), m.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        nearest = np.rint(np.float32(zero_point) - shift / scale)
    middle = 1 << bits - 1
    zeros = np.clip(np.where(np.isfinite(nearest), nearest, middle), 0, 2 * middle - 1).astype(np.float32)
    rest = _in_blocks(shift + scale * (zeros - np.float32(zero_point)), block)
    codes: list[Bytes] = []
    scales: list[Floats] = []
    for _ in range(DIGITS[bits]):
        step = np.abs(rest).max(axis=-1) / np.float32(middle - 0.5)
        step[step == 0] = 1
        digit = np.clip(np.rint(rest / step[..., None]), -middle, middle - 1)
        rest = rest - digit * step[..., None]
        codes.append((digit + middle).astype(np.uint8))
        scales.append(step)
    return Offsets(zeros.astype(np.uint8), np.concatenate(codes, axis=1), np.concatenate(scales, axis=1))


def folded_numbers(q: Bytes, offsets: Offsets, bits: int) -> Bytes:
    """The numbers of a matrix with those of its offsets behind, uint8 [rows, blocks + extra, bytes]."""
    codes = pack_nibbles(offsets.codes) if bits == 4 else offsets.codes
    return np.concatenate([q, codes], axis=1)


def folded_scales(d: Array, offsets: Offsets, parts: int) -> Floats:
    """Scales of all blocks, each *parts* times, fp32 [rows * blocks * parts]."""
    return np.repeat(np.concatenate([d.astype(np.float32), offsets.scales], axis=1).ravel(), parts)


def folded_zeros(offsets: Offsets, bits: int, parts: int) -> Bytes:
    """Zero points of all blocks, each *parts* times, as the engine packs them: rows begin on a byte."""
    extra = np.full(offsets.scales.shape, 1 << bits - 1, np.uint8)
    zeros = np.repeat(np.concatenate([offsets.zeros, extra], axis=1), parts, axis=1)
    if bits == 8:
        return zeros.ravel()
    return pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))).ravel()


def _in_blocks(values: Floats, block: int) -> Floats:
    """[rows, n] as [rows, ceil(n / block), block], filled up with zeros."""
    rows, count = values.shape
    filled = np.pad(values, ((0, 0), (0, -count % block)))
    return filled.reshape(rows, -1, block)
