"""An engine made N times slower: an unequal device for demos and benchmarks on one machine.

Each step is stretched to N times its CPU time; what a step overshoots is taken off the next, so that the mean is exact although
sleeping is not (measured: within 0.5 % at N = 4; sleeping by wall time multiplies whatever else the machine does).  Only the engine
is slowed, not the worker's serialisation.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.clock import Clock, SystemClock
from shoal.runtime.ports import Backend, SequenceStep, Session, Shard
from shoal.runtime.request import Array


def process_cpu_s() -> float:
    """CPU seconds of the whole process: the engine's own threads count."""
    return time.process_time()


@dataclass(frozen=True, slots=True)
class Throttled:
    """*engine*, *slowdown* times slower; that is asked at every step, for it may change."""

    engine: Backend
    slowdown: Callable[[], float]
    clock: Clock = field(default_factory=SystemClock)
    cpu_s: Callable[[], float] = process_cpu_s
    wait: Callable[[float], None] = time.sleep

    def load(self, shard: Shard) -> "ThrottledSession":
        """See `Backend.load`; loading is not slowed."""
        return ThrottledSession(self.engine.load(shard), self, threads=max(1, shard.threads))


@dataclass(slots=True)
class ThrottledSession:
    """`owed_s` is how much earlier the next step may end."""

    session: Session
    throttle: Throttled
    threads: int
    owed_s: float = 0.0

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.step`."""
        t = self.throttle
        began_s, cpu_before_s = t.clock.now_s(), t.cpu_s()
        outputs = self.session.step(sequences, tensors)
        goal_s = t.slowdown() * (t.cpu_s() - cpu_before_s) / self.threads
        due_s = began_s + goal_s - self.owed_s
        if (early_s := due_s - t.clock.now_s()) > 0:
            t.wait(early_s)
        # After a long stall the device must not seem fast: no more than one step is ever made up for.
        self.owed_s = min(max(0.0, t.clock.now_s() - due_s), goal_s)
        return outputs

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Session.copy`."""
        self.session.copy(source, target, count)

    def release(self, slot: int) -> None:
        """See `Session.release`."""
        self.session.release(slot)

    def close(self) -> None:
        """See `Session.close`."""
        self.session.close()
