"""Weights in mapped files: what stays of them in memory once an engine session is built."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from shoal.model.spec import Array
from shoal.runtime.backend.mapped import drop_pages, is_mapped
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import Shard
from shoal.store.chunk import ref_of
from shoal.store.disk import DiskTier
from shoal.store.manifest import TensorEntry
from shoal.store.quota import Quota
from shoal.store.tensor import open_array
from shoal.store.verified import Verified

ROWS, WIDTH = 4096, 128
needs_smaps = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
needs_dontneed = pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages cannot be given back here")


def resident_bytes(folder: Path) -> int:
    """Bytes of the files below *folder* that this process has in memory."""
    inside, total = False, 0
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            head, *rest = line.split()
            if "-" in head and not head.endswith(":"):
                inside = bool(rest) and rest[-1].startswith(str(folder))
            elif inside and head == "Rss:":
                total += int(rest[0]) * 1024
    return total


def weights() -> dict[str, Array]:
    flat = np.sin(np.arange(ROWS * WIDTH, dtype=np.float32))
    return {"table": flat.reshape(ROWS, WIDTH), "w": flat[::-1].reshape(WIDTH, ROWS).copy()}


def stored(folder: Path, arrays: dict[str, Array]) -> dict[str, Array]:
    """The arrays as chunks in *folder*, opened as a worker opens them."""
    tier = Verified(DiskTier(folder, tmp=folder.parent / "tmp", quota=Quota(None)))
    opened = {}
    for name, array in arrays.items():
        ref = ref_of(array.tobytes())
        tier.put(ref.digest, array.tobytes())
        opened[name] = open_array(tier, TensorEntry(name=name, dtype="float32", shape=array.shape, chunk=ref))
    return opened


def lookup_shard(tensors: dict[str, Array]) -> Shard:
    """y = table[ids] @ w, of ours: the engine packs w, and reads the table as it lies."""
    stubs = []
    for name, array in tensors.items():
        stub = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        stub.data_location = TensorProto.EXTERNAL
        stub.external_data.add(key="location", value=name)
        stubs.append(stub)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", ROWS])]
    graph = helper.make_graph(nodes, "lookup", inputs, outputs, stubs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="shoal")
    return Shard(graph=model, tensors=tensors, slots=0, context_tokens=0, threads=1)


@needs_smaps
def test_weights_that_are_packed_leave_no_page_of_their_files_in_memory(tmp_path: Path) -> None:
    arrays, ids = weights(), np.array([3, 1, 4000])
    shard = lookup_shard(stored(tmp_path / "chunks", arrays))
    verified_bytes = resident_bytes(tmp_path / "chunks")

    session = OnnxBackend().load(shard)
    loaded_bytes = resident_bytes(tmp_path / "chunks")
    answer = session.step((), {"ids": ids})["y"]

    assert verified_bytes == sum(array.nbytes for array in arrays.values())
    assert loaded_bytes == 0
    assert answer == pytest.approx(arrays["table"][ids] @ arrays["w"], abs=1e-4)
    assert 0 < resident_bytes(tmp_path / "chunks") <= verified_bytes // 2, "rows of the table came back, w did not"


@needs_dontneed
def test_what_was_dropped_reads_as_before(tmp_path: Path) -> None:
    arrays = weights()
    opened = stored(tmp_path / "chunks", arrays)

    drop_pages(opened.values())

    for name, array in opened.items():
        assert is_mapped(array)
        assert np.array_equal(array, arrays[name])


@needs_dontneed
def test_memory_that_has_no_other_copy_is_left_alone(tmp_path: Path) -> None:
    anonymous = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    changed = np.memmap(tmp_path / "file", np.uint8, mode="c")
    heap = np.zeros(1 << 20, np.uint8)
    for array in (anonymous, changed, heap):
        array[:] = 7

    drop_pages([anonymous, changed, heap, changed[5:].view(np.int8)])

    assert all((array == 7).all() for array in (anonymous, changed, heap))
    assert [is_mapped(array) for array in (anonymous, changed, heap)] == [True, True, False]
