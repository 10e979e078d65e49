"""Rotary position embedding: the angle of pair i at position p is p * inverse_frequencies[i].

The canonical graph keeps this small vector, not the cos and sin tables: how long a table must be is known where a shard is
loaded, and every kind of scaling is a vector.
"""

import math

import msgspec
import numpy as np
from numpy.typing import NDArray


class LinearScaling(msgspec.Struct, frozen=True, kw_only=True, tag="linear"):
    """Positions are divided by `factor`."""

    factor: float


class Llama3Scaling(msgspec.Struct, frozen=True, kw_only=True, tag="llama3"):
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1 model card)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


class YarnScaling(msgspec.Struct, frozen=True, kw_only=True, tag="yarn"):
    """NTK-by-parts and attention temperature (YaRN, arXiv 2309.00071); `attention_factor` None: 0.1 ln(factor) + 1."""

    factor: float
    original_context_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


class FactorScaling(msgspec.Struct, frozen=True, kw_only=True, tag="factors"):
    """Each frequency is divided by its own factor (the tensor `rope_freqs` of a GGUF file)."""

    factors: tuple[float, ...]


Scaling = LinearScaling | Llama3Scaling | YarnScaling | FactorScaling


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """`dims` of each head are rotated; `interleaved` pairs elements 2i and 2i + 1, else i and i + dims / 2."""

    base: float
    dims: int
    interleaved: bool = False
    scaling: Scaling | None = None


def inverse_frequencies(rope: Rope) -> NDArray[np.float32]:
    """Angles per position, fp32 [dims / 2]."""
    plain = rope.base ** -(np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    match rope.scaling:
        case None:
            scaled = plain
        case LinearScaling(factor=factor):
            scaled = plain / factor
        case FactorScaling(factors=factors):
            scaled = plain / np.asarray(factors)
        case Llama3Scaling() as llama3:
            scaled = _llama3(plain, llama3)
        case YarnScaling() as yarn:
            scaled = _yarn(plain, rope, yarn)
    return np.asarray(scaled, np.float32)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by: 1 except for YaRN."""
    match rope.scaling:
        case YarnScaling(attention_factor=float() as given):
            return given
        case YarnScaling(factor=factor):
            return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        case _:
            return 1.0


def _llama3(plain: NDArray[np.float64], s: Llama3Scaling) -> NDArray[np.float64]:
    waves = s.original_context_tokens * plain / (2 * math.pi)
    keep = np.clip((waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return np.asarray(plain * keep + plain / s.factor * (1 - keep))


def _yarn(plain: NDArray[np.float64], rope: Rope, s: YarnScaling) -> NDArray[np.float64]:
    def dimension(rotations: float) -> float:
        return rope.dims * math.log(s.original_context_tokens / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(dimension(s.beta_fast)), 0)
    high = min(math.ceil(dimension(s.beta_slow)), rope.dims - 1)
    stretch = np.clip((np.arange(rope.dims // 2) - low) / max(high - low, 0.001), 0, 1)
    return np.asarray(plain / s.factor * stretch + plain * (1 - stretch))
