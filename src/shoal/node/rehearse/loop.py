"""Run a coroutine, and all that it starts, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import anyio.to_thread

from shoal.node.rehearse.virtual import VirtualSelector, VirtualTime


def rehearse(scenario: Callable[[VirtualTime], Awaitable[None]], *, at_most_s: float = 3600.0) -> float:
    """Run *scenario* on an event loop in virtual time; the virtual seconds it took.

    Raises TimeoutError after *at_most_s* of them, and whatever *scenario* raises.
    """
    virtual = VirtualTime()
    anyio.run(
        partial(_run, scenario, virtual, at_most_s),
        backend="asyncio",
        backend_options={"loop_factory": partial(_loop, virtual)},
    )
    return virtual.now_s()


async def _run(scenario: Callable[[VirtualTime], Awaitable[None]], virtual: VirtualTime, at_most_s: float) -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    virtual.helpers = lambda: int(limiter.borrowed_tokens)
    with anyio.fail_after(at_most_s):
        await scenario(virtual)


def _loop(virtual: VirtualTime) -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop(VirtualSelector(virtual))  # type: ignore[arg-type]  # it is one in all but name
    loop.time = virtual.now_s  # type: ignore[method-assign]  # every timer of the loop asks this
    return loop
