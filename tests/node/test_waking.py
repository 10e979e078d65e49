"""A coordinator and models that are loaded on demand: each gets the memory in its turn, and nobody is unloaded who answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import pytest
from tests.node.test_coordinator import A, Nodes, Office, plan, run

from shoal.clock import ManualClock
from shoal.errors import UnknownModelError
from shoal.fleet.deployment import Deployment
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import NodeFacts, NodeReport, Use
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.journal import Journal
from shoal.plan.problem import Answer, Infeasible
from shoal.profile.fleet import FleetProfile

CHAT, CODE, HUGE = (DeploymentId(name) for name in ("chat", "code", "huge"))
BUDGET = 10
FACTS = NodeFacts(name="box", version="1", locators=(), cores=1, memory_total_bytes=99, memory_budget_bytes=BUDGET)


@dataclass
class OneNode(Nodes):
    """A node with memory for one of the models at a time, whose gateway says what it is asked."""

    asked: dict[DeploymentId, Use] = field(default_factory=dict)
    gone: Infeasible | None = None
    sizes: dict[DeploymentId, int] = field(default_factory=lambda: {CHAT: 6, CODE: 7, HUGE: 20})

    async def plan(self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]) -> Answer:
        if self.gone is not None:
            return self.gone
        needed, free = self.sizes[spec.deployment], BUDGET - promised[A]
        if needed > free:
            return Infeasible(reason=f"{needed} needed, {free} free", needed_bytes=needed, available_bytes=free)
        stages = tuple(msgspec.structs.replace(s, memory_bytes=needed) for s in plan(A).stages)
        return msgspec.structs.replace(plan(A), stages=stages)

    def reports(self) -> list[NodeReport]:
        return [msgspec.structs.replace(r, uses=tuple(self.asked.values())) for r in super().reports()]

    def asks(self, name: DeploymentId, *, in_flight: int = 0, idle_s: float = 0.0) -> None:
        self.asked[name] = Use(deployment=name, in_flight=in_flight, idle_s=idle_s)


@pytest.fixture
def nodes() -> OneNode:
    return OneNode(ManualClock(100), alive={A}, facts=FACTS)


async def declared(office: Office, *names: DeploymentId, on_demand: bool = True) -> None:
    await office.leads()
    for name in names:
        await office.coordinator.want(
            DeploymentSpec(
                deployment=name, model=name, manifest=Digest("d"), source=A, on_demand=on_demand, keep_alive_s=60.0
            )
        )


def at(office: Office, name: DeploymentId, phase: Phase) -> Callable[[], bool]:
    def there() -> bool:
        status = office.said[-1].find(name)
        return status is not None and status.phase is phase

    return there


def reason(office: Office, name: DeploymentId) -> str:
    status = office.said[-1].find(name)
    assert status is not None
    return status.reason


def test_nothing_is_loaded_before_somebody_asks_and_then_it_is(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CHAT)
        await office.pass_s(20)
        assert at(office, CHAT, Phase.ASLEEP)()
        assert nodes.orders == []

        await office.coordinator.wake(CHAT)
        await office.coordinator.wake(CHAT)
        await office.see(at(office, CHAT, Phase.SERVING))

    run(journal, use, nodes=nodes)


def test_two_models_that_do_not_fit_together_answer_in_turn(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CHAT, CODE)
        for name, other in ((CHAT, CODE), (CODE, CHAT), (CHAT, CODE)):
            nodes.asks(name, in_flight=1)
            await office.coordinator.wake(name)
            await office.see(at(office, name, Phase.SERVING))
            assert at(office, other, Phase.ASLEEP)()
            nodes.asks(name, idle_s=0.1)

        assert "its memory is needed for chat" in office.texts
        assert sum(len(mine) for mine in nodes.shards.values()) == 1

    run(journal, use, nodes=nodes)


def test_what_answers_stays_and_the_other_waits_and_says_for_whom(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CHAT, CODE)
        nodes.asks(CHAT, in_flight=1)
        await office.coordinator.wake(CHAT)
        await office.see(at(office, CHAT, Phase.SERVING))

        nodes.asks(CODE, in_flight=1)
        await office.coordinator.wake(CODE)
        await office.pass_s(30)
        assert at(office, CHAT, Phase.SERVING)()
        assert reason(office, CODE) == "7 needed, 4 free; in use, or about to be: chat"

        nodes.asks(CHAT)
        await office.see(at(office, CODE, Phase.SERVING))
        assert reason(office, CODE) == ""

    run(journal, use, nodes=nodes)


def test_what_is_always_loaded_is_never_unloaded_for_what_is_not(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CODE)
        await declared(office, CHAT, on_demand=False)
        await office.see(at(office, CHAT, Phase.SERVING))

        nodes.asks(CODE, in_flight=1)
        await office.coordinator.wake(CODE)
        await office.see(at(office, CODE, Phase.REFUSED))
        assert reason(office, CODE) == "7 needed, 4 free"

    run(journal, use, nodes=nodes)


def test_what_is_always_loaded_takes_the_memory_of_what_is_idle(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CODE)
        await office.coordinator.wake(CODE)
        await office.see(at(office, CODE, Phase.SERVING))
        assert not isinstance(await office.coordinator.preview(_spec(CHAT)), Infeasible)

        await declared(office, CHAT, on_demand=False)
        await office.see(at(office, CHAT, Phase.SERVING))
        assert at(office, CODE, Phase.ASLEEP)()

    run(journal, use, nodes=nodes)


def test_what_never_fits_is_refused_with_the_numbers_and_tried_anew_when_it_is_asked_for_again(
    journal: Journal, nodes: OneNode
) -> None:
    async def use(office: Office) -> None:
        await declared(office, CHAT, HUGE)
        await office.coordinator.wake(CHAT)
        await office.see(at(office, CHAT, Phase.SERVING))

        await office.coordinator.wake(HUGE)
        await office.see(at(office, HUGE, Phase.REFUSED))
        assert reason(office, HUGE) == "20 needed, 4 free"
        assert at(office, CHAT, Phase.SERVING)(), "nobody goes in vain"
        await office.see(at(office, HUGE, Phase.ASLEEP))

        nodes.sizes[HUGE] = 8
        await office.coordinator.wake(HUGE)
        await office.see(at(office, HUGE, Phase.SERVING))

    run(journal, use, nodes=nodes)


def test_an_idle_model_is_unloaded_and_another_coordinator_knows_who_sleeps(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CHAT)
        await office.coordinator.wake(CHAT)
        await office.see(at(office, CHAT, Phase.SERVING))
        nodes.asks(CHAT, idle_s=100.0)

        await office.see(at(office, CHAT, Phase.ASLEEP))
        await office.see(lambda: not nodes.shards[A])
        assert [t for t in office.texts if t.startswith("nobody has asked for it for 6")]
        await office.see(lambda: journal.get("deployment", CHAT, Deployment).asleep)

    run(journal, use, nodes=nodes)

    async def after(office: Office) -> None:
        await office.see(lambda: office.said and at(office, CHAT, Phase.ASLEEP)())
        await office.coordinator.wake(CHAT)
        await office.see(at(office, CHAT, Phase.SERVING))

    nodes.fence = 0
    run(journal, after, nodes=nodes)


def test_what_lacks_a_node_is_looked_after_for_as_long_as_somebody_waits(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await declared(office, CHAT)
        nodes.gone = Infeasible(reason="a node is not there", needed_bytes=0, available_bytes=0)
        nodes.asks(CHAT, in_flight=1)
        await office.coordinator.wake(CHAT)
        await office.pass_s(30)
        assert at(office, CHAT, Phase.PLANNING)()
        assert reason(office, CHAT) == "a node is not there"

        nodes.gone = None
        await office.see(at(office, CHAT, Phase.SERVING))

    run(journal, use, nodes=nodes)


def test_only_what_was_declared_can_be_woken(journal: Journal, nodes: OneNode) -> None:
    async def use(office: Office) -> None:
        await office.leads()
        with pytest.raises(UnknownModelError, match="no deployment is named 'chat'"):
            await office.coordinator.wake(CHAT)

    run(journal, use, nodes=nodes)


def _spec(name: DeploymentId) -> DeploymentSpec:
    return DeploymentSpec(deployment=name, model=name, manifest=Digest("d"), source=A)
