"""The only door to waiting on threads: what a shell waits for, and for how long, is asked of a `Threads`.

A loop that waits through this door runs on the machine's clock in a node, and in virtual time in a rehearsal
(`shoal.node.rehearsal`), where hours of a fleet pass in seconds and always in the same order.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeVar

T = TypeVar("T")


class Running(Protocol):
    """A thread that was started."""

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until it has ended, for *timeout_s* at most."""
        ...


class Threads(Protocol):
    """Time, threads, and all that these wait for.  Is a `Clock`."""

    def now_s(self) -> float:
        """Seconds since this clock's zero; never falls."""
        ...

    def start(self, name: str, run: Callable[[], None]) -> Running:
        """Begin *run* on a thread of its own, which does not keep the process alive."""
        ...

    def sleep(self, for_s: float) -> None:
        """Let *for_s* seconds pass."""
        ...

    def take(self, queue: "SimpleQueue[T]", timeout_s: float | None = None) -> T:
        """The next of *queue*; raises `queue.Empty` when none comes within *timeout_s* (None: as long as it takes)."""
        ...

    def wait(self, event: threading.Event, timeout_s: float | None = None) -> bool:
        """Whether *event* is set within *timeout_s*."""
        ...


class SystemThreads:
    """Threads of the operating system, on the machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def start(self, name: str, run: Callable[[], None]) -> Running:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return _Started(thread)

    def sleep(self, for_s: float) -> None:
        time.sleep(for_s)

    def take(self, queue: "SimpleQueue[T]", timeout_s: float | None = None) -> T:
        return queue.get(timeout=timeout_s)

    def wait(self, event: threading.Event, timeout_s: float | None = None) -> bool:
        return event.wait(timeout_s)


class _Started:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def join(self, timeout_s: float | None = None) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
