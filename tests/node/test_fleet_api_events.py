"""Following what happens in a fleet whose coordinator changes."""

import io
import itertools
from collections.abc import Callable

import anyio
import pytest

from shoal.fleet.view import CoordinatorView, Lease
from shoal.fleet.views import JoinView
from shoal.ids import Digest, NodeId
from shoal.node import fleet_api
from shoal.node.calls import CallDesk, Caller
from shoal.node.desk import handler
from shoal.node.events import EventRing
from shoal.node.fleet_api import FleetApi
from shoal.node.messages import AskEvents, Events
from shoal.observe.log import set_up_logs
from shoal.store.home import Store
from shoal.transport.memory import MemoryBus

A, B, ME = (NodeId(letter * 32) for letter in "abm")


def desk_of(bus: MemoryBus, node: NodeId, fencing_epoch: int, *texts: str) -> CallDesk:
    """A coordinator that noted *texts*."""
    ring = EventRing(set_up_logs(io.StringIO()), lambda: 0.0)
    ring.begin(fencing_epoch)
    for text in texts:
        ring.note("note", text)

    async def answer(asked: AskEvents) -> Events:
        return Events(events=tuple(await ring.events(asked.after, asked.limit)))

    return CallDesk(bus, "f", node, {"events": handler(AskEvents, answer)})


def test_a_stream_of_events_outlives_its_coordinator(
    bus_of: Callable[[str], MemoryBus], tiny_store: tuple[Store, Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_api, "_EVENT_POLL_S", 0.01)
    numbers = itertools.count()
    view: CoordinatorView | None = None
    asked: list[object] = []

    def look() -> CoordinatorView | None:
        asked.append(view)
        return view

    api = FleetApi(
        me=ME, caller=Caller(bus_of("asking"), "f", lambda: str(next(numbers))), store=tiny_store[0], view=look,
        join=JoinView(address="", command=""), last_token_age_s=lambda _: None, answers=lambda _: True,
    )  # fmt: skip
    seen: list[str] = []

    async def read() -> None:
        async for event in api.follow(0):
            seen.append(event.text)  # noqa: PERF401 - each as it comes

    async def until(true: Callable[[], object]) -> None:
        with anyio.fail_after(20):
            while not true():  # noqa: ASYNC110 - looked at from outside
                await anyio.sleep(0.005)

    async def scenario() -> None:
        nonlocal view
        first, second = desk_of(bus_of("a"), A, 1, "one", "two"), desk_of(bus_of("b"), B, 2, "three")
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await until(lambda: len(asked) > 2)
            assert seen == [], "nobody is heard yet, and the stream waits"

            view = CoordinatorView(lease=Lease(holder=A, fencing_epoch=1), sequence=1)
            async with anyio.create_task_group() as life:
                life.start_soon(first.run)
                await until(lambda: seen == ["one", "two"])
                life.cancel_scope.cancel()
            count = len(asked)
            await until(lambda: len(asked) > count + 2)

            group.start_soon(second.run)
            view = CoordinatorView(lease=Lease(holder=B, fencing_epoch=2), sequence=1)
            await until(lambda: seen == ["one", "two", "three"])
            group.cancel_scope.cancel()

    anyio.run(scenario)
