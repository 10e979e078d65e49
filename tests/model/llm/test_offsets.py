"""Offsets of affine blocks, stated as an integer zero and a few digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shoal.model.affine import unpack_nibbles
from shoal.model.offsets import DIGITS, extra_blocks, folded_numbers, folded_scales, folded_zeros, offsets_of

BLOCK = 32


@st.composite
def affine_scales(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """d and m [rows, blocks] of blocks whose zero lies anywhere near their numbers, empty blocks among them."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 70)))
    scales = st.one_of(st.just(0.0), st.floats(2**-10, 0.125, width=16))
    d = draw(arrays(np.float16, shape, elements=scales))
    zeros = draw(arrays(np.float32, shape, elements=st.floats(-1, 16, width=32)))
    return d, (-d.astype(np.float32) * zeros).astype(np.float16)


@given(scales=affine_scales(), bits=st.sampled_from([4, 8]))
def test_digits_and_zeros_say_what_the_offset_said(scales: tuple[np.ndarray, np.ndarray], bits: int) -> None:
    d, m = scales
    rows, blocks = d.shape

    offsets = offsets_of(d, m, zero_point=0, bits=bits, block=BLOCK)

    middle = 1 << bits - 1
    stated = ((offsets.codes.astype(np.float32) - middle) * offsets.scales[..., None]).reshape(rows, DIGITS[bits], -1)
    rest = stated.sum(axis=1)[:, :blocks]
    wide = d.astype(np.float32)
    largest = np.abs(m.astype(np.float32) + wide * offsets.zeros).max()
    error = np.abs(rest - wide * offsets.zeros - m.astype(np.float32))
    assert error.max() <= largest / 220 + 1e-6
    inside = (-m.astype(np.float32) >= 0) & (-m.astype(np.float32) <= 15 * wide)
    assert (np.abs(m.astype(np.float32) + wide * offsets.zeros)[inside] <= wide[inside] * 0.5001).all()


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
