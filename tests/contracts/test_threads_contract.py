"""What every `Threads` keeps: those of the system, and those of a rehearsal."""

import threading
from queue import Empty, SimpleQueue

import pytest

from shoal.node.rehearse.virtual import VirtualTime
from shoal.threads import SystemThreads, Threads

SHORT_S = 0.02


@pytest.fixture(params=["system", "virtual"])
def threads(request: pytest.FixtureRequest) -> Threads:
    return SystemThreads() if request.param == "system" else VirtualTime().group("here")


def test_what_is_put_by_one_thread_is_taken_by_another_in_order(threads: Threads) -> None:
    queue: SimpleQueue[int] = SimpleQueue()

    def put() -> None:
        for number in range(10):
            threads.sleep(SHORT_S / 10)
            queue.put(number)

    threads.start("put", put)

    assert [threads.take(queue) for _ in range(10)] == list(range(10))


def test_nothing_comes_in_vain_for_so_long_and_no_longer(threads: Threads) -> None:
    began_s = threads.now_s()

    with pytest.raises(Empty):
        threads.take(SimpleQueue[int](), SHORT_S)
    assert not threads.wait(threading.Event(), SHORT_S)
    threads.sleep(SHORT_S)

    assert threads.now_s() - began_s >= 3 * SHORT_S


def test_what_is_there_is_taken_without_waiting(threads: Threads) -> None:
    queue, event = SimpleQueue[int](), threading.Event()
    queue.put(1)
    event.set()

    assert threads.take(queue, 0.0) == 1
    assert threads.wait(event, 0.0)
    with pytest.raises(Empty):
        threads.take(queue, 0.0)


def test_a_thread_is_joined_when_it_has_ended(threads: Threads) -> None:
    done: list[int] = []

    def work() -> None:
        threads.sleep(SHORT_S)
        done.append(1)

    running = threads.start("work", work)
    running.join(SHORT_S / 100)
    assert not done
    running.join()

    assert done
    running.join()


def test_who_waits_for_an_event_goes_on_when_another_thread_sets_it(threads: Threads) -> None:
    event = threading.Event()

    def work() -> None:
        threads.sleep(SHORT_S)
        event.set()

    threads.start("work", work)

    assert threads.wait(event)
