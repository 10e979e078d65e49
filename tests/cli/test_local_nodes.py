"""How commands find nodes: the one on this machine, and those of the fleet by name."""

import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from shoal.cli.connect import find_node, find_url
from shoal.cli.demo import _wait_for
from shoal.cli.logs import every_event
from shoal.client import Shoal
from shoal.errors import InvalidRequestError, NodeUnreachableError
from shoal.fleet.state import Standing
from shoal.fleet.views import EventView, NodeView
from shoal.ids import NodeId
from shoal.node.running import Running, running_file, running_node
from shoal.store.lock import try_locked

DESK = Running(node=NodeId("d" * 32), name="desk", url="http://127.0.0.1:1", locators=("tcp/127.0.0.1:2",))


def said_to_run(home: Path) -> None:
    running_file(home).parent.mkdir(parents=True)
    running_file(home).write_bytes(msgspec.json.encode(DESK))


def test_a_node_runs_here_while_it_holds_its_home(tmp_path: Path) -> None:
    said_to_run(tmp_path)

    with try_locked(tmp_path / "run" / "lock") as held:
        assert held
        assert running_node(tmp_path) == DESK


def test_what_a_killed_node_left_behind_is_not_believed(tmp_path: Path) -> None:
    said_to_run(tmp_path)

    assert running_node(tmp_path) is None


def test_where_no_other_node_runs_commands_are_about_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.delenv("SHOAL_URL", raising=False)
    demo = tmp_path / "demo" / "gateway"
    said_to_run(demo)

    with pytest.raises(NodeUnreachableError, match="no node runs"):
        find_url()
    with try_locked(demo / "run" / "lock"):
        assert find_url() == DESK.url


def node(letter: str, name: str) -> NodeView:
    return NodeView(id=NodeId(letter * 32), name=name, standing=Standing.ALIVE)


NODES = (node("a", "desk"), node("b", "attic"), node("c", "attic"))


@pytest.mark.parametrize("wanted", ["desk", "aaaa", "a" * 32])
def test_a_node_is_found_by_name_or_by_the_beginning_of_its_id(wanted: str) -> None:
    assert find_node(wanted, NODES).name == "desk"


@pytest.mark.parametrize(("wanted", "said"), [("attic", "2 nodes are"), ("cellar", "no node is"), ("a", "no node is")])
def test_a_name_that_fits_none_or_two_is_refused_with_the_names(wanted: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as refused:
        find_node(wanted, NODES)

    assert "desk, attic, attic" in refused.value.hint


def test_logs_show_all_that_is_kept_not_the_first_page() -> None:
    events = [EventView(sequence=n, kind="node.alive") for n in range(1, 2301)]

    def answer(request: httpx.Request) -> httpx.Response:
        after, limit = int(request.url.params["after"]), int(request.url.params["limit"])
        page = [e for e in events if e.sequence > after][:limit]
        return httpx.Response(200, content=msgspec.json.encode(page))

    with Shoal("http://there", transport=httpx.MockTransport(answer)) as shoal:
        assert [e.sequence for e in every_event(shoal)] == list(range(1, 2301))


def test_a_demo_node_that_ends_at_once_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "node.log").write_text("error: port 8400 is in use")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

        with pytest.raises(NodeUnreachableError, match="port 8400 is in use"):
            _wait_for(tmp_path, process)
