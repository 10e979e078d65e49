"""From the fabric's threads into the event loop: the one bridge between the two (ADR 13)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items posted from any thread, received on the loop that made the box, in order.

    Unbounded: a poster is a thread of the bus and must not wait; what comes in is bounded by heartbeats and requests.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._send, self._receive = anyio.create_memory_object_stream[T](float("inf"))

    def post(self, item: T) -> None:
        """Hand over *item* and return at once; ignored once the loop or the box is closed."""
        try:
            self._loop.call_soon_threadsafe(self._put, item)
        except RuntimeError:  # the loop is closed: nobody is left to receive
            return

    def _put(self, item: T) -> None:
        try:
            self._send.send_nowait(item)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return

    async def receive(self) -> T:
        """The next item; raises anyio.EndOfStream after `close`."""
        return await self._receive.receive()

    async def __aiter__(self) -> AsyncIterator[T]:
        async for item in self._receive:
            yield item

    def close(self) -> None:
        """End the stream; harmless when repeated."""
        self._send.close()

    def discard(self) -> None:
        """Close both ends: whatever is still inside is dropped."""
        self._send.close()
        self._receive.close()
