"""Virtual time: it passes only where nobody can go on, and everything happens in the same order each time."""

import io
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import anyio
import anyio.to_thread
import pytest

from shoal.errors import ShoalError
from shoal.node.rehearse.loop import rehearse
from shoal.node.rehearse.virtual import VirtualTime
from shoal.transport.memory import MemoryFabric, Weather


def test_hours_pass_while_nobody_works_and_timers_of_threads_and_tasks_are_of_one_clock() -> None:
    seen: list[tuple[str, float]] = []

    async def scenario(virtual: VirtualTime) -> None:
        threads = virtual.group("worker")

        def work() -> None:
            for _ in range(3):
                threads.sleep(1800.0)
                seen.append(("thread", virtual.now_s()))

        running = threads.start("work", work)
        await anyio.sleep(2700.0)
        seen.append(("task", virtual.now_s()))
        await anyio.to_thread.run_sync(running.join)

    assert rehearse(scenario, at_most_s=7200.0) == 5400.0
    assert seen == [("thread", 1800.0), ("task", 2700.0), ("thread", 3600.0), ("thread", 5400.0)]


def test_time_stands_still_while_a_helper_thread_works_and_passes_while_it_waits() -> None:
    async def scenario(virtual: VirtualTime) -> None:
        with anyio.move_on_after(1.0) as scope:
            await anyio.to_thread.run_sync(lambda: time.sleep(0.05))
        assert not scope.cancelled_caught
        assert virtual.now_s() == 0.0

        await anyio.to_thread.run_sync(lambda: virtual.group("x").sleep(5.0))
        assert virtual.now_s() == 5.0

    rehearse(scenario)


def test_a_frozen_group_stands_still_and_goes_on_where_it_was() -> None:
    async def scenario(virtual: VirtualTime) -> None:
        threads, seen = virtual.group("frozen"), list[float]()

        def work() -> None:
            while True:
                threads.sleep(1.0)
                seen.append(virtual.now_s())

        threads.start("work", work)
        await anyio.sleep(2.5)
        virtual.freeze("frozen")
        await anyio.sleep(10.0)
        virtual.thaw("frozen")
        await anyio.sleep(1.5)
        virtual.kill("frozen")
        await anyio.sleep(5.0)

        assert seen == [1.0, 2.0, 12.5, 13.5]

    rehearse(scenario)


def test_a_killed_group_says_no_more_and_its_bus_can_be_closed() -> None:
    async def scenario(virtual: VirtualTime) -> None:
        fabric = MemoryFabric(threads=virtual.group("fabric"))
        threads, heard = virtual.group("killed"), SimpleQueue[bytes]()
        mine = fabric.attach("mine", threads=threads)
        fabric.attach("other").subscribe("k", lambda sample: heard.put(sample.payload))
        fabric.weather("mine", "other", Weather(delay_s=0.5))

        def work() -> None:
            while True:
                mine.put("k", b"")
                threads.sleep(1.0)

        threads.start("work", work)
        await anyio.sleep(2.7)
        virtual.kill("killed")
        mine.close()
        await anyio.sleep(5.0)

        assert heard.qsize() == 3, "the last one was on its way"
        with pytest.raises(ShoalError):
            mine.put("k", b"")

    rehearse(scenario)


def test_threads_that_wait_for_each_other_for_good_are_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.node.rehearse.virtual._STUCK_S", 0.05)
    virtual = VirtualTime()

    with pytest.raises(ShoalError, match="wait for each other"):
        virtual.group("x").wait(threading.Event())


def test_the_same_scenario_happens_the_same_way_each_time(tmp_path: Path) -> None:
    def told() -> str:
        lines = io.StringIO()

        async def scenario(virtual: VirtualTime) -> None:
            fabric = MemoryFabric(seed=3, threads=virtual.group("fabric"))
            buses = [fabric.attach(name, threads=virtual.group(name)) for name in "abc"]
            for bus in buses:
                bus.subscribe(
                    "k", lambda sample, me=bus: lines.write(f"{virtual.now_s()} {me.name} {sample.payload!r}\n")
                )
                fabric.weather("a", bus.name, Weather(delay_s=0.3, loss=0.2))
            for number, bus in enumerate(buses):

                def work(bus: object = bus, number: int = number) -> None:
                    for step in range(20):
                        buses[number].put("k", f"{number} {step}".encode())
                        virtual.group(buses[number].name).sleep(0.1 * (number + 1))

                virtual.group(bus.name).start("work", work)
            await anyio.sleep(20.0)

        rehearse(scenario)
        return lines.getvalue()

    assert told() == told() != ""
