"""Questions between nodes that take a while."""

import itertools
from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
import msgspec
import pytest

from shoal.errors import (
    DeadlineExceededError,
    InfeasibleError,
    NodeUnreachableError,
    OverloadedError,
    ShoalError,
    UnsupportedVersionError,
)
from shoal.ids import NodeId
from shoal.node.calls import CallDesk, Caller, Handler
from shoal.node.mailbox import Mailbox
from shoal.transport.bus import Bus
from shoal.transport.memory import MemoryBus

B = NodeId("b" * 32)
Attach = Callable[[str], MemoryBus]


class Number(msgspec.Struct, frozen=True):
    value: int


async def double(body: bytes) -> bytes:
    return msgspec.msgpack.encode(Number(2 * msgspec.msgpack.decode(body, type=Number).value))


def ask(
    bus_of: Attach, handlers: dict[str, Handler], use: Callable[[Caller], Awaitable[None]], *, over: type | None = None
) -> None:
    """Run *use* with a caller on one bus while a desk answers on another."""

    async def both() -> None:
        asking: Bus = bus_of("a")
        numbers = itertools.count()
        caller = Caller(over(asking) if over else asking, "f", lambda: str(next(numbers)))
        desk = CallDesk(bus_of("b"), "f", B, handlers)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(desk.run)
                await use(caller)
                group.cancel_scope.cancel()

    anyio.run(both)


def test_an_answer_arrives_however_long_it_takes_and_the_work_is_done_once(bus_of: Attach) -> None:
    done: list[bytes] = []

    async def slow(body: bytes) -> bytes:
        done.append(body)
        await anyio.sleep(0.5)  # several rounds of asking
        return await double(body)

    async def use(caller: Caller) -> None:
        assert await caller.call(B, "slow", Number(21), Number, timeout_s=10) == Number(42)

    ask(bus_of, {"slow": slow}, use)
    assert len(done) == 1


def test_calls_do_not_wait_for_each_other(bus_of: Attach) -> None:
    second_came = anyio.Event

    async def use(caller: Caller) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(first, caller)
            assert await caller.call(B, "open", Number(1), Number, timeout_s=10) == Number(2)

    gate: list[anyio.Event] = []

    async def wait(body: bytes) -> bytes:
        gate.append(second_came())
        await gate[0].wait()
        return await double(body)

    async def open_gate(body: bytes) -> bytes:
        while not gate:  # noqa: ASYNC110 - the other handler comes at some time
            await anyio.sleep(0.01)
        gate[0].set()
        return await double(body)

    async def first(caller: Caller) -> None:
        assert await caller.call(B, "wait", Number(3), Number, timeout_s=10) == Number(6)

    ask(bus_of, {"wait": wait, "open": open_gate}, use)


@pytest.mark.parametrize(
    "error",
    [
        InfeasibleError("too big", hint="add memory", param="model"),
        OverloadedError("full", hint="wait", retry_after_s=7.0),
        ShoalError("odd"),
    ],
)
def test_an_error_of_the_other_side_is_raised_here_as_itself(bus_of: Attach, error: ShoalError) -> None:
    async def fail(_: bytes) -> bytes:
        raise error

    async def use(caller: Caller) -> None:
        with pytest.raises(type(error)) as caught:
            await caller.call(B, "fail", Number(1), Number, timeout_s=10)
        assert type(caught.value) is type(error)
        assert vars(caught.value) == vars(error)

    ask(bus_of, {"fail": fail}, use)


def test_a_question_of_another_version_is_refused_and_the_desk_goes_on(bus_of: Attach) -> None:
    async def use(caller: Caller) -> None:
        with pytest.raises(UnsupportedVersionError, match="'sing'"):
            await caller.call(B, "sing", Number(1), Number, timeout_s=10)
        assert await caller.call(B, "double", Number(1), Number, timeout_s=10) == Number(2)

    ask(bus_of, {"double": double}, use)


def test_a_question_that_does_not_parse_is_an_error_there_and_here(bus_of: Attach) -> None:
    class Text(msgspec.Struct):
        text: str

    async def use(caller: Caller) -> None:
        with pytest.raises(ShoalError, match="double"):
            await caller.call(B, "double", Text("two"), Number, timeout_s=10)
        assert await caller.call(B, "double", Number(1), Number, timeout_s=10) == Number(2)

    ask(bus_of, {"double": double}, use)


def test_an_answer_that_was_lost_costs_one_more_round(bus_of: Attach) -> None:
    class Losing:
        """Loses every second answer, the first one not."""

        def __init__(self, bus: Bus) -> None:
            self._bus = bus
            self._asked = 0

        def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
            answer = self._bus.query(key, payload, timeout_s=timeout_s)
            self._asked += 1
            if self._asked % 2 == 0:
                raise NodeUnreachableError("the answer was lost")
            return answer

    async def slow(body: bytes) -> bytes:
        await anyio.sleep(0.5)
        return await double(body)

    async def use(caller: Caller) -> None:
        assert await caller.call(B, "slow", Number(1), Number, timeout_s=10) == Number(2)

    ask(bus_of, {"slow": slow}, use, over=Losing)


def test_a_node_that_is_not_there_is_told_at_once(bus_of: Attach) -> None:
    async def use(caller: Caller) -> None:
        with pytest.raises(NodeUnreachableError):
            await caller.call(NodeId("c" * 32), "double", Number(1), Number, timeout_s=60)

    ask(bus_of, {"double": double}, use)


def test_patience_ends_with_the_time_that_was_set(bus_of: Attach) -> None:
    async def never(_: bytes) -> bytes:
        await anyio.sleep_forever()
        return b""

    async def use(caller: Caller) -> None:
        with pytest.raises(DeadlineExceededError, match="'never'"):
            await caller.call(B, "never", Number(1), Number, timeout_s=0.3)

    ask(bus_of, {"never": never}, use)


def test_a_mailbox_keeps_the_order_of_what_other_threads_post() -> None:
    async def scenario() -> None:
        box: Mailbox[int] = Mailbox()
        await anyio.to_thread.run_sync(lambda: [box.post(n) for n in range(100)])

        assert [await box.receive() for _ in range(100)] == list(range(100))
        box.discard()
        box.post(1)  # nobody is left to receive
        await anyio.lowlevel.checkpoint()

    anyio.run(scenario)


def test_posting_to_a_mailbox_whose_loop_has_ended_is_ignored() -> None:
    boxes: list[Mailbox[int]] = []

    async def scenario() -> None:
        boxes.append(Mailbox())
        boxes[0].discard()

    anyio.run(scenario)

    boxes[0].post(1)
