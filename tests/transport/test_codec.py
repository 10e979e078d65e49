"""What each codec promises about loss, and what it does with data that it did not write."""

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shoal.errors import InvalidRequestError, MalformedFrameError
from shoal.transport.codec import Array, Codec, decode, encode, encoded_bytes

MAX_BYTES = 1 << 20
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
activations = hnp.arrays(np.float32, shapes, elements=floats | st.floats(-8, 8, width=32))


def through(array: Array, codec: Codec) -> Array:
    data = b"".join(encode(array, codec))
    if not codec.compressed:
        assert len(data) == encoded_bytes(codec, array.itemsize, array.shape)
    return decode(data, codec, array.dtype.name, array.shape, max_bytes=MAX_BYTES)


@given(activations, st.sampled_from([Codec.FP16, Codec.FP16_ZSTD]))
def test_half_precision_keeps_eleven_bits(array: NDArray[np.float32], codec: Codec) -> None:
    got = through(array, codec)

    exact = np.clip(array.astype(np.float64), -65504, 65504)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert np.all(np.abs(got - exact) <= np.abs(exact) * 2**-11 + 2**-25)


@given(activations, st.sampled_from([Codec.INT8, Codec.INT8_ZSTD]))
@example(np.array([3.4028235e38, -1.0], np.float32), Codec.INT8)
def test_int8_keeps_each_row_within_half_a_step_of_its_scale(array: NDArray[np.float32], codec: Codec) -> None:
    got = through(array, codec)

    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    if array.size:
        exact = np.atleast_1d(array.astype(np.float64))
        step = np.abs(exact).max(axis=-1, keepdims=True) / 127
        assert np.all(np.abs(got - exact) <= 0.5001 * step + 1e-30)


@given(activations)
@example(np.array([3.4028235e38, -1.0, 1.0, 2.0, -3.0, 0.1], np.float32))
def test_the_four_largest_of_a_row_are_exact_and_the_rest_is_as_fine_as_it_needs(array: NDArray[np.float32]) -> None:
    got = through(array, Codec.INT8_PEAKS)

    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    if array.size:
        rows = np.atleast_1d(array).reshape(-1, array.shape[-1] if array.ndim else 1).astype(np.float64)
        ranked = np.sort(np.abs(rows), axis=1)[:, ::-1]
        fifth = ranked[:, 4] if rows.shape[1] > 4 else np.zeros(len(rows))
        error = np.abs(got.reshape(rows.shape) - rows)
        assert np.all(error <= 0.5001 * fifth[:, None] / 127 + 1e-30)
        assert np.all(np.count_nonzero(error == 0, axis=1) >= min(4, rows.shape[1]))


def test_one_channel_that_is_far_larger_costs_the_others_nothing() -> None:
    row = np.linspace(-1, 1, 64).astype(np.float32)
    row[17] = 1000.0

    plain, kept_apart = (np.delete(np.abs(through(row[None], c)[0] - row), 17) for c in (Codec.INT8, Codec.INT8_PEAKS))

    assert plain.max() > 0.9
    assert kept_apart.max() < 0.005


def test_a_peak_outside_of_its_row_is_malformed() -> None:
    data = bytearray(b"".join(encode(np.arange(8, dtype=np.float32)[None], Codec.INT8_PEAKS)))
    data[4 + 4 * 4 : 4 + 4 * 4 + 2] = b"\x08\x00"

    with pytest.raises(MalformedFrameError, match="a peak at 8 of a row of 8"):
        decode(bytes(data), Codec.INT8_PEAKS, "float32", (1, 8), max_bytes=MAX_BYTES)


@pytest.mark.parametrize("width", [65536, 65537])
def test_rows_of_any_width_keep_their_peaks(width: int) -> None:
    row = np.ones((1, width), np.float32)
    row[0, -1] = 50.0

    got = through(row, Codec.INT8_PEAKS)

    assert got[0, -1] == 50.0


def test_the_scale_belongs_to_the_token() -> None:
    quiet, loud = np.linspace(-1e-3, 1e-3, 64), np.linspace(-1e3, 1e3, 64)
    rows = np.stack([quiet, loud]).astype(np.float32)

    got = through(rows, Codec.INT8)

    assert np.abs(got[0] - rows[0]).max() < 1e-5


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT8_PEAKS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("width", [3, 9])
def test_int8_shows_a_row_that_is_not_finite_and_spares_the_others(bad: float, codec: Codec, width: int) -> None:
    rows = np.ones((2, width), np.float32)
    rows[0, 1] = bad

    got = through(rows, codec)

    assert np.all(np.isnan(got[0]))
    np.testing.assert_array_equal(got[1], rows[1])


def test_a_lossy_codec_refuses_token_ids() -> None:
    with pytest.raises(InvalidRequestError, match="int64"):
        encode(np.arange(3), Codec.INT8)


def test_a_bomb_costs_no_more_than_the_tensor_it_claims_to_be() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 27))

    with pytest.raises(MalformedFrameError, match="257 bytes came"):
        decode(bomb, Codec.RAW_ZSTD, "uint8", (256,), max_bytes=MAX_BYTES)
    with pytest.raises(MalformedFrameError, match="larger than"):
        decode(bomb, Codec.RAW_ZSTD, "uint8", (1 << 27,), max_bytes=MAX_BYTES)


@given(st.binary(max_size=60), st.sampled_from(Codec), st.lists(st.integers(0, 5), max_size=3))
def test_any_bytes_decode_to_the_stated_shape_or_are_malformed(data: bytes, codec: Codec, shape: list[int]) -> None:
    try:
        got = decode(data, codec, "float32", shape, max_bytes=MAX_BYTES)
    except MalformedFrameError:
        return
    assert got.shape == tuple(shape)
