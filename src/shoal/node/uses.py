"""How much this gateway is asked for each model: heartbeats tell it of those that are loaded on demand (`fleet.demand`)."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shoal.clock import Clock
from shoal.fleet.report import Use
from shoal.ids import DeploymentId


@dataclass(slots=True)
class Uses:
    """Counts requests from when they are sent, or begin to wait for that, until they end; probes of health go another way."""

    clock: Clock
    _in_flight: Counter[DeploymentId] = field(default_factory=Counter)
    _ended_s: dict[DeploymentId, float] = field(default_factory=dict)

    @contextmanager
    def using(self, name: DeploymentId) -> Iterator[None]:
        """A request for *name*."""
        self._in_flight[name] += 1
        try:
            yield
        finally:
            self._in_flight[name] -= 1
            self._ended_s[name] = self.clock.now_s()

    def of(self, name: DeploymentId) -> Use:
        """What there is to say of *name* now."""
        in_flight, ended_s = self._in_flight[name], self._ended_s.get(name)
        idle_s = 0.0 if in_flight else None if ended_s is None else self.clock.now_s() - ended_s
        return Use(deployment=name, in_flight=in_flight, idle_s=idle_s)
