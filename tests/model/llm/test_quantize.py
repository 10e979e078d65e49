"""Weights in few bits: bounded errors, exact where they can be."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import UnsupportedModelError
from shoal.model.affine import Blocked, Dense, dequantise, pack_nibbles, unpack_nibbles
from shoal.model.quantize import INT4, INT8, blocks_from_float, fits, format_named, relative_error

MATRICES = hnp.arrays(np.float32, (2, 64), elements=st.floats(-8, 8, width=32))


@given(hnp.arrays(np.uint8, (2, 3, 32), elements=st.integers(0, 15)))
def test_nibbles_come_back_in_their_order(values: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(values)), values)


def test_the_even_element_is_the_low_nibble() -> None:
    assert pack_nibbles(np.array([0x3, 0xA], np.uint8)).tolist() == [0xA3]


@given(MATRICES)
def test_eight_bits_are_off_by_half_a_step_at_most(weights: np.ndarray) -> None:
    blocks, _ = blocks_from_float(weights, INT8)

    off = np.abs(dequantise(blocks, INT8) - weights).reshape(2, 2, 32)

    # fp16 scales are off by 2^-11 of themselves, which the largest quotient (127) multiplies; below 2^-14 by 2^-25
    d = blocks.d.astype(np.float32)[..., None]
    assert (off <= d * 0.5001 + 127 * (d * 2**-11 + 2**-24)).all()


@given(MATRICES)
def test_four_bits_lose_no_more_than_a_plain_grid_over_the_range(weights: np.ndarray) -> None:
    blocks, _ = blocks_from_float(weights, INT4)

    squares = np.square(dequantise(blocks, INT4) - weights).reshape(2, 2, 32).sum(-1)

    rows = weights.reshape(2, 2, 32)
    spread = rows.max(-1) - rows.min(-1)
    step = spread / 15 + np.abs(rows).max(-1) * 2**-9 + 2**-20
    assert (squares <= 32 * np.square(step / 2 * 1.01)).all()


def test_normal_weights_lose_a_few_percent_in_four_bits_and_a_few_per_mille_in_eight(
    numbers: Callable[..., np.ndarray],
) -> None:
    weights = numbers(0, (64, 256))

    assert 0.05 < blocks_from_float(weights, INT4)[1] < 0.085
    assert 0.003 < blocks_from_float(weights, INT8)[1] < 0.01


@pytest.mark.parametrize("form", [INT4, INT8])
def test_zeros_and_huge_numbers_stay_finite(form: Blocked) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1] = 3e8

    rounded = dequantise(blocks_from_float(weights, form)[0], form)

    assert np.isfinite(rounded).all()
    assert not rounded[0].any()


def test_the_error_is_relative_to_the_norm() -> None:
    assert relative_error(np.full((1, 4), 2, np.float32), np.full((1, 4), 1, np.float32)) == 0.5
    assert relative_error(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)) == 0.0


def test_formats_have_names_and_limits() -> None:
    assert format_named("fp16") == Dense(dtype="float16")
    assert fits(INT4, (3, 64))
    assert not fits(INT4, (3, 65))
    assert not fits(INT8, (64,))
    assert fits(Dense(), (65,))
    with pytest.raises(UnsupportedModelError, match="int3"):
        format_named("int3")
