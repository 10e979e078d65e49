"""A plan for one deployment on the fleet as it is: first everything is measured that is not known, then it is placed.

The two are apart because the first may take minutes and the second counts on free memory: plans are placed one after another,
and nobody should wait for what is measured for somebody else.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import anyio
import msgspec

from shoal.clock import Clock
from shoal.errors import NodeUnreachableError
from shoal.fleet.reading import for_all
from shoal.fleet.reconcile import heard, promised_bytes
from shoal.fleet.report import NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import LOST_AFTER_S, FleetState, Standing, standing
from shoal.fleet.statuses import named
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Answer, Infeasible, Problem
from shoal.profile.fleet import FleetProfile

LOOK_S = 0.1


class Planner(Protocol):
    """Makes a plan for a deployment on the nodes that are heard; measures what it does not know yet."""

    async def survey(self, spec: DeploymentSpec, reports: Mapping[NodeId, NodeReport]) -> FleetProfile:
        """What a plan must know of these nodes; may take minutes.  Raises ShoalError when something could not be measured."""
        ...

    async def plan(self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]) -> Answer:
        """A plan on the surveyed nodes that *promised* names with the bytes that are not to be had there; takes seconds."""
        ...

    async def state(
        self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]
    ) -> Problem | Infeasible:
        """What `plan` would answer."""
        ...


@dataclass(frozen=True, slots=True)
class Placing:
    """Asks *planner* about the fleet that *state* gives."""

    planner: Planner
    clock: Clock
    state: Callable[[], FleetState]

    async def survey(self, spec: DeploymentSpec) -> FleetProfile:
        """What a plan for *spec* must know; raises NodeUnreachableError while its source is not heard for a moment.

        A suspect node is given the time to speak again or be lost: a plan without it would be made anew a moment later.
        """
        for _ in range(int(LOST_AFTER_S / LOOK_S) + 1):
            if Standing.SUSPECT not in self._standings().values():
                break
            await anyio.sleep(LOOK_S)
        stands, members = self._standings(), self.state().members
        if stands.get(spec.source) is Standing.SUSPECT:
            # Not "there is no plan": that would refuse requests for good, and unload what still answers.
            name = members[spec.source].report.facts.name
            raise NodeUnreachableError(f"source node {name} has not been heard for a moment", hint="try again")
        usable = {n: m.report for n, m in members.items() if stands[n] is Standing.ALIVE}
        return await self.planner.survey(spec, usable)

    async def place(
        self, spec: DeploymentSpec, surveyed: FleetProfile, *, without: Collection[DeploymentId] = ()
    ) -> Answer:
        """The plan, counting on what no other deployment holds now, but for those *without* which it is thought out."""
        answer = await self.planner.plan(self._readable(spec), surveyed, self._promised(spec, without))
        return self._with_names(answer) if isinstance(answer, Infeasible) else answer

    async def problem(
        self, spec: DeploymentSpec, surveyed: FleetProfile, *, without: Collection[DeploymentId] = ()
    ) -> Problem | Infeasible:
        """What `place` would answer."""
        stated = await self.planner.state(self._readable(spec), surveyed, self._promised(spec, without))
        return self._with_names(stated) if isinstance(stated, Infeasible) else stated

    def _readable(self, spec: DeploymentSpec) -> DeploymentSpec:
        return for_all(spec, (member.report.facts for member in self.state().members.values()))

    def _promised(self, spec: DeploymentSpec, without: Collection[DeploymentId]) -> Mapping[NodeId, int]:
        """Nodes to plan on, and what others hold of them."""
        state = self.state()
        # Surveyed nodes that are silent for a moment count; only those that are lost by now, or leave, do not.
        staying = [r for r in heard(state, self.clock.now_s()).values() if not r.leaving]
        return promised_bytes(staying, state.deployments.values(), spec.deployment, *without)

    def _with_names(self, answer: Infeasible) -> Infeasible:
        reason, hint = (named(text, self.state().members) for text in (answer.reason, answer.hint))
        return msgspec.structs.replace(answer, reason=reason, hint=hint)

    def _standings(self) -> dict[NodeId, Standing]:
        now_s = self.clock.now_s()
        return {node: standing(member, now_s) for node, member in self.state().members.items()}
