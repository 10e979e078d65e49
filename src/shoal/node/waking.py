"""The coordinator's hand in loading on demand: takes each step that `fleet.demand` says is due, and finds room for who wakes.

Room is found by asking the planner: with the memory that is free; then as if those were gone that are on their way out; then also
without the one that was used least recently, the two, and so on.  The first plan is in force at once, so that nobody else is given
the memory; its shards are fetched, and loaded when those that have to go are gone (`fleet.reconcile`).
"""

from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any

import anyio.abc
import msgspec

from shoal.clock import Clock
from shoal.fleet.demand import due, room_for
from shoal.fleet.reconcile import Phase
from shoal.fleet.sleep import FellAsleep
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import Event, FleetState
from shoal.fleet.statuses import phases
from shoal.ids import DeploymentId
from shoal.node.placing import Placing
from shoal.plan.problem import Answer, Infeasible, Plan
from shoal.profile.fleet import FleetProfile


class NoRoomYet(msgspec.Struct, frozen=True, kw_only=True):
    """It may fit soon: when others have ended their answers, or a node is heard again."""

    why: str


@dataclass(slots=True)
class Waking:
    """Belongs to the event loop.  `apply` changes the coordinator's state; `keep` has a deployment on disk, sooner or later."""

    placing: Placing
    clock: Clock
    state: Callable[[], FleetState]
    apply: Callable[[Event], None]
    keep: Callable[[DeploymentId], Coroutine[Any, Any, None]]
    _stands: dict[DeploymentId, tuple[Phase, int, float]] = field(default_factory=dict)
    """Of those that are loaded on demand: how they stand, by which plan, and since when."""

    def tick(self, now_s: float, group: anyio.abc.TaskGroup) -> None:
        """Take the steps that are due."""
        self._watch(now_s)
        for event in due(self.state(), self._since_s(), now_s):
            self.apply(event)
            if isinstance(event, FellAsleep):  # being drowsy is not worth a record: who takes over decides anew
                group.start_soon(self.keep, event.deployment)

    async def room(self, spec: DeploymentSpec, surveyed: FleetProfile, refused: Infeasible) -> Answer | NoRoomYet:
        """A plan that counts on the memory of those that may go; *refused* is what there is without that."""
        if spec.on_demand and not refused.needed_bytes:
            # Not for want of memory: a node, perhaps its gateway, was not there for a moment.  Nobody is refused for that.
            return NoRoomYet(why=refused.reason)
        tries, busy = room_for(self.state(), spec.deployment, self._since_s(), self.clock.now_s())
        for gone in tries:
            if gone and isinstance(plan := await self._without(spec, surveyed, gone), Plan):
                return plan
        if busy and isinstance(await self._without(spec, surveyed, tries[-1] | busy), Plan):
            return NoRoomYet(why=f"{refused.reason}; in use, or about to be: {', '.join(sorted(busy))}")
        return refused

    async def _without(self, spec: DeploymentSpec, surveyed: FleetProfile, gone: Collection[DeploymentId]) -> Answer:
        return await self.placing.place(spec, surveyed, without=gone)

    def _watch(self, now_s: float) -> None:
        state = self.state()
        stood, self._stands = self._stands, {}
        for name, now in phases(state, now_s).items():
            deployment = state.deployments[name]
            if deployment.spec.on_demand:
                before = stood.get(name)
                same = before is not None and before[:2] == (now, deployment.plan_epoch)
                self._stands[name] = before if same and before is not None else (now, deployment.plan_epoch, now_s)

    def _since_s(self) -> dict[DeploymentId, float]:
        return {name: since_s for name, (_, _, since_s) in self._stands.items()}
