"""Ending an async iterator at once, also when the task that reads it is being cancelled."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio

T = TypeVar("T")
CLEANUP_S = 6.0
"""More than an executor gives its own last message."""


@asynccontextmanager
async def closed_after(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Give *iterator*, and close it at the end: a generator frees what it holds (a slot) in `aclose`.

    Left to the garbage collector it would do so at some later time.  An iterator that is no generator has nothing to close.
    """
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            with anyio.move_on_after(CLEANUP_S, shield=True):
                await close()
