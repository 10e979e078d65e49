"""One thread that runs jobs at their time.

Both the in-memory bus and the shaped one need the same thing: an owner of order.  Jobs run on one thread, earliest due first,
equal times in the order they were submitted; a job that raises is logged and does not stop the others.
"""

import heapq
import itertools
import logging
import threading
from collections.abc import Callable

from shoal.clock import Clock

Job = Callable[[], None]


class TimedThread:
    """A daemon thread with a due-time queue; waits on a condition, never polls."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._clock = clock
        self._jobs: list[tuple[float, int, Job]] = []
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, due_s: float, job: Job) -> None:
        """Run *job* at *due_s* of the clock (at once when that is past); dropped once closed."""
        with self._changed:
            if self._open:
                heapq.heappush(self._jobs, (due_s, next(self._arrivals), job))
                self._changed.notify()

    def close(self) -> None:
        """Drop what is waiting and end the thread; a job that runs now may finish.  Harmless when repeated."""
        with self._changed:
            self._open = False
            self._jobs.clear()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:  # a bug in one callback must not silence every other subscription
                logging.getLogger(__name__).exception(
                    "a callback on thread %s failed; later ones go on", self._thread.name
                )

    def _next(self) -> Job | None:
        with self._changed:
            while self._open:
                wait_s = self._jobs[0][0] - self._clock.now_s() if self._jobs else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._jobs)[2]
                self._changed.wait(wait_s)
            return None
