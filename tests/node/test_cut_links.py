"""Links that workers cannot use are none for the planner, whatever agents measured; frames may then pass through others."""

from collections.abc import Callable

import anyio
import msgspec
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import ManualClock
from shoal.fleet.reconcile import cut_pairs
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.model.frontier import Block, BlockTensor, Boundary
from shoal.model.spec import ModelKind, ModelSpec
from shoal.node.calls import CallDesk, Caller
from shoal.node.messages import BlocksOf
from shoal.node.planning import FleetPlanner, without
from shoal.plan.problem import Answer, Infeasible, Pin, Plan, Relays, RequestShape
from shoal.profile.fleet import BlockTrial, DeviceProfile, FleetProfile, LinkProfile
from shoal.transport.memory import MemoryBus

A, B, C = (NodeId(letter * 32) for letter in "abc")
Ask = Callable[..., Answer]


def link(source: NodeId, target: NodeId) -> LinkProfile:
    return LinkProfile(source=source, target=target, rtt_p50_s=0.001, rtt_p99_s=0.002, bytes_per_s=1e8)


def test_a_pair_that_cannot_dial_each_other_is_planned_without_that_direction() -> None:
    fleet = FleetProfile(profile_epoch=1, devices=(), links=(link(A, B), link(B, A)))

    assert without(fleet, frozenset({(A, B)})).links == (link(B, A),)
    assert without(fleet, frozenset()) == fleet


def block(index: int, name_in: str, name_out: str) -> Block:
    ends = tuple(
        Boundary(name=n, dtype="float32", shape=(1, "T", 8), bytes_per_token=32, bytes_fixed=0)
        for n in (name_in, name_out)
    )
    return Block(
        index=index, kind="layer", node_start=index, node_stop=index + 1, flops_per_token=1, kv_bytes_per_token=4,
        tensors=(BlockTensor(name=f"w{index}", size_bytes=1000),), inputs=ends[:1], outputs=ends[1:], kv_layers=(index,),
    )  # fmt: skip


BLOCKS = (block(0, "input_ids", "x"), block(1, "x", "y"), block(2, "y", "logits"))


def device(node: NodeId) -> DeviceProfile:
    trials = tuple(
        BlockTrial(kind="layer", rows=rows, batch=1, context=context, time_s=0.001 * rows, spread_s=0.0)
        for rows, context in ((1, 0), (1, 100), (16, 0))
    )
    return DeviceProfile(
        node=node, fingerprint="f", cores=1, threads=1, memory_total_bytes=2 << 30, memory_budget_bytes=1 << 30,
        trials=trials,
    )  # fmt: skip


def said_by_worker(node: NodeId, shard: ShardReport) -> NodeReport:
    facts = NodeFacts(name="n", version="1", locators=(), cores=1, memory_total_bytes=1, memory_budget_bytes=1)
    return NodeReport(node=node, incarnation=1, sequence=1, facts=facts, shards=(shard,))


@pytest.fixture
def ask(bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger) -> Ask:
    """Plan three blocks, one on each of A, B and C, where a worker on B has found that it cannot dial C."""
    planner = FleetPlanner(Caller(bus_of("planner"), "f", lambda: "1"), ManualClock(), log)
    failed = ShardReport(
        shard=ShardId(deployment=DeploymentId("m"), plan_epoch=1, stage=1), state=ShardState.READY, start=1, stop=2,
        next_node=C, error_code="node_unreachable", error="no answer to a hello",
    )  # fmt: skip
    everybody = tuple(link(a, b) for a in (A, B, C) for b in (A, B, C) if a != b)

    async def told(_: bytes) -> bytes:
        spec = ModelSpec(name="m", kind=ModelKind.CAUSAL_LM, architecture="llama")
        return msgspec.msgpack.encode(BlocksOf(spec=spec, blocks=BLOCKS))

    def plan(**said: Relays) -> Answer:
        fleet = FleetProfile(profile_epoch=1, devices=(device(A), device(B), device(C)), links=everybody)
        spec = DeploymentSpec(
            deployment=DeploymentId("m"), model="m", manifest=Digest("d"), source=A, stages_exactly=3,
            shape=RequestShape(tokens_in=8, tokens_out=8, context_tokens=64, slots=1),
            pins=(Pin(block=1, node=B), Pin(block=2, node=C)), **said,
        )  # fmt: skip
        surveyed = without(fleet, cut_pairs([said_by_worker(B, failed)]))

        async def scenario() -> Answer:
            async with anyio.create_task_group() as group:
                group.start_soon(CallDesk(bus_of("a"), "f", A, {"blocks": told}).run)
                with anyio.fail_after(30):
                    answer = await planner.plan(spec, surveyed, {A: 0, B: 0, C: 0})
                group.cancel_scope.cancel()
            return answer

        return anyio.run(scenario)

    return plan


@pytest.mark.parametrize("said", [{}, {"relays": Relays.ALWAYS}], ids=["if needed", "always"])
def test_frames_pass_through_a_third_node_where_a_worker_could_not_dial_the_next(
    ask: Ask, said: dict[str, Relays]
) -> None:
    plan = ask(**said)

    assert isinstance(plan, Plan)
    assert [(s.node, s.start, s.stop) for s in plan.stages] == [(A, 0, 1), (B, 1, 2), (A, 2, 2), (C, 2, 3)]
    assert plan.stages[2].memory_bytes == 0, "the shard of A has left room for its process"


def test_whoever_wants_no_relays_gets_none(ask: Ask) -> None:
    answer = ask(relays=Relays.NEVER)

    assert isinstance(answer, Infeasible)
    assert "allow relays" in answer.hint
