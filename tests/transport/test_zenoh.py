"""What only real sessions can show: topology, ports, frozen peers.  The port's contract is in tests/contracts."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from queue import Empty, SimpleQueue

import pytest

from shoal.errors import NodeUnreachableError, PortInUseError, SettingsError
from shoal.transport.bus import Lane, Sample
from shoal.transport.session import keep_trying, session_config
from shoal.transport.stats import BusStats
from shoal.transport.zenoh import CLOSE_TIMEOUT_S, ZenohBus, open_agent, open_control, open_data

ANY_PORT = ("tcp/127.0.0.1:0",)
PATIENCE_S = 10.0
DEAF = "tcp/127.0.0.1:1"
"""Nobody listens there."""

PEER = """
import sys, time
from shoal.transport.zenoh import open_data
bus = open_data(("tcp/127.0.0.1:0",))
subscription = bus.subscribe("k", lambda sample: None)
print(bus.locators[0], flush=True)
sys.stdin.read()
bus.close()
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arrives(inbox: SimpleQueue[Sample], *, within_s: float) -> bool:
    try:
        inbox.get(timeout=within_s)
    except Empty:
        return False
    return True


def test_a_data_session_reaches_its_next_and_nobody_behind_it(stack: ExitStack) -> None:
    c = stack.enter_context(closing(open_data(ANY_PORT)))
    b = stack.enter_context(closing(open_data(ANY_PORT, c.locators)))
    a = stack.enter_context(closing(open_data(ANY_PORT, b.locators)))
    at_b: SimpleQueue[Sample] = SimpleQueue()
    at_c: SimpleQueue[Sample] = SimpleQueue()
    c.subscribe("k", at_c.put)
    c.subscribe("only/c", at_c.put)
    b.subscribe("k", at_b.put)
    a.wait_matched("k", PATIENCE_S)
    b.wait_matched("only/c", PATIENCE_S)

    a.put("k", b"x", lane=Lane.DECODE)
    assert at_b.get(timeout=PATIENCE_S).payload == b"x"

    with pytest.raises(NodeUnreachableError, match=r"nobody subscribes to only/c within 0\.1 s"):
        a.wait_matched("only/c", 0.1)
    b.put("only/c", b"end", lane=Lane.DECODE)
    assert at_c.get(timeout=PATIENCE_S).payload == b"end"
    with pytest.raises(Empty):
        at_c.get_nowait()


def test_a_missing_link_is_told_when_opening_and_when_waiting(stack: ExitStack, free_port: int) -> None:
    with pytest.raises(NodeUnreachableError, match=f"nothing answers at tcp/127.0.0.1:{free_port}") as caught:
        open_data(ANY_PORT, (f"tcp/127.0.0.1:{free_port}",), timeout_s=0.2)
    assert "/root" not in str(caught.value)
    assert caught.value.hint

    with pytest.raises(NodeUnreachableError):
        open_control(f"tcp/127.0.0.1:{free_port}", timeout_s=0.2)

    alone = stack.enter_context(closing(open_data(ANY_PORT)))
    with pytest.raises(NodeUnreachableError, match="the link is missing"):
        alone.wait_matched("k", 0.1)


def test_a_taken_port_is_named_with_a_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp/127.0.0.1:{taken.getsockname()[1]}"
        for opener in (open_agent, open_data):
            with pytest.raises(PortInUseError, match=endpoint) as caught:
                opener((endpoint,))
            assert "choose another port" in caught.value.hint
            assert "os error" not in caught.value.message


@pytest.mark.parametrize("endpoint", ["rubbish", "tcp/8.8.8.8:7447", "tcp/no-such-host.invalid:1", "smoke/signals:1"])
def test_an_endpoint_that_cannot_be_is_a_settings_error(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="cannot open a session"):
        open_agent((endpoint,))


def test_a_session_says_where_it_listens(stack: ExitStack) -> None:
    agent = stack.enter_context(closing(open_agent(ANY_PORT)))
    control = stack.enter_context(closing(open_control(agent.locators[0])))
    data = stack.enter_context(closing(open_data(("tcp/127.0.0.1:0", "tcp/127.0.0.1:0"))))

    ports = [int(locator.rpartition(":")[2]) for locator in (*agent.locators, *data.locators)]
    assert len(set(ports)) == 3
    assert 0 not in ports
    assert control.locators == ()
    assert len({agent.zid, control.zid, data.zid}) == 3


def test_an_agent_finds_another_that_starts_later(stack: ExitStack, free_port: int) -> None:
    endpoint = f"tcp/127.0.0.1:{free_port}"
    early = stack.enter_context(closing(open_agent(ANY_PORT, (endpoint,))))
    late = stack.enter_context(closing(open_agent((endpoint,))))
    inbox: SimpleQueue[Sample] = SimpleQueue()
    late.subscribe("k", inbox.put)

    early.wait_matched("k", PATIENCE_S, lane=Lane.CONTROL)
    for _ in range(100):  # a matched router link may still swallow messages for 0.1 s
        early.put("k", b"x")
        if arrives(inbox, within_s=0.1):
            return
    pytest.fail("nothing arrived over a link that said it was matched")


def test_one_of_the_addresses_of_a_next_is_enough_and_none_is_an_error(stack: ExitStack) -> None:
    """A machine has addresses that only itself can reach: a container bridge's, for one."""
    b = stack.enter_context(closing(open_data(ANY_PORT)))
    b.subscribe("k", lambda sample: None)

    for addresses in ((DEAF, *b.locators), (*b.locators, DEAF)):
        stack.enter_context(closing(open_data((), addresses))).wait_matched("k", PATIENCE_S)
    with pytest.raises(NodeUnreachableError, match=r"nothing answers at tcp/127\.0\.0\.1:1, tcp/127\.0\.0\.1:2"):
        open_data((), (DEAF, "tcp/127.0.0.1:2"), timeout_s=0.2)


