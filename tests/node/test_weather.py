"""An emulated machine that changes while its node runs."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.clock import ManualClock
from shoal.ids import NodeId
from shoal.node.weather import (
    ChangingLinks,
    Slowness,
    Weather,
    link_of,
    links_of,
    read_weather,
    slowdown_of,
    weather_file,
    write_weather,
)
from shoal.node.worker_spec import LinkShape
from shoal.threads import SystemThreads
from shoal.transport.bus import Lane
from shoal.transport.memory import MemoryBus
from shoal.transport.shaped import ShapedBus

BOX, BOARD = NodeId("b" * 32), NodeId("c" * 32)
NEAR = LinkShape(target=BOX, latency_s=0.0, bytes_per_s=1e9)
FAR = LinkShape(target=BOX, latency_s=30.0, bytes_per_s=1e9)


def test_what_the_file_names_counts_and_the_rest_is_as_at_the_start(tmp_path: Path) -> None:
    other = LinkShape(target=BOARD, latency_s=1.0, bytes_per_s=1.0)
    assert (slowdown_of(tmp_path, 2.0), links_of(tmp_path, (NEAR, other))) == (2.0, (NEAR, other))

    write_weather(tmp_path, Weather(slowdown=6.0, links=(FAR,)))

    assert (slowdown_of(tmp_path, 2.0), links_of(tmp_path, (NEAR, other))) == (6.0, (FAR, other))
    write_weather(tmp_path, Weather())
    assert slowdown_of(tmp_path, 2.0) == 2.0


@pytest.mark.parametrize("found", [b"", b"{", b'{"slowdown": "much"}', b"\x00"])
def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path, found: bytes) -> None:
    write_weather(tmp_path, Weather())
    weather_file(tmp_path).write_bytes(found)

    assert read_weather(tmp_path) == Weather()


def test_nothing_is_faster_than_the_machine_itself(tmp_path: Path) -> None:
    write_weather(tmp_path, Weather(slowdown=0.1))

    assert slowdown_of(tmp_path, 2.0) == 1.0


def test_the_file_is_looked_up_again_after_a_while(tmp_path: Path) -> None:
    clock = ManualClock()
    slowness = Slowness(tmp_path, 2.0, clock.now_s)
    assert slowness() == 2.0
    write_weather(tmp_path, Weather(slowdown=6.0))

    assert slowness() == 2.0
    clock.advance(1.0)
    assert slowness() == 6.0


def test_a_link_that_changes_while_messages_are_on_it_keeps_their_order(
    tmp_path: Path, bus_of: Callable[[str], MemoryBus]
) -> None:
    heard: list[bytes] = []
    bus_of("there").subscribe("to/box/**", lambda sample: heard.append(bytes(sample.payload)))
    slow = LinkShape(target=BOX, latency_s=0.4, bytes_per_s=1e9)
    write_weather(tmp_path, Weather(links=(slow,)))
    shaped = ShapedBus(bus_of("here"), {"to/box": link_of(slow)}, SystemThreads())
    changing = ChangingLinks(shaped, tmp_path, (NEAR,), lambda _: ("to/box",))
    changing.start()
    shaped.put("to/box/x", b"1", lane=Lane.DECODE)
    write_weather(tmp_path, Weather())
    wire = shaped._links["to/box"][0]
    until(lambda: wire.way.latency_s == 0.0)
    shaped.put("to/box/x", b"2", lane=Lane.DECODE)

    until(lambda: len(heard) == 2)
    assert heard == [b"1", b"2"]
    changing.close()
    shaped.close()


def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")
