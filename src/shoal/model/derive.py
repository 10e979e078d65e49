"""Arrays that a lowering needs and the canonical model does not hold, as pure functions of canonical arrays.

A derivation is named by its operation, so that its result can be cached under (digests of the inputs, lowering).  Operations with
arguments carry them in the name, after colons.

    bytes:PARTS             uint8 matrices stacked on their rows, each block taken as PARTS blocks
    view:PARTS              the same of one matrix: its own bytes under another shape
    scales:PARTS            d of several matrices stacked, each PARTS times in a row, fp32 [rows * blocks * PARTS]
    vectors                 vectors one after another, fp32
    dense                   matrices stacked and transposed, fp32 [columns, rows]
    folded:BITS:BLOCK:Z:PARTS   numbers of affine matrices (q1, d1, m1, q2, ...) stacked on their rows, with their offsets behind
                            (`shoal.model.offsets`), each block taken as PARTS blocks; Z is the stored numbers' zero point
    folded_scales, folded_zeros   what belongs to them, with the same arguments, flat
    correction:Z            m + Z d of several matrices (d1, m1, d2, m2, ...) stacked and transposed, fp32 [blocks, rows]
    cos:POSITIONS:SCALE     rotary table times SCALE from inverse frequencies, fp32 [positions, dims / 2]; sin likewise
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.model.affine import Array, Floats
from shoal.model.offsets import folded_numbers, folded_scales, folded_zeros, offsets_of


@dataclass(frozen=True, slots=True)
class Derivation:
    """The initializer *name* is `derive(op, [arrays of inputs])`."""

    name: str
    op: str
    inputs: tuple[str, ...]


def is_view(op: str) -> bool:
    """Whether the result is the stored bytes themselves, so that caching it would only copy them."""
    return op.startswith("view:")


def derive(op: str, arrays: Sequence[Array]) -> Array:
    """Compute a derived array; raises ValueError for an operation that this version does not know."""
    kind, *arguments = op.split(":")
    match kind:
        case "bytes" | "view":
            _, blocks, size = arrays[0].shape
            parts = int(arguments[0])
            joined = arrays[0] if kind == "view" else np.concatenate(list(arrays))
            return joined.reshape(-1, blocks * parts, size // parts)
        case "scales":
            return np.repeat(np.concatenate([a.astype(np.float32).ravel() for a in arrays]), int(arguments[0]))
        case "vectors":
            return np.concatenate([a.astype(np.float32).ravel() for a in arrays])
        case "dense":
            return _transposed([a.astype(np.float32) for a in arrays])
        case "folded" | "folded_scales" | "folded_zeros":
            bits, block, parts = int(arguments[0]), int(arguments[1]), int(arguments[3])
            triples = zip(arrays[0::3], arrays[1::3], arrays[2::3], strict=True)
            folds = [_fold(kind, qdm, (bits, block, parts), float(arguments[2])) for qdm in triples]
            return np.concatenate(folds)
        case "correction":
            return _transposed(
                [_correction(d, m, float(arguments[0])) for d, m in zip(arrays[0::2], arrays[1::2], strict=True)]
            )
        case "cos" | "sin":
            return _rotary(kind, arrays[0], positions=int(arguments[0]), scale=float(arguments[1]))
        case _:
            raise ValueError(f"unknown derivation {op!r}")


def _transposed(matrices: Sequence[Floats]) -> Array:
    """Stack on rows, then transpose, into one new array."""
    rows = sum(len(m) for m in matrices)
    out = np.empty((matrices[0].shape[1], rows), np.float32)
    return np.concatenate([m.T for m in matrices], axis=1, out=out)


def _fold(kind: str, qdm: tuple[Array, Array, Array], layout: tuple[int, int, int], zero_point: float) -> Array:
    q, d, m = qdm
    bits, block, parts = layout
    offsets = offsets_of(d, m, zero_point=zero_point, bits=bits, block=block)
    match kind:
        case "folded":
            numbers = folded_numbers(q.view(np.uint8), offsets, bits)
            rows, blocks, size = numbers.shape
            return numbers.reshape(rows, blocks * parts, size // parts)
        case "folded_scales":
            return folded_scales(d, offsets, parts)
        case _:
            return folded_zeros(offsets, bits, parts)


def _correction(d: Array, m: Array, zero_point: float) -> Floats:
    return m.astype(np.float32) + np.float32(zero_point) * d.astype(np.float32)


def _rotary(kind: str, inv_freq: Array, *, positions: int, scale: float) -> Array:
    # The angle is rounded to fp32, as in the canonical graph and in every implementation that models were trained with.
    angles = np.arange(positions, dtype=np.float32)[:, None] * inv_freq.astype(np.float32)
    table = np.cos(angles) if kind == "cos" else np.sin(angles)
    return table * np.float32(scale)
