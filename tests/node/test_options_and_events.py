"""How a node is started, and what it remembers of what happened."""

import io
from contextlib import suppress

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.typing import FilteringBoundLogger

from shoal.errors import SettingsError
from shoal.ids import NodeId
from shoal.node.events import KEPT_EVENTS, PER_LEASE, EventRing
from shoal.node.options import check_exposed, check_reachable, host_name, locator, parse_link, web_origin


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:7400", "tcp/127.0.0.1:7400"),
        ("tcp/box.local:1", "tcp/box.local:1"),
        ("[::1]:65535", "tcp/[::1]:65535"),
        ("0.0.0.0:0", "tcp/0.0.0.0:0"),
    ],
)
def test_an_address_becomes_a_locator(text: str, expected: str) -> None:
    assert locator(text, what="ADDRESS") == expected


@pytest.mark.parametrize(
    "text", ["", "box", "box:", ":7400", "box:65536", "udp/box:1", "box:74 00", "http://box:1", "::1:80"]
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match=r"HOST:PORT") as caught:
        locator(text, what="--listen")

    assert caught.value.param == "--listen"


@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (lambda: parse_link(text), lambda: check_exposed(text, expose=False)):
        with suppress(SettingsError):
            parse()
    with suppress(SettingsError):
        found = locator(text, what="x")
        assert locator(found, what="x") == found, "what was read is an address"


@pytest.mark.parametrize("listen", ["tcp/127.0.0.1:1", "tcp/127.9.9.9:1", "tcp/localhost:1", "tcp/[::1]:1"])
def test_loopback_exposes_nothing(listen: str) -> None:
    assert check_exposed(listen, expose=False) == ""


@pytest.mark.parametrize("listen", ["tcp/0.0.0.0:1", "tcp/192.168.1.4:1", "tcp/box.local:1", "tcp/[::]:1"])
def test_beyond_loopback_a_node_listens_only_when_told_and_prints_what_that_exposes(listen: str) -> None:
    with pytest.raises(SettingsError, match="--expose"):
        check_exposed(listen, expose=False)

    warning = check_exposed(listen, expose=True)
    assert listen in warning
    assert "prompts" in warning


@pytest.mark.parametrize(
    ("connect", "listen", "warned"),
    [
        (["tcp/192.168.1.10:7400"], "tcp/127.0.0.1:0", True),
        (["tcp/127.0.0.1:7400", "tcp/attic:7400"], "tcp/localhost:0", True),
        (["tcp/192.168.1.10:7400"], "tcp/192.168.1.11:7400", False),
        (["tcp/127.0.0.1:7400", "tcp/[::1]:7400"], "tcp/127.0.0.1:0", False),
        ([], "tcp/127.0.0.1:0", False),
    ],
)
def test_a_node_that_joins_other_machines_and_listens_on_loopback_is_told_the_flag(
    connect: list[str], listen: str, warned: bool
) -> None:
    warning = check_reachable(connect, listen)

    assert ("--listen" in warning and "--expose" in warning) is warned


@pytest.mark.parametrize("text", ["Box.local", "[::1]", "10.0.0.1"])
def test_a_name_that_a_gateway_is_called_by_is_taken_without_port(text: str) -> None:
    assert host_name(text) == text.lower()
    with pytest.raises(SettingsError, match="no host name") as caught:
        host_name(f"{text}:8400")
    assert caught.value.param == "--allow-host"


@pytest.mark.parametrize("text", ["https://Chat.example", "http://localhost:3000", "app://notes"])
def test_a_web_origin_is_taken_without_path(text: str) -> None:
    assert web_origin(text) == text.lower()
    for wrong in (f"{text}/", text.partition("://")[2], "*", ""):
        with pytest.raises(SettingsError, match="no web origin"):
            web_origin(wrong)


def test_an_emulated_link_is_read_in_its_units() -> None:
    link = parse_link(f"{'a' * 32}=2.5ms,80mbit")

    assert (link.target, link.latency_s, link.bytes_per_s) == (NodeId("a" * 32), 0.0025, 10e6)


@pytest.mark.parametrize("text", ["a=1ms,1mbit", f"{'a' * 32}=1ms", f"{'a' * 32}=1ms,0mbit", f"{'a' * 32}=-1ms,1mbit"])
def test_a_link_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="mbit"):
        parse_link(text)


def test_the_ring_keeps_the_newest_events_with_growing_numbers(log: FilteringBoundLogger, logged: io.StringIO) -> None:
    async def scenario() -> None:
        ring = EventRing(log, lambda: 12.5)
        for n in range(KEPT_EVENTS + 5):
            ring.note("node.alive", f"box {n}", node=NodeId("n"))
        kept = await ring.events(0, KEPT_EVENTS)
        assert [kept[0].sequence, kept[-1].sequence] == [6, KEPT_EVENTS + 5]
        assert [e.text for e in await ring.events(kept[-3].sequence, 1)] == [kept[-2].text]
        assert kept[0].unix_s == 12.5

        ring.begin(3)
        ring.note("coordinator.leads", "lease 3")
        assert (await ring.events(kept[-1].sequence, 9))[0].sequence == 3 * PER_LEASE, (
            "above those of every earlier holder"
        )

    anyio.run(scenario)
    assert "box 3" in logged.getvalue()
