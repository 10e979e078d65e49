"""Relays of this node: those of one plan share a process, as the planner counts them (`relay`, ADR 17).

A crew begins with the first relay of a plan and ends with the last.  Relays of a plan come and go together; should one go
earlier, the process idles for it, and a relay that comes after that begins another crew.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId
from shoal.node.worker_spec import WorkerSpec


class CrewProcess(Protocol):
    """A process that relays for every spec that it is told."""

    @property
    def ended(self) -> bool:
        """Whether it is no more."""
        ...

    async def tell(self, spec: WorkerSpec) -> None:
        """Have it relay for one more hop."""
        ...

    async def wait(self) -> str:
        """Return when it has ended, with the reason in words."""
        ...

    async def stop(self) -> None:
        """End it and wait until its memory is back."""
        ...


@dataclass(slots=True)
class _Crew:
    process: CrewProcess
    members: set[ShardId] = field(default_factory=set)


Plan = tuple[DeploymentId, int]
"""A deployment and its plan epoch."""


@dataclass(slots=True)
class Crews:
    """Owns the processes; belongs to the event loop."""

    start: Callable[[WorkerSpec], Awaitable[CrewProcess]]
    """Start a process with its first relay."""
    _open: dict[Plan, _Crew] = field(default_factory=dict)
    """Those that take further relays."""
    _one_at_a_time: anyio.Lock = field(default_factory=anyio.Lock)

    async def begin(self, spec: WorkerSpec) -> "Relay":
        """Relay for the hop of *spec*."""
        plan = (spec.shard.deployment, spec.shard.plan_epoch)
        async with self._one_at_a_time:
            crew = self._open.get(plan)
            if crew is None or crew.process.ended:
                crew = self._open[plan] = _Crew(await self.start(spec))
            else:
                await crew.process.tell(spec)
            crew.members.add(spec.shard)
        return Relay(self, crew, spec.shard)

    async def leave(self, crew: _Crew, shard: ShardId) -> None:
        """End the relay of *shard*, and with the last one its process."""
        async with self._one_at_a_time:
            crew.members.discard(shard)
            self._open.pop((shard.deployment, shard.plan_epoch), None)
            if not crew.members:
                await crew.process.stop()


@dataclass(frozen=True, slots=True)
class Relay:
    """One relay of a crew: a `WorkerHandle`."""

    crews: Crews
    crew: _Crew
    shard: ShardId

    async def wait(self) -> str:
        """See `WorkerHandle.wait`."""
        return await self.crew.process.wait()

    async def stop(self, *, at_once: bool = False) -> None:  # noqa: ARG002 other relays of the process may go on
        """See `WorkerHandle.stop`."""
        await self.crews.leave(self.crew, self.shard)
