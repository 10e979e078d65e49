"""The way back to the gateways, on a thread of its own.

A put wakes the fabric's threads, and on a small machine these take the core from whoever put.  A token is said just when the
engine should begin the next step: done by the loop itself, that costs a step 0.1 ms on an idle machine and 0.3 on a busy one.
From here it is said while the engine runs, which needs no interpreter.  Saying it after the step was rejected: a slow engine
would hold back each token for as long as it takes.
"""

from dataclasses import dataclass, field
from queue import SimpleQueue

from structlog.typing import FilteringBoundLogger

from shoal.errors import ShoalError
from shoal.runtime import frames
from shoal.runtime.request import OutputDelta
from shoal.threads import Running, Threads
from shoal.transport.bus import Bus, Lane
from shoal.transport.frame import pack


@dataclass(slots=True)
class Replies:
    """Deltas in the order in which they were said, whichever thread says them."""

    control: Bus
    log: FilteringBoundLogger
    threads: Threads
    lost: int = 0
    """Answers that could not be said."""
    _said: SimpleQueue[tuple[str, OutputDelta] | None] = field(default_factory=SimpleQueue)
    _thread: Running = field(init=False)

    def start(self, name: str) -> None:
        """Send from now on, until closed."""
        self._thread = self.threads.start(name, self._run)

    def say(self, reply_to: str, delta: OutputDelta) -> None:
        """Send a piece of an answer soon; returns at once."""
        self._said.put((reply_to, delta))

    def put(self, reply_to: str, payload: bytes) -> None:
        """Send at once; a gateway that cannot be told anything must not end the answers of others."""
        try:
            self.control.put(reply_to, payload, lane=Lane.DECODE)
        except ShoalError as error:
            self.lost += 1
            if self.lost == 1:
                self.log.warning("reply.lost", reply_to=reply_to, error=error.message)

    def close(self) -> None:
        """Send what was said, then end."""
        self._said.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (said := self.threads.take(self._said)) is not None:
            reply_to, delta = said
            self.put(reply_to, pack(frames.encode(frames.Delta(delta=delta)), {}))
