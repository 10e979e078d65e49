"""Several models on two small nodes, under every order of requests, lost orders, late news and changes of the coordinator."""

import random
from collections import Counter
from collections.abc import Collection

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.fleet.test_reconcile import plan

from shoal.fleet.demand import due, room_for
from shoal.fleet.order import Hold, Retire, Wire
from shoal.fleet.reconcile import Addressed, Phase, heard, missing_orders, phase, promised_bytes
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState, Use
from shoal.fleet.sleep import RoomAwaited, Woken
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import DeploymentDropped, DeploymentWanted, Event, FleetState, NodeHeard, PlanMade, apply
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Infeasible, Plan

A, B = NodeId("a"), NodeId("b")
BUDGET = {A: 10, B: 6}
SIZES = {"one": (6,), "two": (7,), "both": (4, 3), "fixed": (3,)}
"""Bytes of each stage; the first is on the source."""
KEEP_S = {"one": 2.0, "two": None, "both": 5.0}
TICK_S = 0.2
LAG = 2
"""By so many ticks the news of the gateway may be late."""
LOADED = {ShardState.LOADING, ShardState.READY, ShardState.WIRED}
FOLLOWING = {ShardState.FETCHING: ShardState.LOADING, ShardState.LOADING: ShardState.READY}


class SeveralModels(RuleBasedStateMachine):
    """A coordinator's state, nodes that obey it, and a gateway that asks: what counts holds at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.now_s, self.sequence, self.epoch, self.births = FleetState(), 100.0, 0, 0, 0
        self.shards: dict[NodeId, dict[ShardId, ShardReport]] = {A: {}, B: {}}
        self.ending: list[tuple[NodeId, ShardId]] = []
        self.stands: dict[DeploymentId, tuple[Phase, float]] = {}
        self.seen: list[dict[str, Phase]] = [{}]
        self.waiting: Counter[str] = Counter()
        self.running: dict[str, list[int]] = {name: [] for name in SIZES}
        self.ended_s: dict[str, float] = {}
        self.lost, self.lag, self.dice = 0.0, 0, random.Random(0)
        for name in KEEP_S:
            self.happens(DeploymentWanted(spec=_spec(name)))

    @rule(name=st.sampled_from(sorted(KEEP_S)), ticks=st.integers(1, 12))
    def ask(self, name: str, ticks: int) -> None:
        self.waiting[name] += 1
        self.run(ticks)

    @rule(ticks=st.integers(1, 40))
    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tick()

    @rule(lost=st.sampled_from([0.0, 0.5]), lag=st.integers(0, LAG), seed=st.integers(0, 99))
    def weather(self, lost: float, lag: int, seed: int) -> None:
        self.lost, self.lag, self.dice = lost, lag, random.Random(seed)

    @rule()
    def another_coordinator(self) -> None:
        self.stands.clear()
        self.state = FleetState(deployments=self.state.deployments)

    @rule()
    def deploy_or_drop_what_is_always_loaded(self) -> None:
        old = self.state.deployments.get(DeploymentId("fixed"))
        if old is None:
            self.epoch += 1
            self.happens(DeploymentWanted(spec=msgspec.structs.replace(_spec("fixed"), generation=self.epoch)))
        else:
            self.happens(DeploymentDropped(deployment=old.spec.deployment, generation=old.spec.generation))

    @rule()
    def everything_that_is_asked_for_is_answered_in_the_end(self) -> None:
        for _ in range(600):
            if not self.waiting.total() and not any(self.running.values()):
                return
            self.tick()
        raise AssertionError(f"still waiting: {self.waiting}, {self.seen[-1]}")

    @invariant()
    def no_node_holds_more_than_it_has(self) -> None:
        for node, mine in self.shards.items():
            held = sum(s.memory_bytes for s in mine.values() if s.state in LOADED)
            assert held <= BUDGET[node], f"{node} holds {held}"

    def tick(self) -> None:
        self.now_s += TICK_S
        self.tell()
        self.coordinate()
        for addressed in missing_orders(self.state, 1, self.now_s):
            if self.dice.random() >= self.lost:
                self.obey(addressed)
        self.work()
        self.serve()
        self.no_node_holds_more_than_it_has()

    def happens(self, event: Event) -> None:
        self.state = apply(self.state, event)
        assert apply(self.state, event) == self.state, "what happens again changes nothing"

    def phase_of(self, name: str) -> Phase:
        return phase(self.state.deployments[DeploymentId(name)], heard(self.state, self.now_s))

    def tell(self) -> None:
        """Heartbeats of both nodes; the first one has the gateway."""
        self.sequence += 1
        uses = [Use(deployment=DeploymentId(n), in_flight=self.asked(n), idle_s=self.idle_s(n)) for n in KEEP_S]
        for node, mine in self.shards.items():
            facts = NodeFacts(
                name=node, version="1", locators=(), cores=1, memory_total_bytes=99, memory_budget_bytes=BUDGET[node]
            )
            live = [
                msgspec.structs.replace(s, live_requests=len(self.running[i.deployment]) if i.stage == 0 else 0)
                for i, s in mine.items()
            ]
            said = NodeReport(
                node=node,
                incarnation=1,
                sequence=self.sequence,
                facts=facts,
                shards=tuple(live),
                uses=tuple(uses) if node == A else (),
            )
            self.happens(NodeHeard(report=said, at_s=self.now_s))

    def coordinate(self) -> None:
        for name in self.state.deployments:
            now, before = self.phase_of(name), self.stands.get(name)
            self.stands[name] = before if before is not None and before[0] is now else (now, self.now_s)
        for event in due(self.state, self.since_s(), self.now_s):
            self.happens(event)
        for name in list(self.state.deployments):
            if self.phase_of(name) in {Phase.PLANNING, Phase.REFUSED, Phase.RECOVERING}:
                self.happens(self.planned(name))

    def planned(self, name: DeploymentId) -> PlanMade | RoomAwaited:
        """As `node.waking` finds room."""
        tries, busy = room_for(self.state, name, self.since_s(), self.now_s)
        found = [place for gone in (frozenset(), *tries) if isinstance(place := self.place(name, gone), Plan)]
        if not found and isinstance(self.place(name, tries[-1] | busy), Plan):
            return RoomAwaited(deployment=name, why="others are in use")
        self.epoch += 1
        answer = found[0] if found else self.place(name, frozenset())
        return PlanMade(deployment=name, plan_epoch=self.epoch, answer=answer, at_s=self.now_s)

    def place(self, name: DeploymentId, gone: Collection[DeploymentId]) -> Plan | Infeasible:
        reports = heard(self.state, self.now_s)
        promised = promised_bytes(reports.values(), self.state.deployments.values(), name, *gone)
        free = {node: BUDGET[node] - promised[node] for node in BUDGET}
        places: list[NodeId] = []
        for index, needed in enumerate(SIZES[name]):
            node = next((n for n in (A, B) if free[n] >= needed and (n == A or index)), None)
            if node is None:
                return Infeasible(reason="too big", needed_bytes=sum(SIZES[name]), available_bytes=sum(free.values()))
            places.append(node)
            free[node] -= needed
        made = plan(*places)
        stages = [msgspec.structs.replace(s, memory_bytes=b) for s, b in zip(made.stages, SIZES[name], strict=True)]
        return msgspec.structs.replace(made, stages=tuple(stages))

    def obey(self, addressed: Addressed) -> None:
        mine, order = self.shards[addressed.node], addressed.order
        if isinstance(order, Hold) and order.load:  # the memory of earlier plans of the deployment is free for it
            elders = [
                s for s in mine if s.deployment == order.shard.deployment and s.plan_epoch < order.shard.plan_epoch
            ]
            self.ending += [(addressed.node, elder) for elder in elders]
        match order:
            case Hold() if order.shard not in mine:
                self.births += 1
                state = ShardState.FETCHING if order.load else ShardState.FETCHED
                mine[order.shard] = ShardReport(
                    shard=order.shard,
                    state=state,
                    start=order.start,
                    stop=order.stop,
                    memory_bytes=order.memory_bytes,
                    birth=self.births,
                )
            case Hold() if order.load and mine[order.shard].state is ShardState.FETCHED:
                mine[order.shard] = msgspec.structs.replace(mine[order.shard], state=ShardState.LOADING)
            case Wire() if order.shard in mine and mine[order.shard].state is ShardState.READY:
                mine[order.shard] = msgspec.structs.replace(
                    mine[order.shard],
                    state=ShardState.WIRED,
                    wired_to=order.next_locators,
                    wired_birth=order.next_birth,
                )
            case Retire():
                name = order.shard.deployment
                assert not self.running[name] or name == "fixed", f"{name} was unloaded while it answered"
                self.ending.append((addressed.node, order.shard))
            case _:
                pass

    def work(self) -> None:
        """Each shard comes one step further; a worker that was ended gives its memory back now."""
        for node, shard in self.ending:
            self.shards[node].pop(shard, None)
        self.ending.clear()
        for node, mine in self.shards.items():
            for shard, held in mine.items():
                if held.state in FOLLOWING:
                    at = (f"tcp/{node}:{shard.plan_epoch}-{shard.stage}",)
                    mine[shard] = msgspec.structs.replace(held, state=FOLLOWING[held.state], locators=at)

    def serve(self) -> None:
        """The gateway: sends what waits where the last news say that it is served, and wakes what is not."""
        self.seen = [*self.seen[-LAG:], {n: self.phase_of(n) for n in self.state.deployments}]
        news = self.seen[max(0, len(self.seen) - 1 - self.lag)]
        for name, left in self.running.items():
            self.running[name] = [ticks - 1 for ticks in left if ticks > 1]
            if left and not self.running[name]:
                self.ended_s[name] = self.now_s
        for name, count in list(self.waiting.items()):
            if count and news.get(name) is Phase.SERVING:
                assert self.seen[-1][name] in {Phase.SERVING, Phase.DROWSY}, f"{name} is gone before its gateway knows"
                self.running[name] += [self.dice.randint(1, 20)] * count
                self.waiting[name] = 0
            elif count and news.get(name) in {Phase.ASLEEP, Phase.DROWSY}:
                self.happens(Woken(deployment=DeploymentId(name)))

    def since_s(self) -> dict[DeploymentId, float]:
        return {name: since_s for name, (_, since_s) in self.stands.items()}

    def asked(self, name: str) -> int:
        return self.waiting[name] + len(self.running[name])

    def idle_s(self, name: str) -> float | None:
        return 0.0 if self.asked(name) else self.now_s - self.ended_s[name] if name in self.ended_s else None


def _spec(name: str) -> DeploymentSpec:
    return DeploymentSpec(
        deployment=DeploymentId(name),
        model=name,
        manifest=Digest("d"),
        source=A,
        on_demand=name in KEEP_S,
        keep_alive_s=KEEP_S.get(name),
    )


SeveralModels.TestCase.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSeveralModels = SeveralModels.TestCase
