"""The wire's laws without a clock, and the shell's behaviour on the in-memory bus."""

import time
from collections.abc import Iterator
from contextlib import closing
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import NodeUnreachableError, SettingsError
from shoal.threads import SystemThreads
from shoal.transport.bus import Lane
from shoal.transport.memory import MemoryBus, MemoryFabric
from shoal.transport.shaped import SEGMENT_BYTES, Link, ShapedBus, Way, Wire, due_s

PATIENCE_S = 10.0

ways = st.builds(
    Way,
    latency_s=st.floats(0, 1),
    bytes_per_s=st.none() | st.floats(1e3, 1e9),
    jitter_s=st.sampled_from([0.0, 0.0, 0.3]),
)
messages = st.lists(st.tuples(st.floats(0, 2), st.sampled_from(Lane), st.integers(0, 4 * SEGMENT_BYTES)), max_size=12)


def run(wire: Wire, sent: list[tuple[float, Lane, int]]) -> list[tuple[float, int]]:
    """(arrival, number of the message) in the order of arrival: an owner that serves whenever the wire is free."""
    arrivals: list[tuple[float, int]] = []
    waiting = sorted(enumerate(sent), key=lambda entry: entry[1][0])

    def push() -> None:
        number, (now_s, lane, size) = waiting.pop(0)
        wire.push(now_s, lane, size, lambda: arrivals.append((0.0, number)))

    while waiting or wire.queue:
        while waiting and (not wire.queue or waiting[0][1][0] <= wire.free_s):
            push()
        arrival = wire.serve()
        if arrival is not None:
            arrival[1]()
            arrivals[-1] = (arrival[0], arrivals[-1][1])
    return sorted(arrivals, key=lambda entry: entry[0])


@given(ways, messages)
def test_no_message_is_faster_than_the_way_and_none_is_lost(way: Way, sent: list[tuple[float, Lane, int]]) -> None:
    arrivals = run(Wire(way), sent)

    assert sorted(number for _, number in arrivals) == list(range(len(sent)))
    for arrive_s, number in arrivals:
        ready_s, _, size = sent[number]
        assert arrive_s >= due_s(way, ready_s, 0.0, size)[1] - 1e-9


@given(ways, messages)
def test_order_is_kept_within_a_lane(way: Way, sent: list[tuple[float, Lane, int]]) -> None:
    sent = sorted(sent, key=lambda message: message[0])

    arrivals = run(Wire(way), sent)

    for lane in Lane:
        numbers = [number for _, number in arrivals if sent[number][1] is lane]
        assert numbers == sorted(numbers)


@given(st.floats(1e3, 1e9), messages)
def test_the_wire_is_never_idle_while_something_waits(bytes_per_s: float, sent: list[tuple[float, Lane, int]]) -> None:
    together = [(0.0, lane, size) for _, lane, size in sent]

    arrivals = run(Wire(Way(bytes_per_s=bytes_per_s)), together)

    if arrivals:
        assert arrivals[-1][0] == pytest.approx(sum(size for _, _, size in sent) / bytes_per_s)


def test_a_decode_frame_waits_for_one_segment_of_bulk_at_most() -> None:
    wire = Wire(Way(bytes_per_s=SEGMENT_BYTES * 10.0))

    arrivals = run(
        wire, [(0.0, Lane.BULK, SEGMENT_BYTES * 20), (0.05, Lane.DECODE, 0), (0.31, Lane.CONTROL, SEGMENT_BYTES)]
    )

    assert arrivals == [(pytest.approx(0.1), 1), (pytest.approx(0.5), 2), (pytest.approx(2.1), 0)]


@pytest.mark.parametrize("bad", [{"latency_s": -0.1}, {"bytes_per_s": 0.0}, {"jitter_s": -1.0}])
def test_a_way_that_no_message_can_take_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Way(**bad)


@pytest.fixture
def nodes() -> Iterator[tuple[ShapedBus, MemoryBus]]:
    fabric = MemoryFabric()
    slow = Link(out=Way(latency_s=0.03), back=Way(latency_s=0.02))
    with (
        closing(fabric.attach("b")) as b,
        closing(ShapedBus(fabric.attach("a"), {"shoal/x": slow}, SystemThreads())) as a,
    ):
        yield a, b


def test_a_shaped_key_is_late_and_others_pass_it(nodes: tuple[ShapedBus, MemoryBus]) -> None:
    a, b = nodes
    inbox: SimpleQueue[tuple[str, float]] = SimpleQueue()
    b.subscribe("**", lambda sample: inbox.put((sample.key, time.monotonic())))
    sent_s = time.monotonic()

    a.put("shoal/x/1", b"")
    a.put("shoal/xy", b"")

    assert inbox.get(timeout=PATIENCE_S)[0] == "shoal/xy"
    key, at_s = inbox.get(timeout=PATIENCE_S)
    assert key == "shoal/x/1"
    assert at_s - sent_s >= 0.03  # a lower bound: no slow machine can break it


def test_a_question_pays_both_ways(nodes: tuple[ShapedBus, MemoryBus]) -> None:
    a, b = nodes
    b.answer("**", lambda sample: sample.payload)
    asked_s = time.monotonic()

    assert a.query("shoal/x", b"?", timeout_s=PATIENCE_S) == b"?"

    assert time.monotonic() - asked_s >= 0.05
    with pytest.raises(NodeUnreachableError, match="its link is slow"):
        a.query("shoal/x", b"?", timeout_s=0.01)


def test_the_longest_prefix_counts_and_a_link_can_be_changed(nodes: tuple[ShapedBus, MemoryBus]) -> None:
    a, b = nodes
    order: SimpleQueue[str] = SimpleQueue()
    b.subscribe("**", lambda sample: order.put(sample.key))
    none = Way()
    a.set_link("shoal/x/fast", Link(out=none, back=none))

    a.put("shoal/x/slow", b"")
    a.put("shoal/x/fast/1", b"")
    assert [order.get(timeout=PATIENCE_S) for _ in range(2)] == ["shoal/x/fast/1", "shoal/x/slow"]

    a.set_link("shoal/x", None)
    a.put("shoal/x/now", b"")
    assert order.get(timeout=PATIENCE_S) == "shoal/x/now"