def test_a_control_session_is_of_the_agent_that_was_meant_or_of_none(stack: ExitStack) -> None:
    meant, other = (stack.enter_context(closing(open_agent(ANY_PORT))) for _ in range(2))

    stack.enter_context(closing(open_control(meant.locators[0], zid=meant.zid)))
    with pytest.raises(NodeUnreachableError, match=f"answers {other.zid}, not agent {meant.zid}"):
        open_control(other.locators[0], zid=meant.zid)


def test_two_agents_with_a_client_each_are_one_fabric(stack: ExitStack) -> None:
    hub = stack.enter_context(closing(open_agent(ANY_PORT)))
    site = stack.enter_context(closing(open_agent(ANY_PORT, hub.locators)))
    at_hub = stack.enter_context(closing(open_control(hub.locators[0])))
    at_site = stack.enter_context(closing(open_control(site.locators[0])))
    at_site.answer("where", lambda sample: b"site")
    at_site.subscribe("settled", lambda sample: None)
    at_hub.wait_matched("settled", PATIENCE_S)

    assert at_hub.query("where", b"", timeout_s=PATIENCE_S) == b"site"


def test_more_keys_than_publishers_are_kept_still_deliver_in_order(stack: ExitStack) -> None:
    b = stack.enter_context(closing(open_data(ANY_PORT)))
    a = stack.enter_context(closing(open_data(ANY_PORT, b.locators)))
    inbox: SimpleQueue[Sample] = SimpleQueue()
    b.subscribe("k/*", inbox.put)
    a.wait_matched("k/0", PATIENCE_S)
    keys = [f"k/{number}" for number in range(600)] * 2

    for key in keys:
        a.put(key, b"", lane=Lane.DECODE)

    assert [inbox.get(timeout=PATIENCE_S).key for _ in keys] == keys


def test_a_session_counts_what_goes_through_it(stack: ExitStack) -> None:
    b = stack.enter_context(closing(open_data(ANY_PORT)))
    a = stack.enter_context(closing(open_data(ANY_PORT, b.locators)))
    inbox: SimpleQueue[Sample] = SimpleQueue()
    b.answer("ask", lambda sample: b"yes")
    b.subscribe("k", inbox.put)
    a.wait_matched("k", PATIENCE_S)

    a.put("k", b"12345")
    inbox.get(timeout=PATIENCE_S)
    a.query("ask", b"", timeout_s=PATIENCE_S)
    with pytest.raises(NodeUnreachableError):
        a.query("nobody", b"", timeout_s=0.1)

    assert a.stats() == BusStats(messages_sent=1, bytes_sent=5, queries_sent=2, queries_failed=1)
    assert b.stats() == BusStats(messages_received=1, bytes_received=5, queries_answered=1)


def test_close_returns_although_the_peer_is_frozen_behind_a_full_queue(stack: ExitStack) -> None:
    peer = subprocess.Popen([sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(lambda: (peer.kill(), peer.communicate()))
    assert peer.stdout is not None
    bus = open_data(ANY_PORT, (peer.stdout.readline().strip(),))
    bus.wait_matched("k", PATIENCE_S)
    full = threading.Event()

    def flood() -> None:
        watch = threading.Timer(0.3, full.set)  # sockets hold some megabytes: far less than 0.3 s of puts
        watch.start()
        try:
            while True:
                bus.put("k", bytes(1 << 20), lane=Lane.DECODE)
        except NodeUnreachableError:
            watch.join()

    os.kill(peer.pid, signal.SIGSTOP)
    flooding = threading.Thread(target=flood, daemon=True)
    flooding.start()
    assert full.wait(PATIENCE_S)

    closing_thread = threading.Thread(target=bus.close, daemon=True)
    closing_thread.start()
    closing_thread.join(CLOSE_TIMEOUT_S + PATIENCE_S)

    assert not closing_thread.is_alive()
    peer.kill()
    flooding.join(PATIENCE_S)
    assert not flooding.is_alive()


LIVING = """
import sys
from shoal.transport.zenoh import open_agent
bus = open_agent(("tcp/127.0.0.1:0",), (sys.argv[1],))
token = bus.alive("k/alive")
print("up", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_is_told_of_through_its_fleet(stack: ExitStack) -> None:
    hub = stack.enter_context(closing(open_agent(ANY_PORT)))
    watching = stack.enter_context(closing(open_agent(ANY_PORT, hub.locators)))
    gone: SimpleQueue[str] = SimpleQueue()
    watching.watch("k/*", gone.put)
    living = [sys.executable, "-c", LIVING, hub.locators[0]]
    process = subprocess.Popen(living, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(lambda: (process.kill(), process.communicate()))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    while not _is_known(watching, "k/alive"):
        time.sleep(0.01)

    process.kill()

    assert gone.get(timeout=PATIENCE_S) == "k/alive"


def _is_known(bus: ZenohBus, key: str) -> bool:
    return any(reply.ok is not None for reply in bus._session.liveliness().get(key, timeout=1.0))


def test_nothing_scouts_unless_asked_to() -> None:
    def scouting(*, discover: bool) -> object:
        return session_config("router", ANY_PORT, (), keep_trying(), discover=discover)["scouting"]

    assert scouting(discover=False) == {
        "delay": 0,
        "multicast": {"enabled": False, "autoconnect": {"router": []}},
        "gossip": {"enabled": False},
    }
    assert "'enabled': True, 'autoconnect': {'router': ['router']}" in str(scouting(discover=True))
