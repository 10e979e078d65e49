"""Iterators that hold something are closed before their reader goes on, also when it is cancelled."""

from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest

from shoal.serve.closing import closed_after

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def held(log: list[str]) -> AsyncIterator[int]:
    try:
        while True:
            await anyio.lowlevel.checkpoint()
            yield 1
    finally:
        await anyio.lowlevel.checkpoint()  # an executor tells its stages here
        log.append("freed")


async def test_leaving_the_loop_frees() -> None:
    log: list[str] = []
    iterator = held(log)

    async with closed_after(iterator) as numbers:
        async for _ in numbers:
            break

    assert log == ["freed"]


async def test_a_cancelled_reader_frees_although_every_await_of_its_own_is_refused() -> None:
    log: list[str] = []
    iterator = held(log)

    with anyio.CancelScope() as scope:
        async with closed_after(iterator) as numbers:
            async for _ in numbers:
                break
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    assert log == ["freed"]


async def test_an_iterator_that_holds_nothing_needs_no_closing() -> None:
    class Once:
        def __aiter__(self) -> "Once":
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

    async with closed_after(Once()) as numbers:
        assert [n async for n in numbers] == []
