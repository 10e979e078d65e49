"""The coordinator's decisions over time, with planner and nodes that follow a script."""

import io
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec
import pytest

from shoal.clock import SystemClock
from shoal.errors import NodeUnreachableError, ShoalError, UnsupportedVersionError
from shoal.fleet.deployment import Deployment
from shoal.fleet.order import Accepted, Hold, Reply, Retire, Wire
from shoal.fleet.reconcile import Addressed, Phase
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import Standing
from shoal.fleet.view import CoordinatorView, DeploymentStatus
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node import coordinator as timing
from shoal.node import ordering, patience, placing
from shoal.node.coordinator import Coordinator
from shoal.node.events import EventRing
from shoal.node.journal import Journal
from shoal.observe.log import set_up_logs
from shoal.plan.problem import Answer, Estimate, Infeasible, Objective, Plan, Problem, RequestShape, Stage
from shoal.profile.fleet import FleetProfile

DESK = NodeId("d" * 32)
CHAT = DeploymentId("chat")
SPEC = DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("0" * 64), source=DESK)
FACTS = NodeFacts(name="desk", version="1", locators=(), cores=2, memory_total_bytes=100, memory_budget_bytes=50)


def plan(stop: int = 4, memory_bytes: int = 10) -> Plan:
    stage = Stage(
        node=DESK, start=0, stop=stop, weights_bytes=1, kv_bytes=1, memory_bytes=memory_bytes, prefill_s=1, decode_s=1,
        send_prefill_s=0, send_decode_s=0,
    )  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    return Plan(
        stages=(stage,), objective=Objective.LATENCY, shape=RequestShape(), estimate=figures, lower_bound=1, gap=0,
        solver="test",
    )  # fmt: skip


