"""What is to be done about what a plan has lost: laws of the decision."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet.deployment import Deployment, PlanMended, Successor
from shoal.fleet.losses import losses
from shoal.fleet.mends import (
    MOST_IN_PLACE,
    MOST_MENDS,
    MOST_TRIED,
    Beyond,
    Mend,
    as_found,
    mended_plan,
    next_mend,
    wish,
    wishes_as_cut,
)
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Estimate, Objective, Pin, Plan, RequestShape, Stage
from shoal.transport.codec import Codec

CHAT, EPOCH, MB = DeploymentId("chat"), 4, 2**20
NODES = [NodeId(name * 32) for name in "abcd"]
SPARE = NodeId("e" * 32)
CUTS = [(0, 2), (2, 3), (3, 7), (7, 9)]


def plan(nodes: list[NodeId], codec: Codec = Codec.RAW) -> Plan:
    stages = tuple(
        Stage(
            node=node, start=start, stop=stop, weights_bytes=MB, kv_bytes=MB, memory_bytes=2 * MB, prefill_s=0.1,
            decode_s=0.01, send_prefill_s=0.01, send_decode_s=0.001, writes=codec,
        )
        for node, (start, stop) in zip(nodes, CUTS, strict=True)
    )  # fmt: skip
    estimate = Estimate(time_to_first_token_s=0.5, time_per_output_token_s=0.05, tokens_per_s=20.0, latency_s=1.0)
    return Plan(
        stages=stages, objective=Objective.LATENCY, shape=RequestShape(), estimate=estimate, lower_bound=0.9, gap=0.1,
        solver="it",
    )  # fmt: skip


def deployment(**fields: object) -> Deployment:
    spec = DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=NODES[0])
    made = Deployment(spec=spec, plan_epoch=EPOCH, answer=plan(NODES), served=True)
    return msgspec.structs.replace(made, **fields)


def reports(
    *, gone: set[int], failed: dict[int, str], attempts: tuple[int, ...] = (0, 0, 0, 0), mends: bool = True
) -> dict[NodeId, NodeReport]:
    found = {}
    for index, node in enumerate(NODES):
        if index in gone:
            continue
        shard = ShardReport(
            shard=ShardId(deployment=CHAT, plan_epoch=EPOCH, stage=index), start=CUTS[index][0], stop=CUTS[index][1],
            state=ShardState.FAILED if index in failed else ShardState.WIRED, attempt=attempts[index],
            error_code=failed.get(index, ""), error="it ended" if index in failed else "",
        )  # fmt: skip
        facts = NodeFacts(
            name="n", version="1", locators=(), cores=1, memory_total_bytes=MB, memory_budget_bytes=MB, mends=mends
        )
        found[node] = NodeReport(node=node, incarnation=1, sequence=1, facts=facts, shards=(shard,))
    return found


@given(
    gone=st.sets(st.integers(1, 3)),
    failed=st.dictionaries(st.integers(0, 3), st.sampled_from(["shard_lost", "unavailable"])),
    attempts=st.tuples(*[st.integers(0, 4)] * 4),
    mends=st.integers(0, MOST_MENDS),
    able=st.booleans(),
)
def test_what_is_lost_gets_a_new_attempt_and_nothing_else_does(
    gone: set[int], failed: dict[int, str], attempts: tuple[int, ...], mends: int, *, able: bool
) -> None:
    lost = gone | failed.keys()
    if not lost:
        return
    ours, heard = (
        deployment(attempts=attempts, mends=mends),
        reports(gone=gone, failed=failed, attempts=attempts, mends=able),
    )
    mend = next_mend(ours, heard)

    if isinstance(mend, Beyond):
        assert mend.why
        stuck = (0 in failed) and (failed[0] != "shard_lost" or attempts[0] >= MOST_IN_PLACE or not able)
        assert mends >= MOST_MENDS or stuck
        return
    assert [after - before for after, before in zip(mend.attempts, attempts, strict=True)] == [
        1 if index in lost else 0 for index in range(4)
    ]
    assert gone <= set(mend.elsewhere) <= lost
    for index in lost - set(mend.elsewhere):
        assert able
        assert failed[index] == "shard_lost"
        assert attempts[index] < MOST_IN_PLACE
    after = msgspec.structs.replace(ours, attempts=mend.attempts)
    assert {loss.stage for loss in losses(after, heard)} == set(gone), "old reports say nothing of it"


def test_a_move_that_is_under_way_is_not_mended() -> None:
    moving = deployment(successor=Successor(plan_epoch=5, plan=plan(NODES), why="it pays"))

    assert isinstance(next_mend(moving, reports(gone={2}, failed={})), Beyond)


def test_the_planner_is_asked_to_leave_everything_else_where_it_is() -> None:
    own = Pin(block=0, node=NODES[0])
    ours = deployment()
    ours = msgspec.structs.replace(ours, spec=msgspec.structs.replace(ours.spec, pins=(own,), exclude=(SPARE,)))
    mend = next_mend(ours, reports(gone={2}, failed={}))
    assert isinstance(mend, Mend)

    wished = wish(ours, mend)

    pinned = {pin.block: pin.node for pin in wished.pins}
    assert pinned == {0: NODES[0], 1: NODES[0], 2: NODES[1], 7: NODES[3], 8: NODES[3]}
    assert len(wished.pins) == len(pinned)
    assert wished.stages_exactly == 4
    assert wished.exclude == (SPARE, NODES[2])


def test_only_a_plan_that_leaves_the_others_where_they_are_is_taken() -> None:
    ours = deployment(answer=plan(NODES, Codec.RAW))
    mend = next_mend(ours, reports(gone={2}, failed={}))
    assert isinstance(mend, Mend)

    there = [*NODES[:2], SPARE, NODES[3]]
    taken = mended_plan(ours, mend, plan(there, Codec.FP16))
    assert isinstance(taken, PlanMended)
    assert [s.node for s in taken.plan.stages] == there
    assert [s.writes for s in taken.plan.stages] == [Codec.RAW, Codec.RAW, Codec.FP16, Codec.RAW], "as they were told"
    assert (taken.mends, taken.attempts) == (1, (0, 0, 1, 0))
    assert SPARE in taken.why
    assert as_found(taken.plan, taken.plan)
    assert not as_found(taken.plan, plan(there, Codec.FP16)), "that one was priced with other bytes over its cuts"

    assert isinstance(mended_plan(ours, mend, plan([NODES[0], SPARE, NODES[1], NODES[3]])), Beyond)


@given(
    lost=st.sets(st.integers(1, 3), min_size=1),
    places=st.tuples(*[st.sampled_from([*NODES, SPARE])] * 4),
    codec=st.sampled_from([Codec.RAW, Codec.FP16]),
    slots=st.integers(1, 3),
)
def test_a_mended_plan_differs_from_the_old_one_only_in_what_was_lost(
    lost: set[int], places: tuple[NodeId, ...], codec: Codec, slots: int
) -> None:
    ours = deployment()
    mend = next_mend(ours, reports(gone=lost, failed={}))
    assert isinstance(mend, Mend)
    found = msgspec.structs.replace(plan(list(places), codec), shape=RequestShape(slots=slots))

    taken = mended_plan(ours, mend, found)

    old, gone = plan(NODES), {NODES[index] for index in lost}
    fits = all(places[i] not in gone if i in lost else places[i] == NODES[i] for i in range(4))
    assert isinstance(taken, PlanMended) == (fits and found.shape == old.shape)
    if isinstance(taken, PlanMended):
        assert [s for i, s in enumerate(taken.plan.stages) if i not in lost] == [
            s for i, s in enumerate(old.stages) if i not in lost
        ]
        assert not {s.node for s in taken.plan.stages} & gone


def test_a_node_that_is_about_to_leave_does_not_start_a_stage_again() -> None:
    heard = reports(gone=set(), failed={2: "shard_lost"})
    heard[NODES[2]] = msgspec.structs.replace(heard[NODES[2]], leaving=True)

    mend = next_mend(deployment(), heard)

    assert isinstance(mend, Mend)
    assert mend.elsewhere == (2,)


@given(
    lost=st.sets(st.integers(1, 3), min_size=1),
    free=st.dictionaries(st.sampled_from([*NODES, *(NodeId(name * 32) for name in "efgh")]), st.integers(0, MB)),
)
def test_lost_stages_are_offered_as_they_are_cut_to_nodes_that_have_none_of_the_plan(
    lost: set[int], free: dict[NodeId, int]
) -> None:
    ours = deployment()
    mend = next_mend(ours, reports(gone=lost, failed={}))
    assert isinstance(mend, Mend)

    offered = wishes_as_cut(ours, mend, free)

    spare = {node: free_bytes for node, free_bytes in free.items() if node not in NODES}
    assert bool(offered) == (len(spare) >= len(lost))
    assert len(offered) <= MOST_TRIED
    for number, spec in enumerate(offered):
        owners = {pin.block: pin.node for pin in spec.pins}
        assert len(owners) == len(spec.pins) == CUTS[-1][1]
        nodes = [{owners[block] for block in range(*cut)} for cut in CUTS]
        assert all(len(owner) == 1 for owner in nodes), "no stage is cut again"
        assert len(set().union(*nodes)) == len(CUTS), "no node has two"
        given_to = [nodes[index].pop() for index in sorted(lost)]
        assert set(given_to) <= spare.keys()
        assert number or spare[given_to[0]] == max(spare.values())
