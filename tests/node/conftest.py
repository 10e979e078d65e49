"""Parts of a node on an in-memory fabric."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.typing import FilteringBoundLogger

from shoal.ids import Digest
from shoal.node.importing import import_files
from shoal.node.journal import Journal
from shoal.node.progress import Quiet
from shoal.node.pull import PullRequest, pull
from shoal.observe.log import set_up_logs
from shoal.store.home import Store, open_store
from shoal.transport.memory import MemoryBus, MemoryFabric

Pulled = tuple[Store, Digest]


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric()


@pytest.fixture
def bus_of(fabric: MemoryFabric) -> Iterator[Callable[[str], MemoryBus]]:
    """A bus of that name, closed at the end."""
    made: list[MemoryBus] = []

    def attach(name: str) -> MemoryBus:
        made.append(fabric.attach(name))
        return made[-1]

    yield attach
    for bus in made:
        bus.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


@pytest.fixture
def logged() -> io.StringIO:
    """What `log` has written."""
    return io.StringIO()


@pytest.fixture
def log(logged: io.StringIO) -> FilteringBoundLogger:
    return set_up_logs(logged)


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Pulled]]:
    """Pull a model of this machine into a store of its own; the model's digest there.  Stores of real models are big."""
    homes: list[Path] = []

    def make(file: Path) -> Pulled:
        homes.append(tmp_path_factory.mktemp("home"))
        store = open_store(homes[-1])
        pull(store, PullRequest(reference=str(file), name="it"), import_files, Quiet())
        return store, store.library.digest("it")

    yield make
    for home in homes:
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def tiny_store(pulled: Callable[[Path], Pulled], golden: Path) -> Pulled:
    """A store with the recorded tiny llama in it, and the model's digest."""
    return pulled(golden / "llama")
