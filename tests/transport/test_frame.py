"""Frames round-trip, and whatever else arrives is refused with the right error and no great allocation."""

import tracemalloc

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import InvalidRequestError, MalformedFrameError, RequestTooLargeError, UnsupportedVersionError
from shoal.transport import frame
from shoal.transport.codec import Array, Codec
from shoal.transport.frame import pack, unpack

DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
]
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def bits(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    name = draw(st.sampled_from([*DTYPES, "bfloat16"]))
    if name == "bfloat16":
        return draw(hnp.arrays(np.uint16, shapes)).view(ml_dtypes.bfloat16)
    array = draw(hnp.arrays(np.dtype(name).newbyteorder(draw(st.sampled_from("<>"))), shapes))
    return array.T if draw(st.booleans()) else array


tensors = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), arrays(), max_size=5)
frames = st.builds(pack, st.binary(max_size=100), tensors, codec=st.sampled_from(Codec))


@given(st.binary(max_size=200), tensors, st.sampled_from([Codec.RAW, Codec.RAW_ZSTD]))
def test_a_frame_keeps_every_bit(header: bytes, sent: dict[str, Array], codec: Codec) -> None:
    got_header, got = unpack(pack(header, sent, codec=codec))

    assert got_header == header
    little = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in sent.items()}
    assert {name: bits(array) for name, array in got.items()} == {name: bits(array) for name, array in little.items()}
    assert list(got) == list(sent)


def test_raw_tensors_are_views_of_the_frame() -> None:
    data = pack(b"h", {"x": np.arange(6, dtype=np.float32), "y": np.arange(3)})

    _, got = unpack(data)

    whole = np.frombuffer(data, np.uint8)
    for array in got.values():
        assert np.shares_memory(array, whole)
        assert not array.flags.writeable


def test_tensors_start_at_multiples_of_64_and_shifted_frames_are_still_aligned_arrays() -> None:
    sent = {"x": np.arange(3, dtype=np.int8), "y": np.arange(5, dtype=np.float64)}
    data = pack(b"header", sent)

    _, got = unpack(memoryview(b"?" + data)[1:])

    assert len(data) % 64 == 0
    assert data.index(sent["y"].tobytes()) % 64 == 0
    assert got["y"].flags.aligned
    np.testing.assert_array_equal(got["y"], sent["y"])


@pytest.mark.parametrize("codec", [Codec.FP16, Codec.INT8_ZSTD])
def test_a_lossy_codec_applies_to_float32_and_leaves_the_rest_exact(codec: Codec) -> None:
    sent = {"h": np.linspace(-1, 1, 600, dtype=np.float32).reshape(1, 2, 300), "ids": np.arange(4)}
    data = pack(b"", sent, codec=codec)

    _, got = unpack(data)

    assert len(data) < len(pack(b"", sent))
    np.testing.assert_allclose(got["h"], sent["h"], atol=0.005)
    np.testing.assert_array_equal(got["ids"], sent["ids"])


def test_what_cannot_travel_is_refused_when_packing() -> None:
    with pytest.raises(InvalidRequestError, match="complex64"):
        pack(b"", {"x": np.zeros(2, np.complex64)})
    with pytest.raises(RequestTooLargeError, match="limit"):
        pack(b"", {"x": np.zeros(frame.MAX_FRAME_BYTES, np.uint8)})


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"SHFR\x01\0\0\0" + tail))
def test_garbage_is_malformed_or_of_another_version(data: bytes) -> None:
    with pytest.raises((MalformedFrameError, UnsupportedVersionError)):
        unpack(data)


@given(frames, st.data())
def test_a_mutated_frame_never_raises_anything_else(data: bytes, choices: st.DataObject) -> None:
    at = choices.draw(st.integers(0, len(data) - 1))
    mutated = bytearray(data)
    mutated[at] ^= choices.draw(st.integers(1, 255))

    try:
        unpack(bytes(mutated))
    except (MalformedFrameError, UnsupportedVersionError):
        return
    assert at >= frame._FIXED_BYTES  # only payload and padding are not under the check sum


def test_a_scale_out_of_range_gives_infinities_and_no_warning() -> None:
    data = bytearray(pack(b"", {"h": np.full((1, 600), 2.0, np.float32)}, codec=Codec.INT8))
    scale = np.float32(2.0 / 127).tobytes()
    at = data.index(scale)
    data[at : at + 4] = np.float32(3e38).tobytes()

    _, got = unpack(bytes(data))

    assert np.all(np.isinf(got["h"]))


@given(frames, st.data())
def test_a_truncated_or_extended_frame_is_malformed(data: bytes, choices: st.DataObject) -> None:
    end = choices.draw(st.integers(0, len(data) - 1))

    for other in (data[:end], data + b"\0", data + bytes(64)):
        with pytest.raises(MalformedFrameError):
            unpack(other)


def test_another_version_is_named() -> None:
    data = bytearray(pack(b"", {}))
    data[4] = 9

    with pytest.raises(UnsupportedVersionError, match="wire version 9 came, this node speaks 1"):
        unpack(bytes(data))


def forged(table: bytes, body: bytes = b"") -> bytes:
    """A frame whose check sum is right and whose table lies."""
    head = frame._HEAD.pack(frame.MAGIC, frame.WIRE_VERSION, 0, len(table), len(body))
    check = frame._CHECK.pack(frame._crc(head, b"", table))
    return head + check + table + frame._zeros(frame._FIXED_BYTES + len(table)) + body


LIES: list[object] = [
    [["x", "float32", [1 << 40], "raw", 0, 64]],
    [["x", "float32", [1 << 62, 0, 1 << 62], "raw", 0, 0]],
    [["x", "float32", [1 << 60, 0], "int8", 0, 0]],
    [["x", "float32", [1 << 25], "raw+zstd", 0, 64]],
    [["x", "float32", [2] * 1000, "raw", 0, 64]],
    [["x", "float32", [-1, -16], "raw", 0, 64]],
    [["x", "float32", [16], "raw", 64, 64]],
    [["x", "float32", [16], "raw", 0, -64]],
    [["x", "float32", [16], "raw", 0, 1 << 40]],
    [["x", "object", [8], "raw", 0, 64]],
    [["x", "int32", [64], "int8", 0, 64]],
    [["x", "float32", [16], "gzip", 0, 64]],
    [["x", "uint8", [64], "raw", 0, 64], ["x", "uint8", [0], "raw", 64, 0]],
    [["x", "uint8", [64], "raw", 0, 64], ["y", "uint8", [64], "raw", 0, 64]],
    [["x", "uint8"]],
    {"x": 1},
    [],
]


@pytest.mark.parametrize("table", LIES, ids=str)
def test_a_table_that_lies_is_malformed_and_allocates_nothing_great(table: object) -> None:
    data = forged(msgspec.msgpack.encode(table), bytes(64))

    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrameError):
            unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=100), st.binary(max_size=130))
def test_a_random_table_under_a_right_check_sum_is_malformed(table: bytes, body: bytes) -> None:
    try:
        _, got = unpack(forged(table, body))
    except MalformedFrameError:
        return
    assert (got, body) == ({}, b"")
