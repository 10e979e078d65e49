"""A node in the foreground: who may end it, and what the command learns of it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli.start import Stop, run
from shoal.node.assemble import Running, running_node

FLAGS = {
    "http": None, "api_keys": "", "listen": "127.0.0.1:0", "name": "desk", "memory": "1MB", "threads": 1,
    "slowdown": 1.0, "links": None, "discover": False,
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    return tmp_path


def by_itself(stop: Stop) -> None:
    stop()


def by_signal(_: Stop) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("end", "signalled"), [(by_itself, False), (by_signal, True)])
def test_a_command_learns_whether_a_signal_ended_its_node(
    home: Path, end: Callable[[Stop], None], signalled: bool
) -> None:
    seen: list[Running | None] = []
    stops: list[Stop] = []

    def begin(_: Running, stop: Stop) -> None:
        seen.append(running_node(home))
        stops.append(stop)
        end(stop)

    assert run(FLAGS, expose=False, then=begin) is signalled
    assert seen[0] is not None
    assert seen[0].name == "desk"
    assert running_node(home) is None
    stops[0]()  # a thread that learns of it late does no harm
