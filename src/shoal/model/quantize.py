"""Weights in few bits, for models that come in floating point.

8 bits are symmetric (the largest magnitude of a block becomes 127).  4 bits are affine, because a block of 32 weights seldom
spans the same range on both sides of zero and 16 steps are too few to waste: the range is shrunk in a few tries and the one
with the least squared error is kept.  Scales are rounded to fp16 first, so that they are what the numbers are rounded against.
"""

import numpy as np

from shoal.errors import UnsupportedModelError
from shoal.model.affine import Blocked, Blocks, Bytes, Dense, Floats, Format, dequantise, pack_nibbles

INT8 = Blocked(bits=8, block=32, zero_point=128, affine=False)
INT4 = Blocked(bits=4, block=32, zero_point=0, affine=True)
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Tried fractions of a block's range in 4 bits; a smaller range clips outliers and resolves the rest better."""


def format_named(name: str) -> Format:
    """The format that a user calls fp32, fp16, bf16, int8 or int4; raises UnsupportedModelError for another name."""
    formats: dict[str, Format] = {
        "fp32": Dense(dtype="float32"),
        "fp16": Dense(dtype="float16"),
        "bf16": Dense(dtype="bfloat16"),
        "int8": INT8,
        "int4": INT4,
    }
    if name not in formats:
        raise UnsupportedModelError(f"no weight format {name!r}", hint=f"choose one of {', '.join(formats)}")
    return formats[name]


def fits(form: Format, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of *shape* can be stored in *form*: blocks need a matrix whose rows are whole blocks."""
    return isinstance(form, Dense) or (len(shape) == 2 and shape[1] % form.block == 0)


def blocks_from_float(weights: Floats, form: Blocked) -> tuple[Blocks, float]:
    """Quantise [rows, columns] (columns a multiple of `form.block`); return the blocks and the relative Frobenius error."""
    rows = weights.astype(np.float32).reshape(len(weights), -1, form.block)
    blocks = _affine(rows, form) if form.affine else _symmetric(rows, form)
    return blocks, relative_error(weights, dequantise(blocks, form))


def relative_error(exact: Floats, rounded: Floats) -> float:
    """||rounded - exact|| / ||exact|| in the Frobenius norm; 0 for a zero matrix."""
    norm = float(np.linalg.norm(exact.astype(np.float32)))
    return float(np.linalg.norm(rounded - exact.astype(np.float32))) / norm if norm else 0.0


def _pack(q: Floats, form: Blocked) -> Bytes:
    small = q.astype(np.uint8)
    return pack_nibbles(small) if form.bits == 4 else small


def _reciprocal(d: Floats) -> Floats:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _to_scale(values: Floats, form: Blocked) -> Floats:
    """Round to the stored dtype, saturating instead of becoming infinite."""
    if form.scale == "float32":
        return values
    limit = np.float32(np.finfo(np.float16).max)
    return np.clip(values, -limit, limit).astype(np.float16).astype(np.float32)


def _symmetric(rows: Floats, form: Blocked) -> Blocks:
    steps = np.float32(2 ** (form.bits - 1) - 1)
    d = _to_scale(np.abs(rows).max(axis=-1) / steps, form)
    q = np.clip(np.rint(rows * _reciprocal(d)[..., None]), -steps, steps)
    return Blocks(_pack(q + np.float32(form.zero_point), form), d.astype(form.scale))


def _affine(rows: Floats, form: Blocked) -> Blocks:
    best = [np.zeros(rows.shape, np.float32), *(np.zeros(rows.shape[:2], np.float32) for _ in range(2))]
    least = np.full(rows.shape[:2], np.inf, np.float32)
    for shrink in SHRINKS:
        q, d, m = _affine_try(rows, form, shrink)
        error = np.square(q * d[..., None] + m[..., None] - rows).sum(axis=-1)
        better = error < least
        least = np.where(better, error, least)
        best = [
            np.where(better[..., None] if new.ndim == 3 else better, new, old)
            for new, old in zip((q, d, m), best, strict=True)
        ]
    q, d, m = best
    return Blocks(_pack(q + np.float32(form.zero_point), form), d.astype(form.scale), m.astype(form.scale))


def _affine_try(rows: Floats, form: Blocked, shrink: float) -> tuple[Floats, Floats, Floats]:
    steps = np.float32(2**form.bits - 1)
    low, high = rows.min(axis=-1), rows.max(axis=-1)
    margin = (high - low) * np.float32((1 - shrink) / 2)
    d = _to_scale((high - low - 2 * margin) / steps, form)
    m = _to_scale(low + margin, form)
    q = np.clip(np.rint((rows - m[..., None]) * _reciprocal(d)[..., None]), 0, steps)
    return q, d, m
