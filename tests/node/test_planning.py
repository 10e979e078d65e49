"""What the planner remembers of devices and links, and what it asks for again; its nodes answer real calls."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import msgspec
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import ManualClock
from shoal.errors import DeadlineExceededError, NodeUnreachableError, ShoalError, UnavailableError
from shoal.fleet.report import HopTimes, NodeFacts, NodeReport, ShardId, ShardReport, ShardState, StepTimes
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.model.frontier import Block
from shoal.model.spec import ModelKind, ModelSpec
from shoal.node.calls import CallDesk, Caller
from shoal.node.messages import BlocksOf, Links, ProbeLinks, Profiled
from shoal.node.planning import FAILED_FRESH_S, LINKS_FRESH_S, MISSING_FRESH_S, FleetPlanner
from shoal.profile.fleet import BlockTrial, DeviceProfile, LinkProfile
from shoal.transport.memory import MemoryBus

A, B, C = (NodeId(letter * 32) for letter in "abc")
MODEL = Digest("m")
BLOCK = Block(
    index=0, kind="layer", node_start=0, node_stop=1, tensors=(), inputs=(), outputs=(), flops_per_token=1,
    kv_bytes_per_token=0,
)  # fmt: skip
Scenario = Callable[["Site"], Awaitable[None]]


@dataclass
class Site:
    """Nodes that answer the planner (A and B, unless a test adds C), and what it asked them.

    `reachable` are the locators that can be dialled.
    """

    planner: FleetPlanner
    clock: ManualClock
    facts: dict[NodeId, NodeFacts]
    reachable: set[str]
    profiled: list[NodeId] = field(default_factory=list)
    probed: list[tuple[NodeId, NodeId]] = field(default_factory=list)
    faults: dict[NodeId, ShoalError] = field(default_factory=dict)
    incarnation: int = 1
    block_s: dict[str, float] = field(default_factory=dict)
    """By fingerprint: what the model's only block was measured to take."""

    def reports(self) -> dict[NodeId, NodeReport]:
        return {
            n: NodeReport(node=n, incarnation=self.incarnation, sequence=1, facts=facts)
            for n, facts in self.facts.items()
        }

    async def links(self) -> set[tuple[NodeId, NodeId]]:
        profile = await self.planner.profile(MODEL, A, self.reports())
        return {(link.source, link.target) for link in profile.links}

    async def measured(self, *, again: bool = False) -> list[NodeId]:
        profile = await self.planner.profile(MODEL, A, self.reports(), again=again)
        return [device.node for device in profile.devices]

    def desk(self, bus: MemoryBus, node: NodeId) -> CallDesk:
        async def profile(_: bytes) -> bytes:
            self.profiled.append(node)
            if node in self.faults:
                raise self.faults[node]
            facts = self.facts[node]
            trial = BlockTrial(
                kind="layer", rows=1, batch=1, context=0, time_s=self.block_s.get(facts.fingerprint, 0.01), spread_s=0.0
            )
            device = DeviceProfile(
                node=node, fingerprint=facts.fingerprint, cores=facts.cores, threads=1, trials=(trial,),
                memory_total_bytes=facts.memory_total_bytes, memory_budget_bytes=facts.memory_budget_bytes,
            )  # fmt: skip
            return msgspec.msgpack.encode(Profiled(device=device))

        async def links(body: bytes) -> bytes:
            wanted = msgspec.msgpack.decode(body, type=ProbeLinks)
            self.probed += [(node, target.node) for target in wanted.targets]
            found = tuple(
                LinkProfile(source=node, target=t.node, rtt_p50_s=0.01, rtt_p99_s=0.02, bytes_per_s=1e6)
                for t in wanted.targets
                if self.reachable & set(t.locators)
            )
            return msgspec.msgpack.encode(Links(links=found))

        async def blocks(_: bytes) -> bytes:
            spec = ModelSpec(name="m", kind=ModelKind.CAUSAL_LM, architecture="llama")
            return msgspec.msgpack.encode(BlocksOf(spec=spec, blocks=(BLOCK,)))

        return CallDesk(bus, "f", node, {"profile": profile, "links": links, "blocks": blocks})


def facts_of(name: str) -> NodeFacts:
    return NodeFacts(
        name=name, version="1", locators=(f"at-{name}",), cores=2, fingerprint=name,
        memory_total_bytes=8 << 30, memory_budget_bytes=4 << 30,
    )  # fmt: skip


