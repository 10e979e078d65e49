from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shoal.ids import NodeId
from shoal.model.spec import Array, ImportedModel, ModelKind, ModelSpec
from shoal.store.fetch import Fetcher
from shoal.store.home import Store, open_store
from shoal.store.pace import Pacer
from shoal.store.peer import serve_chunks
from shoal.store.tier import Tier
from shoal.transport.bus import Bus
from shoal.transport.memory import MemoryFabric

FLEET = "f"


class Room:
    """A fabric with a fetching node, and as many serving ones as a test asks for."""

    def __init__(self, stack: ExitStack, store: Store) -> None:
        self._stack = stack
        self._fabric = MemoryFabric()
        self.store = store
        self.bus = self.attach("asker")
        self.arrived: list[int] = []

    def attach(self, name: str) -> Bus:
        bus = self._fabric.attach(name)
        self._stack.callback(bus.close)
        return bus

    def serve(self, name: str, tier: Tier, *, first: Tier | None = None) -> NodeId:
        node = NodeId(name)
        self._stack.callback(serve_chunks(self.attach(name), FLEET, node, tier, first=first).close)
        return node

    def cut_off(self, name: str) -> None:
        """Let what is sent to *name* vanish: it looks frozen."""
        self._fabric.partition("asker", name)

    def fetcher(self, bus: Bus | None = None, pacer: Pacer | None = None) -> Fetcher:
        return Fetcher(bus or self.bus, FLEET, self.store, pacer=pacer or Pacer(), timeout_s=0.5)


@pytest.fixture
def room(store: Store) -> Iterator[Room]:
    with ExitStack() as stack:
        yield Room(stack, store)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "home")


@pytest.fixture
def small_model() -> Callable[..., ImportedModel]:
    """y = x @ w + b as an importer would give it; *seed* chooses the weights."""

    def make(name: str = "small", seed: int = 0, rows: int = 64) -> ImportedModel:
        arrays: dict[str, Array] = {
            "w": np.sin(np.arange(rows * 32, dtype=np.float32) + 1000 * seed).reshape(rows, 32),
            "b": np.full(512, seed, np.float32),
        }
        stubs = [_stub(key, array) for key, array in arrays.items()]
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Identity", ["b"], ["y"])]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])]
        outputs = [helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 32])]
        graph = helper.make_model(helper.make_graph(nodes, "small", inputs, outputs, initializer=stubs))
        return ImportedModel(
            spec=ModelSpec(name=name, kind=ModelKind.TENSOR, architecture="onnx"),
            graph=graph,
            tensors={key: lambda array=array: array for key, array in arrays.items()},
            files={"labels.txt": b"cat\ndog\n"},
        )

    return make


def _stub(name: str, array: Array) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    return tensor
