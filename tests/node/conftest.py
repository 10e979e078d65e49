"""Parts of a node on an in-memory fabric."""

import io
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

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


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
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Digest]:
    """A store with the recorded tiny llama in it, and the model's digest."""
    store = open_store(tmp_path_factory.mktemp("home"))
    pull(store, PullRequest(reference=str(GOLDEN / "llama"), name="tiny"), import_files, Quiet())
    return store, store.library.digest("tiny")