@pytest.fixture
def run(bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger) -> Callable[[Scenario], None]:
    """Let a scenario happen at a new site."""
    numbers = iter(range(1000))
    clock = ManualClock()
    planner = FleetPlanner(Caller(bus_of("planner"), "f", lambda: str(next(numbers))), clock, log)
    site = Site(planner, clock, {A: facts_of("a"), B: facts_of("b")}, {"at-a", "at-b", "at-c"})

    async def play(scenario: Scenario) -> None:
        async with anyio.create_task_group() as group:
            for node in (A, B, C):
                group.start_soon(site.desk(bus_of(node), node).run)
            with anyio.fail_after(30):
                await scenario(site)
            group.cancel_scope.cancel()

    return lambda scenario: anyio.run(play, scenario)


def test_links_are_probed_where_the_nodes_said_that_they_are_dialled_and_remembered_for_a_while(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        assert await site.links() == await site.links() == {(A, B), (B, A)}
        assert sorted(site.probed) == [(A, B), (B, A)]

        site.clock.advance(LINKS_FRESH_S)
        await site.links()
        assert len(site.probed) == 4

    run(scenario)


def test_a_node_that_moved_is_probed_at_its_new_address(run: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.links()
        site.facts[B] = msgspec.structs.replace(site.facts[B], locators=("elsewhere",))

        assert await site.links() == {(B, A)}
        assert site.probed[2:] == [(A, B)]

    run(scenario)


def test_a_link_that_is_no_longer_found_is_forgotten_and_not_looked_for_with_every_plan(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        await site.links()
        site.reachable.remove("at-b")
        site.clock.advance(LINKS_FRESH_S)

        assert await site.links() == await site.links() == {(B, A)}
        assert site.planner.links_from(A) == []
        assert site.probed.count((A, B)) == 2

        site.reachable.add("at-b")
        site.clock.advance(MISSING_FRESH_S)
        assert await site.links() == {(A, B), (B, A)}

    run(scenario)


def test_a_node_that_comes_back_with_other_memory_is_planned_with_that_and_its_trials_are_kept(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        await site.planner.profile(MODEL, A, site.reports())
        site.facts[B] = msgspec.structs.replace(site.facts[B], memory_budget_bytes=1 << 30, cores=1)

        profile = await site.planner.profile(MODEL, A, site.reports())

        assert [(d.memory_budget_bytes, d.cores) for d in profile.devices] == [(4 << 30, 2), (1 << 30, 1)]
        assert sorted(site.profiled) == [A, B]

    run(scenario)


def test_what_was_not_measured_anew_is_said_to_be_cached(run: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        first = await site.planner.profile(MODEL, A, site.reports())
        second = await site.planner.profile(MODEL, A, site.reports())
        site.clock.advance(LINKS_FRESH_S)
        third = await site.planner.profile(MODEL, A, site.reports())
        again = await site.planner.profile(MODEL, A, site.reports(), again=True)

        said = [
            ({d.cached for d in p.devices}, {link.cached for link in p.links}) for p in (first, second, third, again)
        ]
        assert said == [({False}, {False}), ({True}, {True}), ({True}, {False}), ({False}, {False})]

    run(scenario)


def test_a_profile_of_some_nodes_has_the_links_between_them(run: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        site.facts[C] = facts_of("c")
        without_source = {n: r for n, r in site.reports().items() if n != A}

        profile = await site.planner.profile(MODEL, A, without_source)

        assert {(link.source, link.target) for link in profile.links} == {(B, C), (C, B)}

    run(scenario)


SLOW = DeadlineExceededError("the trials took more than 150 s")


@pytest.mark.parametrize(
    ("fault", "limit_s"), [(SLOW, FAILED_FRESH_S), (NodeUnreachableError("no answer"), MISSING_FRESH_S)]
)
def test_a_device_that_could_not_be_measured_is_left_out_for_a_while_and_not_measured_with_every_plan(
    fault: ShoalError, limit_s: float, run: Callable[[Scenario], None]
) -> None:
    async def scenario(site: Site) -> None:
        site.faults[B] = fault
        assert await site.measured() == [A]
        site.clock.advance(limit_s - 0.1)
        assert await site.measured() == [A]
        assert sorted(site.profiled) == [A, B]

        del site.faults[B]
        site.clock.advance(0.1)
        assert await site.measured() == [A, B]
        assert sorted(site.profiled) == [A, B, B]

    run(scenario)


@pytest.mark.parametrize("news", ["restarted", "asked again"])
def test_a_device_that_could_not_be_measured_is_measured_at_once_when_it_was_restarted_or_somebody_asks(
    news: str, run: Callable[[Scenario], None]
) -> None:
    async def scenario(site: Site) -> None:
        site.faults[B] = SLOW
        await site.measured()
        del site.faults[B]
        site.incarnation = 2 if news == "restarted" else 1

        assert await site.measured(again=news == "asked again") == [A, B]

    run(scenario)


def test_plans_do_not_wait_for_trials_because_of_a_device_that_cannot_be_measured(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        site.faults[B] = SLOW
        await site.measured()

        async with site.planner._measuring:  # somebody measures
            assert await site.measured() == [A]

    run(scenario)


def test_a_source_that_could_not_be_measured_is_told_with_its_reason(run: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        site.faults[A] = SLOW
        spec = DeploymentSpec(deployment=DeploymentId("chat"), model="m", manifest=MODEL, source=A)

        for _ in range(2):
            with pytest.raises(UnavailableError, match="source node a could not be measured: the trials took more"):
                await site.planner.survey(spec, site.reports())

    run(scenario)


def hopping(count: int, rtt_s: float) -> NodeReport:
    """A heartbeat of A, whose stage sends to B."""
    shard = ShardReport(
        shard=ShardId(deployment=DeploymentId("m"), plan_epoch=1, stage=0), state=ShardState.WIRED, start=0, stop=1,
        next_node=B, hop_times=HopTimes(until=count, rtt_s=rtt_s, base_s=0.01),
    )  # fmt: skip
    return NodeReport(node=A, incarnation=1, sequence=count, facts=facts_of("a"), shards=(shard,))


def test_a_link_that_became_slower_is_probed_again_both_ways_for_the_next_plan(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        await site.links()
        for count in range(1, 9):
            site.planner.hear(hopping(count, rtt_s=0.09), {DeploymentId("m"): MODEL})

        profile = await site.planner.profile(MODEL, A, site.reports())

        assert sorted(site.probed) == [(A, B), (A, B), (B, A), (B, A)]
        assert {link.factor for link in profile.links} == {1.0}

    run(scenario)


def test_a_link_that_is_a_little_slower_is_corrected_by_what_was_seen(run: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.links()
        for count in range(1, 9):
            site.planner.hear(hopping(count, rtt_s=0.0115), {DeploymentId("m"): MODEL})

        profile = await site.planner.profile(MODEL, A, site.reports())

        slow = {(link.source, link.target): link.factor for link in profile.links}
        assert slow[A, B] == pytest.approx(1.15, rel=0.02)
        assert slow[B, A] == 1.0

    run(scenario)


def stepping(count: int, facts: NodeFacts) -> NodeReport:
    """A heartbeat of A, whose stage has made steps."""
    shard = ShardReport(
        shard=ShardId(deployment=DeploymentId("m"), plan_epoch=1, stage=0), state=ShardState.WIRED, start=0, stop=1,
        step_times=StepTimes(until=count, time_s=0.02),
    )  # fmt: skip
    return NodeReport(node=A, incarnation=2, sequence=count, facts=facts, shards=(shard,))


def test_steps_are_compared_with_the_trials_of_the_machine_as_it_is_now(run: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        site.block_s["a"], site.block_s["a with more threads"] = 0.04, 0.02
        spec = DeploymentSpec(deployment=DeploymentId("m"), model="m", manifest=MODEL, source=A)
        await site.planner.survey(spec, site.reports())
        site.facts[A] = msgspec.structs.replace(site.facts[A], fingerprint="a with more threads")
        await site.planner.survey(spec, site.reports())

        for count in range(1, 9):
            site.planner.hear(stepping(count, site.facts[A]), {DeploymentId("m"): MODEL})

        device, _ = (await site.planner.survey(spec, site.reports())).devices
        assert device.fingerprint == "a with more threads"
        assert device.factor == pytest.approx(1.0)

    run(scenario)
