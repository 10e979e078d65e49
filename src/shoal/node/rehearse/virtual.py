"""Virtual time for real threads: one runs at a time, and when all wait, the clock jumps to what is due next.

The loops of a node are plain threads and one event loop.  Writing them a second time for tests would test the second ones.  So
each waits through a `Threads`, and this one hands a baton round: whoever waits passes it to the first, in the order in which they
began to wait, that need not wait any longer.  Nothing runs beside it, so the same scenario happens the same way each time, whatever
the machine does meanwhile.  Where nobody can go on, time moves to the earliest deadline.

Two kinds of threads are not ours and run beside the baton: those that the event loop starts for what blocks (a journal's write, a
plan).  Time stands still while one of them works (`helpers` counts them); one that waits through us counts as waiting.

Threads belong to groups, as they do to processes: a group can be frozen (SIGSTOP) and killed (SIGKILL).  What waits in a killed
group raises `Killed`, and so does every later wait there: nothing is said any more, its buses being closed.
"""

import itertools
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from shoal.errors import ShoalError
from shoal.threads import Running

T = TypeVar("T")

_REAL_S = 0.0001
"""Between two looks at helpers that work: they are none of ours to wait for."""
_HELPER_S = 1.0
"""Of the machine's time: so long a helper keeps the baton from others; it may wait for one of them without our knowing."""
_STUCK_S = 20.0


class Killed(BaseException):
    """Raised in threads of a group that was killed; nobody catches it but the thread's end."""


