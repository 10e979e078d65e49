"""The coordinator's hand in mending: what has served and has lost a stage goes on with another worker for it (`fleet.mends`).

All other stages keep their workers and weights.  They keep no cache of the one that is gone, so the first stage ends what it
answers, and gateways send it again with the tokens so far; what is saved is the loading of every other shard.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import msgspec

from shoal.errors import ShoalError
from shoal.fleet.deployment import Deployment, MendEvent, MendingEnded, PlanMended, PlanServed
from shoal.fleet.mends import Beyond, Mend, as_found, mended_plan, next_mend, step, wish, wishes_as_cut
from shoal.fleet.reconcile import Phase, heard, mendable, phase, promised_bytes
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import Event, FleetState
from shoal.ids import DeploymentId, NodeId
from shoal.node.moving import Note
from shoal.node.placing import Placing
from shoal.plan.cost import objective_value
from shoal.plan.problem import Infeasible, Plan
from shoal.plan.written import repriced
from shoal.profile.fleet import FleetProfile


@dataclass(slots=True)
class Mending:
    """Belongs to the event loop.  `apply` changes the coordinator's state; `keep` has a deployment on disk, sooner or later."""

    placing: Placing
    ready: Callable[[Deployment], Plan | None]
    """The plan that was made for what has happened to a deployment, before it did."""
    state: Callable[[], FleetState]
    now_s: Callable[[], float]
    apply: Callable[[Event], None]
    keep: Callable[[DeploymentId], Coroutine[Any, Any, None]]
    note: Note
    one_plan: anyio.Lock
    _under_way: set[DeploymentId] = field(default_factory=set)

    def tick(self, now_s: float, group: anyio.abc.TaskGroup) -> None:
        """Note what serves, and begin to mend what is lost."""
        reports = heard(self.state(), now_s)
        for name, deployment in self.state().deployments.items():
            if name in self._under_way:
                continue
            if not deployment.served or deployment.beyond_mending:
                if phase(deployment, reports) is Phase.SERVING:
                    self._take(PlanServed(deployment=name, plan_epoch=deployment.plan_epoch), group)
            elif mendable(deployment, reports):
                match next_mend(deployment, reports):
                    case Beyond(why=why):
                        self._take(_ended(deployment, why), group)
                    case Mend(elsewhere=()) as mend:
                        assert isinstance(deployment.answer, Plan)
                        self._take(step(deployment, mend, deployment.answer), group)
                    case Mend() as mend:
                        self._elsewhere(deployment, mend, group)

    def _take(self, event: MendEvent, group: anyio.abc.TaskGroup) -> None:
        before = self.state()
        self.apply(event)
        if self.state() is not before:
            if not isinstance(event, (PlanServed, MendingEnded)):
                self.note("plan.mended", self.state().deployments[event.deployment].mended, deployment=event.deployment)
            group.start_soon(self.keep, event.deployment)

    def _elsewhere(self, deployment: Deployment, mend: Mend, group: anyio.abc.TaskGroup) -> None:
        """Give stages to others that their nodes must not have again: at once, where that was thought out before."""
        prepared = self.ready(deployment)
        event = mended_plan(deployment, mend, prepared) if prepared is not None else None
        if prepared is not None and isinstance(event, PlanMended) and as_found(event.plan, prepared):
            self._take(msgspec.structs.replace(event, why=f"{event.why}, as planned before the loss"), group)
        else:
            self._under_way.add(deployment.spec.deployment)
            group.start_soon(self._look_round, deployment, mend, group)

    async def _look_round(self, deployment: Deployment, mend: Mend, group: anyio.abc.TaskGroup) -> None:
        """Find nodes for them."""
        name = deployment.spec.deployment
        try:
            async with self.one_plan:
                event = await self._found(deployment, mend)
                # What was lost meanwhile, or came back, is looked at anew.
                reports = heard(self.state(), self.now_s())
                current = self.state().deployments.get(name)
                if current == deployment and mendable(current, reports) and next_mend(current, reports) == mend:
                    self._take(event, group)
        finally:
            self._under_way.discard(name)

    async def _found(self, deployment: Deployment, mend: Mend) -> MendEvent:
        wished = wish(deployment, mend)
        try:
            surveyed = await self.placing.survey(wished)
            event = await self._answered(deployment, mend, wished, surveyed)
            if isinstance(event, PlanMended):
                return event
            found = [
                await self._answered(deployment, mend, spec, surveyed)
                for spec in wishes_as_cut(deployment, mend, self._free_bytes(deployment))
            ]
        except ShoalError as error:
            return _ended(deployment, f"{mend.why}; {error.message}")
        except Exception as error:  # noqa: BLE001 a fault in planning one model must not end the service of the others
            return _ended(deployment, f"{mend.why}; {type(error).__name__}: {error}")
        mended = [each for each in found if isinstance(each, PlanMended)]
        return min(mended, key=_value, default=event)

    async def _answered(
        self, deployment: Deployment, mend: Mend, wished: DeploymentSpec, surveyed: FleetProfile
    ) -> MendEvent:
        try:
            answer = await self.placing.place(wished, surveyed)
            if isinstance(answer, Infeasible):
                return _ended(deployment, f"{mend.why}; {answer.reason}")
            event = mended_plan(deployment, mend, answer)
            if isinstance(event, Beyond):
                return _ended(deployment, event.why)
            return event if as_found(event.plan, answer) else await self._priced(event, wished, surveyed)
        except ShoalError as error:  # this wish cannot be answered, a node of it was not surveyed: another may
            return _ended(deployment, f"{mend.why}; {error.message}")

    def _free_bytes(self, deployment: Deployment) -> dict[NodeId, int]:
        """Of the nodes that stay."""
        state = self.state()
        reports = heard(state, self.now_s())
        promised = promised_bytes(reports.values(), state.deployments.values(), deployment.spec.deployment)
        return {n: r.facts.memory_budget_bytes - promised[n] for n, r in reports.items() if not r.leaving}

    async def _priced(self, event: PlanMended, wished: DeploymentSpec, surveyed: FleetProfile) -> MendEvent:
        """*event* with the figures of a plan whose stages write as they were told, and not as the planner would have it."""
        stated = await self.placing.problem(wished, surveyed)
        if isinstance(stated, Infeasible):
            return MendingEnded(
                deployment=event.deployment, plan_epoch=event.plan_epoch, mends=event.mends - 1, why=stated.reason
            )
        return msgspec.structs.replace(event, plan=repriced(stated, event.plan))


def _value(event: PlanMended) -> float:
    return objective_value(event.plan.objective, event.plan.estimate)


def _ended(deployment: Deployment, why: str) -> MendingEnded:
    return MendingEnded(
        deployment=deployment.spec.deployment, plan_epoch=deployment.plan_epoch, mends=deployment.mends, why=why
    )
