"""What every Bus keeps: run on the in-memory one, on Zenoh in both topologies, and on a shaped one."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import pytest

from shoal.errors import InvalidRequestError, NodeUnreachableError, OverloadedError, ShoalError
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus, Lane, Sample
from shoal.transport.memory import MemoryFabric
from shoal.transport.shaped import Link, ShapedBus, Way
from shoal.transport.zenoh import ZenohBus, open_agent, open_control, open_data

ANY_PORT = ("tcp/127.0.0.1:0",)
PATIENCE_S = 20.0


@dataclass
class Pair:
    """Two nodes that can reach each other.  `settle` returns when *a* knows what *b* has declared."""

    a: Bus
    b: Bus
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def settle(self) -> None:
        if isinstance(self.a, ZenohBus):
            key = f"settle/{next(self.numbers)}"  # declarations of one session arrive in order
            with closing(self.b.subscribe(key, lambda _: None)):
                self.a.wait_matched(key, PATIENCE_S)


class Inbox:
    """Hands samples over to a queue, as `deliver` should."""

    def __init__(self) -> None:
        self.samples: SimpleQueue[Sample] = SimpleQueue()
        self.deliver: Callable[[Sample], None] = self.samples.put

    def take(self, count: int) -> list[Sample]:
        return [self.samples.get(timeout=PATIENCE_S) for _ in range(count)]

    def payloads(self, count: int) -> list[bytes]:
        return [sample.payload for sample in self.take(count)]

    def nothing_more(self) -> bool:
        try:
            self.samples.get_nowait()
        except Empty:
            return True
        return False


def memory(stack: ExitStack) -> tuple[Bus, Bus]:
    fabric = MemoryFabric()
    a, b = stack.enter_context(closing(fabric.attach("a"))), stack.enter_context(closing(fabric.attach("b")))
    return a, b


def shaped(stack: ExitStack) -> tuple[Bus, Bus]:
    way = Way(latency_s=0.001, bytes_per_s=200e6, jitter_s=0.0005)
    a, b = memory(stack)
    slow = ShapedBus(a, {"k": Link(out=way, back=way)}, SystemThreads())
    return stack.enter_context(closing(slow)), b


def clients(stack: ExitStack) -> tuple[Bus, Bus]:
    agent = stack.enter_context(closing(open_agent(ANY_PORT)))
    a = stack.enter_context(closing(open_control(agent.locators[0])))
    b = stack.enter_context(closing(open_control(agent.locators[0])))
    return a, b


def peers(stack: ExitStack) -> tuple[Bus, Bus]:
    b = stack.enter_context(closing(open_data(ANY_PORT)))
    a = stack.enter_context(closing(open_data(ANY_PORT, b.locators)))
    return a, b


@pytest.fixture(params=[memory, shaped, clients, peers])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(*request.param(stack))


def test_many_small_messages_arrive_once_and_in_order(pair: Pair) -> None:
    inbox = Inbox()
    pair.b.subscribe("k/n", inbox.deliver)
    pair.settle()
    sent = [number.to_bytes(4, "little") for number in range(5000)]

    for payload in sent:
        pair.a.put("k/n", payload, lane=Lane.DECODE)

    assert inbox.payloads(5000) == sent
    pair.a.put("k/n", b"last", lane=Lane.DECODE)
    assert inbox.payloads(1) == [b"last"]


def test_a_large_message_arrives_whole(pair: Pair) -> None:
    inbox = Inbox()
    pair.b.subscribe("k/large", inbox.deliver)
    pair.settle()
    payload = bytes(range(256)) * (8 << 12)

    pair.a.put("k/large", payload, lane=Lane.BULK)

    assert inbox.payloads(1) == [payload]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("k/1/x", ["k/1/x"]),
        ("k/*/x", ["k/1/x", "k/2/x"]),
        ("k/**", ["k/1/x", "k/2/x", "k/2/y/z", "k"]),
        ("**/z", ["k/2/y/z"]),
        ("k/**/x", ["k/1/x", "k/2/x"]),
    ],
)
def test_a_pattern_selects_the_keys_it_covers(pair: Pair, pattern: str, wanted: list[str]) -> None:
    inbox, end = Inbox(), Inbox()
    pair.b.subscribe(pattern, inbox.deliver)
    pair.b.subscribe("end", end.deliver)
    pair.settle()

    for key in ("k/1/x", "k/2/x", "k/2/y/z", "k", "other"):
        pair.a.put(key, key.encode())

    assert [sample.key for sample in inbox.take(len(wanted))] == wanted
    pair.a.put("end", b"")
    end.take(1)
    assert inbox.nothing_more()


def test_each_of_two_subscriptions_gets_its_own_copy(pair: Pair) -> None:
    first, second = Inbox(), Inbox()
    pair.b.subscribe("k/1", first.deliver)
    pair.b.subscribe("k/*", second.deliver)
    pair.settle()

    pair.a.put("k/1", b"x")

    assert first.payloads(1) == second.payloads(1) == [b"x"]


def test_a_bus_hears_itself(pair: Pair) -> None:
    inbox = Inbox()
    pair.a.subscribe("k/self", inbox.deliver)

    pair.a.put("k/self", b"x")

    assert inbox.payloads(1) == [b"x"]


@pytest.mark.parametrize("lane", list(Lane))
def test_every_lane_delivers(pair: Pair, lane: Lane) -> None:
    inbox = Inbox()
    pair.b.subscribe("k/lane", inbox.deliver)
    pair.settle()

    pair.a.put("k/lane", b"x", lane=lane)

    assert inbox.payloads(1) == [b"x"]


def test_a_callback_never_runs_on_the_senders_thread(pair: Pair) -> None:
    threads: SimpleQueue[int] = SimpleQueue()
    pair.a.subscribe("k/self", lambda _: threads.put(threading.get_ident()))

    pair.a.put("k/self", b"")

    assert threads.get(timeout=PATIENCE_S) != threading.get_ident()


def test_a_slow_consumer_behind_a_handover_loses_nothing(pair: Pair) -> None:
    inbox = Inbox()
    pair.b.subscribe("k/slow", inbox.deliver)
    pair.settle()
    taken: list[bytes] = []

    def consume() -> None:
        for _ in range(400):
            taken.extend(inbox.payloads(1))
            time.sleep(0.0005)

    consumer = threading.Thread(target=consume)
    consumer.start()
    sent = [bytes([number % 256]) * 2304 for number in range(400)]
    for payload in sent:
        pair.a.put("k/slow", payload)

    consumer.join(PATIENCE_S)
    assert taken == sent


@pytest.mark.filterwarnings("default")
def test_a_callback_that_raises_silences_neither_itself_nor_others(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()

    def deliver(sample: Sample) -> None:
        if sample.payload == b"bad":
            raise ValueError("a bug in a callback")
        inbox.deliver(sample)

    pair.b.subscribe("k/bug", deliver)
    pair.settle()

    pair.a.put("k/bug", b"bad")
    pair.a.put("k/bug", b"good")

    assert inbox.payloads(1) == [b"good"]
    assert "a bug in a callback" in caplog.text


def test_a_question_is_answered(pair: Pair) -> None:
    pair.b.answer("k/double/*", lambda sample: f"{sample.key}: ".encode() + sample.payload * 2)
    pair.settle()

    assert pair.a.query("k/double/1", b"x", timeout_s=PATIENCE_S) == b"k/double/1: xx"
    assert pair.a.query("k/double/2", b"", timeout_s=PATIENCE_S) == b"k/double/2: "


def test_questions_from_several_threads_get_their_own_answers(pair: Pair) -> None:
    pair.b.answer("k/echo", lambda sample: sample.payload)
    pair.settle()
    asked = [str(number).encode() for number in range(64)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda payload: pair.a.query("k/echo", payload, timeout_s=PATIENCE_S), asked))

    assert answers == asked


def test_an_error_of_ours_is_raised_again_at_the_asker(pair: Pair) -> None:
    def reply(sample: Sample) -> bytes:
        raise OverloadedError("all 4 slots are taken", hint="wait", retry_after_s=2.5)

    pair.b.answer("k/full", reply)
    pair.settle()

    with pytest.raises(OverloadedError) as caught:
        pair.a.query("k/full", b"", timeout_s=PATIENCE_S)

    assert (caught.value.message, caught.value.hint, caught.value.retry_after_s) == (
        "all 4 slots are taken",
        "wait",
        2.5,
    )


def test_any_other_exception_reaches_the_asker_with_its_name(pair: Pair) -> None:
    def reply(sample: Sample) -> bytes:
        raise KeyError("missing")

    pair.b.answer("k/bug", reply)
    pair.settle()

    with pytest.raises(ShoalError, match="KeyError: 'missing'"):
        pair.a.query("k/bug", b"", timeout_s=PATIENCE_S)


def test_an_answer_that_comes_too_late_is_an_unreachable_node(pair: Pair) -> None:
    asked = threading.Event()

    def reply(sample: Sample) -> bytes:
        asked.wait(PATIENCE_S)
        return b"late"

    pair.b.answer("k/late", reply)
    pair.settle()

    with pytest.raises(NodeUnreachableError, match="k/late"):
        pair.a.query("k/late", b"", timeout_s=0.05)
    asked.set()


def test_a_question_that_nobody_answers_is_an_unreachable_node(pair: Pair) -> None:
    with pytest.raises(NodeUnreachableError, match="k/nobody"):
        pair.a.query("k/nobody", b"", timeout_s=0.05)


def test_a_closed_subscription_gets_nothing_and_closes_twice(pair: Pair) -> None:
    closed, other = Inbox(), Inbox()
    subscription = pair.b.subscribe("k/x", closed.deliver)
    pair.b.subscribe("k/*", other.deliver)
    pair.settle()

    subscription.close()
    subscription.close()
    pair.a.put("k/x", b"x")

    assert other.payloads(1) == [b"x"]
    assert closed.nothing_more()


def test_a_subscription_can_close_itself_while_it_delivers(pair: Pair) -> None:
    inbox, other = Inbox(), Inbox()

    def deliver(sample: Sample) -> None:
        inbox.deliver(sample)
        subscription.close()

    subscription = pair.b.subscribe("k/once", deliver)
    pair.b.subscribe("k/*", other.deliver)
    pair.settle()

    pair.a.put("k/once", b"1")
    assert inbox.payloads(1) == [b"1"]
    pair.a.put("k/once", b"2")

    assert other.payloads(2) == [b"1", b"2"]
    assert inbox.nothing_more()


def test_a_closed_answer_answers_no_more(pair: Pair) -> None:
    answer = pair.b.answer("k/x", lambda sample: b"yes")
    pair.settle()
    assert pair.a.query("k/x", b"", timeout_s=PATIENCE_S) == b"yes"

    answer.close()
    answer.close()

    with pytest.raises(NodeUnreachableError):
        pair.a.query("k/x", b"", timeout_s=0.05)


def test_whoever_watches_is_told_of_each_that_is_gone_and_of_no_other(pair: Pair) -> None:
    gone: SimpleQueue[str] = SimpleQueue()
    before = pair.b.alive("k/before/1")
    pair.b.alive("k/stays/1")
    pair.b.alive("other/1")
    pair.settle()
    pair.a.watch("k/*/1", gone.put)
    after = pair.b.alive("k/after/1")
    pair.settle()

    for token in (before, after, before):
        token.close()

    assert [gone.get(timeout=PATIENCE_S) for _ in range(2)] == ["k/before/1", "k/after/1"]
    pair.b.close()
    assert gone.get(timeout=PATIENCE_S) == "k/stays/1"
    assert gone.empty()


def test_a_watch_that_was_closed_is_told_nothing(pair: Pair) -> None:
    closed: SimpleQueue[str] = SimpleQueue()
    other: SimpleQueue[str] = SimpleQueue()
    watch = pair.a.watch("k/*", closed.put)
    pair.a.watch("k/**", other.put)
    token = pair.b.alive("k/1")
    pair.settle()

    watch.close()
    watch.close()
    token.close()

    assert other.get(timeout=PATIENCE_S) == "k/1"
    assert closed.empty()


def test_a_closed_bus_delivers_nothing_says_so_and_closes_twice(pair: Pair) -> None:
    inbox = Inbox()
    pair.b.subscribe("k/x", inbox.deliver)
    pair.settle()

    pair.b.close()
    pair.b.close()
    pair.a.put("k/x", b"x")

    for act in (
        lambda: pair.b.put("k/x", b""),
        lambda: pair.b.subscribe("k/x", inbox.deliver),
        lambda: pair.b.answer("k/x", lambda sample: b""),
        lambda: pair.b.query("k/x", b"", timeout_s=0.05),
        lambda: pair.b.alive("k/x"),
        lambda: pair.b.watch("k/x", lambda key: None),
    ):
        with pytest.raises(NodeUnreachableError, match="closed"):
            act()
    assert inbox.nothing_more()


def test_wildcards_in_a_key_and_bad_patterns_are_refused(pair: Pair) -> None:
    for key in ("k/*", "k/**", "", "k//x", "/k", "k/", "k#", "k?"):
        with pytest.raises(InvalidRequestError):
            pair.a.put(key, b"")
        with pytest.raises(InvalidRequestError):
            pair.a.query(key, b"", timeout_s=0.05)
    for pattern in ("k//x", "k/x*", "k/$*", "**/**", "k/**/*", ""):
        with pytest.raises(InvalidRequestError):
            pair.a.subscribe(pattern, lambda _: None)
        with pytest.raises(InvalidRequestError):
            pair.a.answer(pattern, lambda sample: b"")