@dataclass
class Script:
    """A planner that gives *answer*, and one node that obeys: its shards end as *shards_are*."""

    answer: Answer | Exception = field(default_factory=plan)
    shards_are: ShardState = ShardState.WIRED
    refusal: ShoalError | None = None
    shards: dict[ShardId, ShardReport] = field(default_factory=dict)
    asked: list[tuple[DeploymentId, dict[NodeId, int]]] = field(default_factory=list)
    views: list[CoordinatorView] = field(default_factory=list)

    slow_to_measure: DeploymentId | None = None

    async def survey(self, spec: DeploymentSpec, reports: Mapping[NodeId, NodeReport]) -> FleetProfile:
        if spec.deployment == self.slow_to_measure:
            await anyio.sleep_forever()
        return FleetProfile(profile_epoch=1, devices=(), links=())

    async def plan(self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]) -> Answer:
        self.asked.append((spec.deployment, dict(promised)))
        await anyio.sleep(0.01)  # a plan takes time, in which others may be asked for
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def state(self, *_: object) -> Problem | Infeasible:
        return Infeasible(reason="not weighed", needed_bytes=0, available_bytes=0)

    async def obey(self, addressed: Addressed) -> Reply:
        order = addressed.order
        if self.refusal is not None:
            raise self.refusal
        match order:
            case Hold(shard=shard):
                self.shards[shard] = ShardReport(
                    shard=shard,
                    state=self.shards_are,
                    start=order.start,
                    stop=order.stop,
                    memory_bytes=order.memory_bytes,
                )
            case Wire():
                pass
            case Retire(shard=shard):
                self.shards.pop(shard, None)
        return Accepted()

    def status(self, name: DeploymentId = CHAT) -> DeploymentStatus | None:
        return self.views[-1].find(name) if self.views else None


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks that do not keep a test waiting."""
    monkeypatch.setattr(timing, "TICK_S", 0.01)
    monkeypatch.setattr(timing, "VIEW_EVERY_S", 0.02)
    monkeypatch.setattr(ordering, "AGAIN_AFTER_S", 0.02)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


@asynccontextmanager
async def leading(journal: Journal, script: Script) -> AsyncIterator[Coordinator]:
    """A coordinator that holds the lease, and heartbeats of its one node."""
    ring = EventRing(set_up_logs(io.StringIO()), lambda: 0.0)
    made = Coordinator(
        me=DESK, journal=journal, clock=SystemClock(), planner=script, send_order=script.obey,
        broadcast=script.views.append, note=ring.note, begin_log=ring.begin, eager=True,
    )  # fmt: skip

    async def beat() -> None:
        sequence = 0
        while True:
            sequence += 1
            shards = tuple(script.shards.values())
            made.hear_report(NodeReport(node=DESK, incarnation=1, sequence=sequence, facts=FACTS, shards=shards))
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        group.start_soon(made.run)
        await until(lambda: made.leading)
        yield made
        group.cancel_scope.cancel()


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not true():  # noqa: ASYNC110 - looked at from outside, as people do
            await anyio.sleep(0.005)


def in_phase(script: Script, wanted: Phase, name: DeploymentId = CHAT) -> bool:
    status = script.status(name)
    return status is not None and status.phase is wanted


def serving(script: Script, name: DeploymentId = CHAT) -> bool:
    return in_phase(script, Phase.SERVING, name)


pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]


async def test_what_is_wanted_again_as_it_is_stays_as_it_is(journal: Journal) -> None:
    script = Script()
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: serving(script))
        before = script.status()

        await coordinator.want(SPEC, previewed=plan())

        assert script.status() == before
        assert coordinator.state.deployments[CHAT] == before.deployment


@pytest.mark.parametrize("change", ["spec", "places"])
async def test_what_is_wanted_otherwise_is_planned_anew(journal: Journal, change: str) -> None:
    script = Script()
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: serving(script))
        epoch = coordinator.state.deployments[CHAT].plan_epoch

        spec = msgspec.structs.replace(SPEC, shape=RequestShape(slots=7)) if change == "spec" else SPEC
        await coordinator.want(spec, previewed=plan(stop=9 if change == "places" else 4))

        await until(lambda: coordinator.state.deployments[CHAT].plan_epoch > epoch and serving(script))


async def test_a_plan_epoch_never_comes_twice_though_its_deployment_was_dropped(journal: Journal) -> None:
    script = Script()
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: serving(script))
        first = coordinator.state.deployments[CHAT]

        await coordinator.drop(CHAT)
        await coordinator.want(SPEC)
        await until(lambda: serving(script))

        second = coordinator.state.deployments[CHAT]
        assert second.plan_epoch > first.plan_epoch
        assert second.spec.generation > first.spec.generation


async def test_a_plan_epoch_is_above_those_of_shards_that_somebody_still_holds(journal: Journal) -> None:
    old = ShardId(deployment=CHAT, plan_epoch=41, stage=0)
    held = {old: ShardReport(shard=old, state=ShardState.WIRED, start=0, stop=4)}
    script = Script(shards=held, refusal=UnsupportedVersionError("not now"))  # so that the old shard stays
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: coordinator.state.deployments[CHAT].answer is not None)

        assert coordinator.state.deployments[CHAT].plan_epoch == 42


async def test_a_plan_for_what_was_stopped_meanwhile_is_not_kept(journal: Journal) -> None:
    script = Script()
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: script.asked)
        await coordinator.drop(CHAT)
        await anyio.sleep(0.1)

        assert coordinator.state.deployments == {}
        assert journal.all("deployment", Deployment) == ()


async def test_what_fails_as_soon_as_it_is_loaded_is_tried_ever_more_rarely(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "RETRY_PLAN_S", 0.02)
    script = Script(shards_are=ShardState.FAILED)
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await anyio.sleep(1.0)
        # 0.02 + 0.04 + ... + 0.64 s: with a constant delay there would be dozens.
        assert 2 <= len(script.asked) <= 8

        script.shards_are = ShardState.WIRED
        await coordinator.want(msgspec.structs.replace(SPEC, shape=RequestShape(slots=7)))  # the operator tries at once
        await until(lambda: serving(script))


async def test_two_plans_at_once_do_not_count_on_the_same_memory(journal: Journal) -> None:
    script = Script()
    other = DeploymentId("other")
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await coordinator.want(msgspec.structs.replace(SPEC, deployment=other))
        await until(lambda: serving(script) and serving(script, other))

        assert [promised[DESK] for _, promised in script.asked[:2]] == [0, 10]


async def test_a_plan_does_not_wait_for_what_is_measured_for_another(journal: Journal) -> None:
    other = DeploymentId("other")
    script = Script(slow_to_measure=other)
    async with leading(journal, script) as coordinator:
        await coordinator.want(msgspec.structs.replace(SPEC, deployment=other))
        await until(lambda: in_phase(script, Phase.PLANNING, other))

        await coordinator.want(SPEC)
        await until(lambda: serving(script))


async def test_a_fault_of_the_planner_ends_neither_the_coordinator_nor_the_other_deployments(journal: Journal) -> None:
    script = Script()
    other = DeploymentId("other")
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: serving(script))
        script.answer = ZeroDivisionError("a bug")
        await coordinator.want(msgspec.structs.replace(SPEC, deployment=other))
        await until(lambda: len(script.asked) > 1)
        await anyio.sleep(0.1)

        assert serving(script)
        assert in_phase(script, Phase.PLANNING, other)


async def test_a_node_that_refuses_orders_does_not_end_the_coordinator(journal: Journal) -> None:
    script = Script(refusal=UnsupportedVersionError("what is that?"))
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: in_phase(script, Phase.LOADING))
        script.refusal = None

        await until(lambda: serving(script))


async def test_reasons_call_nodes_by_their_names(journal: Journal) -> None:
    nowhere = Infeasible(reason=f"node {DESK} is full", needed_bytes=2, available_bytes=1, hint=f"free {DESK}")
    script = Script(answer=nowhere)
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: in_phase(script, Phase.REFUSED))

        status = script.status()
        assert status is not None
        assert status.reason == "node desk is full; free desk"


async def test_a_source_that_is_late_with_its_heartbeats_is_no_reason_to_refuse(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    async with leading(journal, script) as coordinator:
        await coordinator.want(SPEC)
        await until(lambda: serving(script))
        monkeypatch.setattr(placing, "standing", lambda *_: Standing.SUSPECT)
        monkeypatch.setattr(placing, "LOST_AFTER_S", 0.0)

        with pytest.raises(NodeUnreachableError, match="desk"):
            await coordinator.preview(SPEC)
