"""The weather of the in-memory fabric."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from queue import Empty, SimpleQueue

import pytest

from shoal.errors import InvalidRequestError, NodeUnreachableError
from shoal.transport.bus import Sample
from shoal.transport.memory import MemoryBus, MemoryFabric, Weather
from shoal.transport.stats import BusStats

PATIENCE_S = 10.0


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric(seed=7)


@pytest.fixture
def nodes(fabric: MemoryFabric) -> Iterator[tuple[MemoryBus, MemoryBus, MemoryBus]]:
    with ExitStack() as stack:
        a, b, c = (stack.enter_context(closing(fabric.attach(name))) for name in "abc")
        yield a, b, c


def listen(bus: MemoryBus) -> SimpleQueue[Sample]:
    inbox: SimpleQueue[Sample] = SimpleQueue()
    bus.subscribe("**", inbox.put)
    return inbox


def drain(inbox: SimpleQueue[Sample], last: bytes) -> list[bytes]:
    """Payloads before *last*."""
    got: list[bytes] = []
    while (payload := inbox.get(timeout=PATIENCE_S).payload) != last:
        got.append(payload)
    return got


def test_a_partition_cuts_both_ways_spares_others_and_heals(
    fabric: MemoryFabric, nodes: tuple[MemoryBus, MemoryBus, MemoryBus]
) -> None:
    a, b, c = nodes
    at_a, at_b, at_c = listen(a), listen(b), listen(c)

    fabric.partition("a", "b")
    a.put("k", b"from a")
    b.put("k", b"from b")
    fabric.heal("a", "b")
    a.put("k", b"last")

    assert drain(at_a, b"last") == [b"from a"]
    assert drain(at_b, b"last") == [b"from b"]
    assert drain(at_c, b"last") == [b"from a", b"from b"]


def test_a_question_into_a_partition_times_out_and_prefers_who_can_be_reached(
    fabric: MemoryFabric, nodes: tuple[MemoryBus, MemoryBus, MemoryBus]
) -> None:
    a, b, c = nodes
    b.answer("k", lambda sample: b"b")
    fabric.partition("a", "b")
    with pytest.raises(NodeUnreachableError, match=r"within 0\.02 s"):
        a.query("k", b"", timeout_s=0.02)

    c.answer("k", lambda sample: b"c")

    assert a.query("k", b"", timeout_s=PATIENCE_S) == b"c"


def test_delay_does_not_reorder_even_when_it_shrinks(
    fabric: MemoryFabric, nodes: tuple[MemoryBus, MemoryBus, MemoryBus]
) -> None:
    a, b, _ = nodes
    inbox = listen(b)

    fabric.weather("a", "b", Weather(delay_s=0.05))
    sent_s = time.monotonic()
    a.put("k", b"1")
    fabric.weather("a", "b", Weather())
    a.put("k", b"2")

    assert [inbox.get(timeout=PATIENCE_S).payload for _ in range(2)] == [b"1", b"2"]
    assert time.monotonic() - sent_s >= 0.05  # a lower bound: no slow machine can break it


def test_loss_takes_its_share_and_only_in_its_direction(
    fabric: MemoryFabric, nodes: tuple[MemoryBus, MemoryBus, MemoryBus]
) -> None:
    a, b, _ = nodes
    at_a, at_b = listen(a), listen(b)
    fabric.weather("a", "b", Weather(loss=0.5))

    for _ in range(400):
        a.put("k", b"x")
        b.put("k", b"y")
    fabric.weather("a", "b", Weather())
    a.put("k", b"last")
    b.put("k", b"last")

    assert 140 < drain(at_b, b"last").count(b"x") < 260
    assert drain(at_a, b"last").count(b"y") + drain(at_a, b"last").count(b"y") == 400


@pytest.mark.parametrize("what", ["subscription", "bus"])
def test_what_is_on_its_way_when_a_subscription_or_its_bus_closes_is_dropped(
    fabric: MemoryFabric, nodes: tuple[MemoryBus, MemoryBus, MemoryBus], what: str
) -> None:
    a, b, _ = nodes
    inbox: SimpleQueue[Sample] = SimpleQueue()
    subscription = b.subscribe("k", inbox.put)
    fabric.weather("a", "b", Weather(delay_s=0.02))

    a.put("k", b"x")
    {"subscription": subscription, "bus": b}[what].close()

    with pytest.raises(Empty):
        inbox.get(timeout=0.05)


def test_a_name_is_attached_once_and_free_again_after_closing(fabric: MemoryFabric) -> None:
    with closing(fabric.attach("a")), pytest.raises(InvalidRequestError, match="'a' is attached already"):
        fabric.attach("a")

    fabric.attach("a").close()


def test_a_bus_counts_what_goes_through_it(nodes: tuple[MemoryBus, MemoryBus, MemoryBus]) -> None:
    a, b, _ = nodes
    inbox = listen(b)
    b.answer("k", lambda sample: b"")
    a.put("k", b"12345")
    a.query("k", b"", timeout_s=PATIENCE_S)
    with pytest.raises(NodeUnreachableError):
        a.query("nobody", b"", timeout_s=PATIENCE_S)
    inbox.get(timeout=PATIENCE_S)

    assert a.stats() == BusStats(messages_sent=1, bytes_sent=5, queries_sent=2, queries_failed=1)
    assert b.stats() == BusStats(messages_received=1, bytes_received=5, queries_answered=1)
