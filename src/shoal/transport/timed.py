"""One thread that runs jobs at their time.

Both the in-memory bus and the shaped one need the same thing: an owner of order.  Jobs run on one thread, earliest due first,
equal times in the order they were submitted; a job that raises is logged and does not stop the others.
"""

import heapq
import itertools
import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue

from shoal.threads import Threads

Job = Callable[[], None]


class TimedThread:
    """A thread with a due-time queue; waits, never polls."""

    def __init__(self, name: str, threads: Threads) -> None:
        self._name = name
        self._threads = threads
        self._arriving: SimpleQueue[tuple[float, Job] | None] = SimpleQueue()
        self._open = True
        self._thread = threads.start(name, self._run)

    def submit(self, due_s: float, job: Job) -> None:
        """Run *job* at *due_s* of the clock (at once when that is past); dropped once closed."""
        if self._open:
            self._arriving.put((due_s, job))

    def close(self) -> None:
        """Drop what is waiting and end the thread; a job that runs now may finish.  Harmless when repeated."""
        self._open = False
        self._arriving.put(None)
        self._thread.join()

    def _run(self) -> None:
        jobs: list[tuple[float, int, Job]] = []
        arrivals = itertools.count()
        while True:
            wait_s = max(0.0, jobs[0][0] - self._threads.now_s()) if jobs else None
            try:
                # All that has arrived comes first: it may be due before what waits.
                arrived = self._threads.take(self._arriving, wait_s if self._arriving.empty() else None)
            except Empty:
                arrived = None
            if not self._open:
                return
            if arrived is None:
                self._work(heapq.heappop(jobs)[2])
                continue
            heapq.heappush(jobs, (arrived[0], next(arrivals), arrived[1]))

    def _work(self, job: Job) -> None:
        try:
            job()
        except Exception:  # a bug in one callback must not silence every other subscription
            logging.getLogger(__name__).exception("a callback on thread %s failed; later ones go on", self._name)
