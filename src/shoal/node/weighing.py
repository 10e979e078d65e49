"""Looks at each deployment that serves, every few seconds: is another plan worth the move, and what if a device is lost?

What a look takes from outside is one thing: the fleet's profile as `Placing.survey` gives it now, whoever has corrected it since (a
link measured again, trials made again, a device that live stage times have shown to be slower).  The planner is asked again only
when the problem has changed by more than noise; in between, its last answer is priced anew beside the current plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import anyio.to_thread

from shoal.clock import Clock
from shoal.errors import InfeasibleError
from shoal.fleet.deployment import Deployment
from shoal.fleet.moves import PROGRESS, towards
from shoal.fleet.reconcile import Phase, heard, phase, promised_bytes
from shoal.fleet.report import NodeReport, ShardId
from shoal.fleet.state import FleetState, Standing, standing
from shoal.ids import DeploymentId, NodeId
from shoal.node.placing import Placing
from shoal.plan.budget import DeadlineBudget
from shoal.plan.losses import prepare
from shoal.plan.problem import Answer, Infeasible, Plan, Problem
from shoal.plan.replan import Candidate, Current, Move, Rules, Settling, alike, in_vain, move_cost, settle
from shoal.plan.transition import Progress, pieces_of
from shoal.plan.written import repriced

LOOK_EVERY_S = 2.0
PREPARE_BUDGET_S = 5.0


@dataclass(slots=True)
class Watch:
    """What is known of one deployment under one plan."""

    plan_epoch: int
    settling: Settling = field(default_factory=Settling)
    request_s: float = 0.0
    """Seconds of requests under way, since the last look: two for one second are two."""
    seen_s: float | None = None
    looked_s: float = float("-inf")
    problem: Problem | None = None
    candidate: Plan | None = None
    prepared: dict[NodeId, Answer] | None = None
    """For which loss which plan; None: not thought out yet for that problem."""


@dataclass(slots=True)
class Weighing:
    """Belongs to the event loop."""

    placing: Placing
    clock: Clock
    state: Callable[[], FleetState]
    rules: Rules = field(default_factory=Rules)
    _watched: dict[DeploymentId, Watch] = field(default_factory=dict)
    _looking: set[DeploymentId] = field(default_factory=set)

    def observe(self, now_s: float) -> None:
        """Count the requests that are under way."""
        state = self.state()
        self._watched = {name: watch for name, watch in self._watched.items() if name in state.deployments}
        for deployment in state.deployments.values():
            watch = self._watch(deployment)
            if watch.seen_s is not None:
                watch.request_s += (now_s - watch.seen_s) * _under_way(state, deployment)
            watch.seen_s = now_s

    def due(self, now_s: float) -> list[Deployment]:
        """Deployments that should be looked at now; they count as looked at."""
        state = self.state()
        reports = heard(state, now_s)
        found = []
        for name, deployment in state.deployments.items():
            watch = self._watch(deployment)
            moves = deployment.successor is not None or deployment.former is not None or deployment.held
            if moves or name in self._looking or now_s - watch.looked_s < LOOK_EVERY_S:
                continue
            if phase(deployment, reports) is Phase.SERVING:
                watch.looked_s = now_s
                self._looking.add(name)
                found.append(deployment)
        return found

    async def look(self, deployment: Deployment) -> Move | None:
        """The move that pays by now, if there is one.  Raises ShoalError when the fleet could not be surveyed."""
        try:
            return await self._look(deployment)
        finally:
            self._looking.discard(deployment.spec.deployment)

    def came_to_nothing(self, name: DeploymentId) -> None:
        """The move was dropped: the next has to be worth waiting for."""
        if name in self._watched:
            watch = self._watched[name]
            watch.settling = in_vain(watch.settling, self.clock.now_s())

    def ready(self, deployment: Deployment) -> Plan | None:
        """The plan that was made for what has happened to *deployment*, if it still holds: a single device of it is lost."""
        watch, state = self._watched.get(deployment.spec.deployment), self.state()
        if watch is None or watch.plan_epoch != deployment.plan_epoch or not isinstance(deployment.answer, Plan):
            return None
        reports = heard(state, self.clock.now_s())
        lost = {stage.node for stage in deployment.answer.stages} - reports.keys()
        answer = (watch.prepared or {}).get(next(iter(lost))) if len(lost) == 1 else None
        return answer if isinstance(answer, Plan) and self._fits(deployment, answer, reports) else None

    def regrets_s(self) -> dict[DeploymentId, float]:
        """Seconds that requests have lost by staying, by deployment."""
        return {name: watch.settling.regret_s for name, watch in self._watched.items()}

    async def _look(self, deployment: Deployment) -> Move | None:
        name, watch = deployment.spec.deployment, self._watch(deployment)
        surveyed = await self.placing.survey(deployment.spec)
        stated = await self.placing.problem(deployment.spec, surveyed)
        if isinstance(stated, Infeasible):
            return None
        if watch.problem is None or not alike(watch.problem, stated):
            answer = await self.placing.place(deployment.spec, surveyed)
            watch.problem, watch.prepared = stated, None
            watch.candidate = answer if isinstance(answer, Plan) else None
        if self.state().deployments.get(name) is not deployment or self._watched.get(name) is not watch:
            return None  # it was planned anew, or declared anew, in the meantime
        verdict = self._weigh(deployment, watch, stated)
        if verdict is None and watch.prepared is None and isinstance(deployment.answer, Plan):
            budget = DeadlineBudget(self.clock.now_s, PREPARE_BUDGET_S)
            watch.prepared = await anyio.to_thread.run_sync(partial(prepare, stated, deployment.answer, budget))
        return verdict

    def _weigh(self, deployment: Deployment, watch: Watch, stated: Problem) -> Move | None:
        now_s, plan = self.clock.now_s(), deployment.answer
        since_s = watch.settling.at_s
        requests = watch.request_s / (now_s - since_s) if since_s is not None and now_s > since_s else 0.0
        if watch.candidate is None or not isinstance(plan, Plan):
            return None
        try:
            estimate, rival = repriced(stated, plan).estimate, repriced(stated, watch.candidate)
        except InfeasibleError:
            return None  # a link of one of them was not measured this time
        reports = heard(self.state(), now_s)
        # Whatever its number will be, it is above those that are there.
        change = towards(self.state(), deployment, pieces_of(rival, deployment.plan_epoch + 1), reports)
        if isinstance(change, Infeasible):
            return None
        cost = move_cost(stated, change, on_disk(deployment, stated, reports), answer_s=estimate.latency_s)
        current, candidate = Current(estimate=estimate, requests=requests), Candidate(plan=rival, cost=cost)
        watch.settling, verdict = settle(watch.settling, current, candidate, now_s, self.rules)
        watch.request_s = 0.0
        return verdict if isinstance(verdict, Move) else None

    def _fits(self, deployment: Deployment, plan: Plan, reports: Mapping[NodeId, NodeReport]) -> bool:
        """Whether everybody that *plan* counts on is there, with the memory that it takes."""
        state, now_s = self.state(), self.clock.now_s()
        promised = promised_bytes(reports.values(), state.deployments.values(), deployment.spec.deployment)
        for stage in plan.stages:
            member = state.members.get(stage.node)
            if member is None or member.report.leaving or standing(member, now_s) is not Standing.ALIVE:
                return False
            wanted = sum(other.memory_bytes for other in plan.stages if other.node == stage.node)
            if promised[stage.node] + wanted > member.report.facts.memory_budget_bytes:
                return False
        return True

    def _watch(self, deployment: Deployment) -> Watch:
        name = deployment.spec.deployment
        known = self._watched.get(name)
        if known is None or known.plan_epoch != deployment.plan_epoch:
            since_s = known.settling.since_s if known is not None and deployment.moved else None
            known = self._watched[name] = Watch(plan_epoch=deployment.plan_epoch, settling=Settling(since_s=since_s))
        return known


def on_disk(
    deployment: Deployment, problem: Problem, reports: Mapping[NodeId, NodeReport]
) -> dict[NodeId, frozenset[int]]:
    """Blocks whose chunks each node has, as far as its reports say: whole models, and the shards that it holds."""
    found = {}
    for node, report in reports.items():
        if deployment.spec.manifest in report.manifests:
            found[node] = frozenset(range(len(problem.blocks)))
            continue
        mine = [s for s in report.shards if s.shard.deployment == deployment.spec.deployment]
        ranges = [range(s.start, s.stop) for s in mine if PROGRESS[s.state] >= Progress.FETCHED]
        found[node] = frozenset(block for there in ranges for block in there)
    return found


def _under_way(state: FleetState, deployment: Deployment) -> int:
    """Requests that the first stage answers or lets wait, as its node said last."""
    plan = deployment.answer
    member = state.members.get(plan.stages[0].node) if isinstance(plan, Plan) else None
    shard = ShardId(deployment=deployment.spec.deployment, plan_epoch=deployment.plan_epoch, stage=0)
    shards = member.report.shards if member is not None else ()
    return sum(s.live_requests + s.waiting_requests for s in shards if s.shard == shard)
