"""Offsets of affine blocks, stated as an integer zero and a few digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shoal.model.affine import unpack_nibbles
from shoal.model.offsets import DIGITS, Offsets, extra_blocks, folded_numbers, folded_scales, folded_zeros, offsets_of

BLOCK = 32


@st.composite
def affine_scales(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """d and m [rows, blocks]: zeros anywhere near the numbers or far off, blocks of one number among them."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 70)))
    scales = st.one_of(st.just(0.0), st.floats(2**-10, 0.125, width=16))
    d = draw(arrays(np.float16, shape, elements=scales))
    if draw(st.booleans()):
        return d, draw(arrays(np.float16, shape, elements=st.floats(-1, 1, width=16)))
    zeros = draw(arrays(np.float32, shape, elements=st.floats(-1, 16, width=32)))
    return d, (-d.astype(np.float32) * zeros).astype(np.float16)


def stated(offsets: Offsets, bits: int, blocks: int) -> np.ndarray:
    """What the digits add up to, [rows, blocks]."""
    digits = (offsets.codes.astype(np.float32) - (1 << bits - 1)) * offsets.scales[..., None]
    return digits.reshape(len(digits), DIGITS[bits], -1).sum(axis=1)[:, :blocks]


def largest_beside(rest: np.ndarray) -> np.ndarray:
    """Of each offset, the largest that shares its scale."""
    return np.concatenate(
        [
            np.broadcast_to(np.abs(part).max(axis=1, keepdims=True), part.shape)
            for part in np.split(rest, range(BLOCK, rest.shape[1], BLOCK), axis=1)
        ],
        axis=1,
    )


@given(scales=affine_scales(), bits=st.sampled_from([4, 8]))
def test_digits_and_zeros_say_what_the_offset_said(scales: tuple[np.ndarray, np.ndarray], bits: int) -> None:
    d, m = (values.astype(np.float32) for values in scales)

    offsets = offsets_of(*scales, zero_point=0, bits=bits, block=BLOCK)

    rest = m + d * offsets.zeros
    assert (np.abs(stated(offsets, bits, d.shape[1]) - rest) <= largest_beside(rest) / 224 + 1e-7).all()
    inside = (d > 0) & (-m >= 0) & (-m <= 15 * d)
    assert (np.abs(rest)[inside] <= d[inside] * 0.5001).all()


@pytest.mark.parametrize(("blocks", "bits", "extra"), [(18, 4, 2), (48, 4, 4), (32, 4, 2), (18, 8, 1), (128, 8, 4)])
def test_the_engine_finds_whole_blocks_behind_the_numbers(blocks: int, bits: int, extra: int) -> None:
    d = np.full((2, blocks), 0.5, np.float16)
    q = np.zeros((2, blocks, BLOCK * bits // 8), np.uint8)

    offsets = offsets_of(d, -d, zero_point=0, bits=bits, block=BLOCK)

    count = blocks + extra
    assert extra_blocks(blocks, BLOCK, bits) == extra
    assert folded_numbers(q, offsets, bits).shape == (2, count, BLOCK * bits // 8)
    assert folded_scales(d, offsets, 1).shape == (2 * count,)
    assert folded_zeros(offsets, bits, 1).shape == (2 * (count if bits == 8 else -(-count // 2)),)


def test_rows_of_odd_length_begin_on_a_byte() -> None:
    d = np.ones((2, 31), np.float16)
    offsets = offsets_of(d, -3 * d, zero_point=0, bits=4, block=BLOCK)

    zeros = unpack_nibbles(folded_zeros(offsets, 4, 1).reshape(2, -1))

    assert zeros.shape == (2, 34)  # 31 blocks, two digits, and half a byte to spare
    np.testing.assert_array_equal(zeros, [[*[3] * 31, 8, 8, 0]] * 2)
