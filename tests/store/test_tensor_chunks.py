import mmap

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import CorruptFileError, DigestMismatchError, UnavailableError, UnsupportedModelError
from shoal.store.chunk import ref_of
from shoal.store.home import Store
from shoal.store.manifest import ChunkRef, TensorEntry
from shoal.store.memory import MemoryTier
from shoal.store.tensor import dtype_name, open_array, stored_bytes, to_raw

KINDS = [np.float32, np.float16, np.int64, np.uint8, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def kept(tier: MemoryTier, array: np.ndarray, dtype: str | None = None) -> TensorEntry:
    dtype = dtype or str(array.dtype)
    raw = to_raw(array, dtype, array.shape)
    tier.put(ref_of(raw).digest, raw)
    return TensorEntry(name="t", dtype=dtype, shape=array.shape, chunk=ref_of(raw))


@given(data=st.data(), shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
@pytest.mark.parametrize("kind", KINDS)
def test_an_array_comes_back_bit_by_bit(kind: type, data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    array = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), kind).reshape(shape)
    tier = MemoryTier()

    back = open_array(tier, kept(tier, array))

    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_a_transposed_array_is_stored_in_c_order() -> None:
    tier = MemoryTier()
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T

    assert np.array_equal(open_array(tier, kept(tier, array)), array)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9))
def test_int4_is_packed_as_onnx_packs_it(values: list[int]) -> None:
    array = np.array(values).astype(ml_dtypes.int4)
    expected = onnx.numpy_helper.from_array(array).raw_data

    assert bytes(to_raw(array, "int4", array.shape)) == expected


def test_packed_bytes_come_back_as_flat_bytes() -> None:
    tier = MemoryTier()
    array = np.array([1, 2, 3], ml_dtypes.uint4)

    back = open_array(tier, kept(tier, array))

    assert back.dtype == np.uint8
    assert back.tolist() == [0x21, 0x03]


def test_already_packed_bytes_are_taken_as_they_are() -> None:
    packed = np.array([0x21, 0x03], np.uint8)

    assert bytes(to_raw(packed, "uint4", (3,))) == packed.tobytes()


def test_large_tensors_are_mapped_from_disk(store: Store) -> None:
    array = np.arange(100_000, dtype=np.float32)
    raw = to_raw(array, "float32", array.shape)
    store.chunks.put(ref_of(raw).digest, raw)

    mapped = store.chunks.get(ref_of(raw).digest)
    back = open_array(store.chunks, TensorEntry(name="t", dtype="float32", shape=array.shape, chunk=ref_of(raw)))

    assert isinstance(mapped.obj, mmap.mmap)
    assert not back.flags.owndata
    assert not back.flags.writeable
    assert np.array_equal(back, array)


def test_a_missing_chunk_names_the_tensor() -> None:
    entry = TensorEntry(name="lm_head", dtype="uint8", shape=(3,), chunk=ChunkRef(digest="0" * 64, size_bytes=3))

    with pytest.raises(UnavailableError, match="lm_head"):
        open_array(MemoryTier(), entry)


def test_a_chunk_of_another_size_is_refused() -> None:
    tier = MemoryTier()
    entry = kept(tier, np.zeros(3, np.uint8))

    with pytest.raises(DigestMismatchError, match="3 bytes"):
        open_array(tier, TensorEntry(name="t", dtype="uint8", shape=(4,), chunk=entry.chunk))


def test_an_array_of_another_size_than_declared_is_refused() -> None:
    with pytest.raises(CorruptFileError, match="16 bytes"):
        to_raw(np.zeros(3, np.float32), "float32", (4,))


def test_strings_cannot_be_chunks() -> None:
    with pytest.raises(UnsupportedModelError, match="STRING"):
        dtype_name(onnx.TensorProto.STRING)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 40), ("uint4", 5), ("int2", 3), ("bfloat16", 20)])
def test_sizes_follow_from_type_and_shape(dtype: str, size: int) -> None:
    assert stored_bytes(dtype, (2, 5)) == size