@dataclass(slots=True)
class _Waiter:
    ready: Callable[[], bool]
    until_s: float | None
    group: str
    native: bool
    loop: bool
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class VirtualTime:
    """Owns the clock and the baton.  Made by the thread that is to have the baton first."""

    def __init__(self) -> None:
        self.helpers: Callable[[], int] = lambda: 0
        """How many threads of the event loop are at work or waiting through us; asked by whoever has the baton."""
        self._now_s = 0.0
        self._waiting: list[_Waiter] = []
        self._natives = {threading.get_ident()}
        self._frozen: set[str] = set()
        self._dead: set[str] = set()
        self._numbers = itertools.count()

    def now_s(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now_s

    def group(self, name: str) -> "VirtualThreads":
        """Threads of a group."""
        return VirtualThreads(self, name)

    def freeze(self, name: str) -> None:
        """Let no thread of a group run until it is thawed."""
        self._frozen.add(name)

    def thaw(self, name: str) -> None:
        """End that; harmless when it was not frozen."""
        self._frozen.discard(name)

    def kill(self, name: str) -> None:
        """End every thread of a group at its next, or present, wait.  Close its buses at once: else they would still speak."""
        self._dead.add(name)
        self._frozen.discard(name)

    def wait(self, ready: Callable[[], bool], timeout_s: float | None, group: str, *, loop: bool = False) -> bool:
        """Whether *ready* came true within *timeout_s*; the others run meanwhile.  Raises Killed in a killed group."""
        self._check(group)
        if ready():
            return True
        if timeout_s is not None and timeout_s <= 0:
            return False
        until_s = None if timeout_s is None else self._now_s + timeout_s
        waiter = _Waiter(ready, until_s, group, threading.get_ident() in self._natives, loop)
        self._waiting.append(waiter)
        if waiter.native:
            self._pass_on()
        waiter.go.acquire()
        self._check(group)
        return ready()

    def start(self, name: str, run: Callable[[], None], group: str) -> Running:
        """Begin *run* on a thread that gets the baton in its turn."""
        self._check(group)
        waiter = _Waiter(lambda: True, None, group, native=True, loop=False)
        ended = threading.Event()

        def body() -> None:
            waiter.go.acquire()
            ident = threading.get_ident()
            self._natives.add(ident)
            try:
                self._check(group)
                run()
            except Killed:
                pass
            finally:
                ended.set()
                self._natives.discard(ident)
                self._pass_on()

        threading.Thread(target=body, name=f"{group} {name} {next(self._numbers)}", daemon=True).start()
        self._waiting.append(waiter)
        return _Started(self, ended)

    def _check(self, group: str) -> None:
        if group in self._dead:
            raise Killed(group)

    def _pass_on(self) -> None:
        """Give the baton to whoever may go on; moves the clock where nobody can."""
        began_s = time.monotonic()
        while True:
            waiting = list(self._waiting)
            helping = self.helpers() > sum(not w.native for w in waiting)
            # Nobody runs beside a helper but the event loop, which must hear that it is done; while the loop itself waits for a
            # thread it hears nothing.
            patient = helping and any(w.loop for w in waiting) and time.monotonic() - began_s < _HELPER_S
            able = next((w for w in waiting if (w.loop or not patient) and self._may_go(w)), None)
            if able is not None:
                self._waiting.remove(able)
                able.go.release()
                if able.native:
                    return
            elif helping:
                time.sleep(_REAL_S)
            else:
                due_s = [w.until_s for w in self._waiting if w.until_s is not None and w.group not in self._frozen]
                if due_s:
                    self._now_s = max(self._now_s, min(due_s))
                elif time.monotonic() - began_s > _STUCK_S:
                    raise ShoalError(f"all {len(self._waiting)} threads of a rehearsal wait for each other")
                else:
                    time.sleep(_REAL_S)

    def _may_go(self, waiter: _Waiter) -> bool:
        if waiter.group in self._dead:
            return True
        if waiter.group in self._frozen:
            return False
        return waiter.ready() or (waiter.until_s is not None and waiter.until_s <= self._now_s)


@dataclass(frozen=True, slots=True)
class VirtualThreads:
    """A `Threads` in virtual time: those of one group, as of one process."""

    time: VirtualTime
    group: str = ""

    def now_s(self) -> float:
        """See `Threads.now_s`."""
        return self.time.now_s()

    def start(self, name: str, run: Callable[[], None]) -> Running:
        """See `Threads.start`."""
        return self.time.start(name, run, self.group)

    def sleep(self, for_s: float) -> None:
        """See `Threads.sleep`."""
        self.time.wait(lambda: False, for_s, self.group)

    def take(self, queue: "SimpleQueue[T]", timeout_s: float | None = None) -> T:
        """See `Threads.take`."""
        if not self.time.wait(lambda: not queue.empty(), timeout_s, self.group):
            raise Empty
        return queue.get_nowait()

    def wait(self, event: threading.Event, timeout_s: float | None = None) -> bool:
        """See `Threads.wait`."""
        return self.time.wait(event.is_set, timeout_s, self.group)


@dataclass(frozen=True, slots=True)
class _Started:
    time: VirtualTime
    ended: threading.Event

    def join(self, timeout_s: float | None = None) -> None:
        """See `Running.join`: whoever waits for a thread of a killed group sees it end."""
        self.time.wait(self.ended.is_set, timeout_s, "")


class VirtualSelector:
    """What an event loop waits with: `selectors.BaseSelector`, with time out of our hands."""

    def __init__(self, virtual: VirtualTime) -> None:
        self._virtual = virtual
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As `BaseSelector.select`, *timeout* in virtual seconds."""
        found = self._real.select(0)

        def ready() -> bool:
            found[:] = self._real.select(0)
            return bool(found)

        if not found and (timeout is None or timeout > 0):
            self._virtual.wait(ready, timeout, "", loop=True)
        return found

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401 as in selectors
        """As `BaseSelector.register`."""
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:  # noqa: ANN401 as in selectors
        """As `BaseSelector.unregister`."""
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401 as in selectors
        """As `BaseSelector.modify`."""
        return self._real.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:  # noqa: ANN401 as in selectors
        """As `BaseSelector.get_key`."""
        return self._real.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey] | None:
        """As `BaseSelector.get_map`."""
        return self._real.get_map()

    def close(self) -> None:
        """As `BaseSelector.close`."""
        self._real.close()
