"""A node in the foreground: who may end it, and what the command learns of it."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from shoal.cli.serve import serve
from shoal.cli.start import Stop, run
from shoal.errors import SettingsError
from shoal.node.running import Running, running_node

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


def test_a_gateway_answers_to_the_names_and_the_pages_that_its_owner_allows(home: Path) -> None:
    flags = {**FLAGS, "http": ("127.0.0.1", 0), "allow_hosts": ["Box.local"], "allow_origins": ["https://ours.example"]}
    statuses: list[int] = []

    def ask(running: Running, stop: Stop) -> None:
        asked = (
            {"Host": "box.local"},
            {"Host": "localhost", "Origin": "https://ours.example"},
            {"Host": "other.local"},
            {"Host": "localhost", "Origin": "https://others.example"},
        )
        statuses.extend(httpx.get(f"{running.url}/livez", headers=headers).status_code for headers in asked)
        stop()

    def begin(running: Running, stop: Stop) -> None:
        threading.Thread(target=ask, args=(running, stop)).start()

    run(flags, expose=False, then=begin)

    assert statuses == [200, 200, 400, 400]


def test_flags_for_a_gateway_that_runs_already_are_refused(home: Path) -> None:
    with pytest.raises(SettingsError, match="another one is asked"):
        serve("m", allow_hosts=["box.local"], url="http://127.0.0.1:9")
