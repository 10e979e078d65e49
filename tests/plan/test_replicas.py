"""Several pipelines at once: laws against every set of pipelines on tiny fleets, and plain cases with round numbers."""

from collections import defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.columns import bounded
from shoal.plan.cost import Span, free_bytes, occupied, owners
from shoal.plan.exact import placements, satisfies
from shoal.plan.packing import pack
from shoal.plan.pipelines import most_at_once
from shoal.plan.placement import place
from shoal.plan.problem import (
    BlockSpec,
    Choose,
    DeviceSpec,
    Infeasible,
    Limits,
    LinkSpec,
    Objective,
    Pin,
    Plan,
    Problem,
    RequestShape,
)
from shoal.plan.replicas import Replicas, replicate
from shoal.plan.routes import Way, fits_together, spread

LAWS = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
A, B, C, D = (NodeId(name) for name in "abcd")
times = st.sampled_from([0.01, 0.02, 0.05])


@st.composite
def fleets(draw: st.DrawFn) -> Problem:
    """Three or four devices and three blocks, the first of them on the source or anywhere."""
    blocks, nodes = 3, [A, B, C, D][: draw(st.sampled_from([3, 3, 3, 4]))]
    in_flight = draw(st.sampled_from([1, 2, 4]))
    return Problem(
        blocks=tuple(
            BlockSpec(name=f"block {i}", weights_bytes=draw(st.sampled_from([10, 40])), kv_bytes_per_token=1)
            for i in range(blocks)
        ),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=draw(st.sampled_from([60, 100, 160, 400])),
                step_overhead_s=draw(st.sampled_from([0.0, 0.005])),
                decode_s=tuple(draw(times) for _ in range(blocks)),
                prefill_s=tuple(draw(times) for _ in range(blocks)),
            )
            for node in nodes
        ),
        links=tuple(
            LinkSpec(
                source=a,
                target=b,
                latency_s=draw(st.sampled_from([0.0, 0.001, 0.05])),
                bytes_per_s=1e4,
                medium=draw(st.sampled_from(["", "", "air"])),
            )
            for a in nodes
            for b in nodes
            if a != b
        ),
        shape=RequestShape(
            tokens_in=4, tokens_out=4, context_tokens=10, slots=in_flight, in_flight=in_flight, prefill_chunk_tokens=4
        ),
        objective=Objective.THROUGHPUT,
        source=A,
        pin_first=draw(st.booleans()),
        pin_last=draw(st.sampled_from([False, False, True])),
    )


def best_pair(problem: Problem) -> float:
    """The most of any one or two pipelines that fit together; they share the devices that a block is pinned to."""
    common = set(owners(problem).values())
    ways = [spans for spans in placements(problem) if satisfies(problem, spans)]
    apart = [(a, b) for a, b in combinations(ways, 2) if not {s.node for s in a} & {s.node for s in b} - common]
    sets = [*((way,) for way in ways), *apart]
    tokens = problem.shape.batch * problem.shape.tokens_out
    return max((spread(problem, pair).rate * tokens for pair in sets if fits_together(problem, pair)), default=0.0)


@LAWS
@given(fleets())
def test_no_two_pipelines_give_more_than_the_bound_and_the_best_single_one_never_more(problem: Problem) -> None:
    answer = replicate(problem, 2, StepBudget(10**9))
    best = best_pair(problem)
    if isinstance(answer, Infeasible):
        assert best == 0
        return
    single = place(problem, StepBudget(10**9))

    assert isinstance(single, Plan)
    assert answer.upper_bound is not None
    assert best <= answer.upper_bound * (1 + 1e-9)
    assert single.estimate.tokens_per_s * (1 - 1e-9) <= answer.tokens_per_s <= best * (1 + 1e-9)
    assert answer.gap == pytest.approx(1 - answer.tokens_per_s / answer.upper_bound, abs=1e-9)


@LAWS
@given(fleets(), st.sampled_from([0, 3, 10**9]))
def test_a_bound_on_pipelines_is_true_however_little_time_there_is(problem: Problem, steps: int) -> None:
    single = place(problem, StepBudget(10**9))
    if isinstance(single, Infeasible):
        return
    known = [tuple(Span(stage.node, stage.start, stage.stop) for stage in single.stages)]

    found = bounded(problem, known, most_at_once(problem, 2), StepBudget(steps))

    assert best_pair(problem) <= found.bound * problem.shape.tokens_out * (1 + 1e-9)


@LAWS
@given(fleets(), st.sampled_from([0, 2, 3]))
def test_no_device_link_or_medium_is_busy_for_more_than_all_its_time(problem: Problem, most: int) -> None:
    answer = replicate(problem, most, StepBudget(10**9))
    if isinstance(answer, Infeasible):
        return
    links = {(link.source, link.target): link for link in problem.links}
    busy: defaultdict[object, float] = defaultdict(float)
    laps = problem.shape.tokens_out - 1
    for pipeline in answer.pipelines:
        requests_per_s = pipeline.tokens_per_s / problem.shape.tokens_out
        for stage in pipeline.stages:
            busy[stage.node] += requests_per_s * (stage.prefill_s + laps * stage.decode_s)
        for here, there in pairwise(pipeline.stages):
            link = links[here.node, there.node]
            sends_s = here.send_prefill_s + laps * here.send_decode_s - (1 + laps) * link.latency_s
            busy[occupied(link)] += requests_per_s * sends_s

    assert all(part <= 1 + 1e-9 for part in busy.values())


@LAWS
@given(fleets(), st.sampled_from([0, 2, 3]))
def test_what_enters_a_shard_leaves_it_and_weights_share_it_out(problem: Problem, most: int) -> None:
    answer = replicate(problem, most, StepBudget(10**9))
    if isinstance(answer, Infeasible):
        return
    into: defaultdict[Span, float] = defaultdict(float)
    out, weights = into.copy(), into.copy()
    for route in answer.routes:
        into[route.target] += route.requests_per_s
        out[route.source] += route.requests_per_s
        weights[route.source] += route.weight
    requests_per_s = answer.tokens_per_s / problem.shape.tokens_out
    firsts = (pipeline.stages[0] for pipeline in answer.pipelines)
    begun = {Span(first.node, first.start, first.stop) for first in firsts}

    assert all(into[shard] == pytest.approx(amount) for shard, amount in out.items() if shard not in begun)
    assert all(total == pytest.approx(1) for total in weights.values())
    assert sum(p.weight for p in answer.pipelines) == pytest.approx(1)
    assert sum(p.tokens_per_s for p in answer.pipelines) == pytest.approx(answer.tokens_per_s)
    alone = sum(p.tokens_per_s for p in answer.pipelines if len(p.stages) == 1) / problem.shape.tokens_out
    assert sum(out[shard] for shard in begun) + alone == pytest.approx(requests_per_s)


@LAWS
@given(fleets(), st.sampled_from([0, 2, 3]))
def test_all_pipelines_together_fit_into_memory(problem: Problem, most: int) -> None:
    answer = replicate(problem, most, StepBudget(10**9))
    if isinstance(answer, Infeasible):
        return
    held: dict[NodeId, set[tuple[int, int, int]]] = defaultdict(set)
    for pipeline in answer.pipelines:
        for stage in pipeline.stages:
            held[stage.node].add((stage.start, stage.stop, stage.memory_bytes))

    for device in problem.devices:
        assert sum(size for _, _, size in held[device.node]) <= free_bytes(device)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_amounts_keep_to_capacities_and_prices_prove_that_there_is_no_more(rows: list[list[float]]) -> None:
    uses = np.array([*rows, [1.0, 1.0, 1.0]])
    capacities = np.arange(1.0, len(uses) + 1)

    packed = pack(uses, capacities)

    assert (uses @ packed.amounts <= capacities + 1e-9).all()
    assert (packed.amounts >= 0).all()
    assert (packed.prices @ uses >= 1 - 1e-9).all()
    assert packed.prices @ capacities == pytest.approx(packed.amounts.sum())


def test_an_activity_that_uses_nothing_has_no_most() -> None:
    with pytest.raises(ValueError, match="column 1 uses no capacity"):
        pack(np.array([[1.0, 0.0]]), np.array([1.0]))


def alike(count: int, *, first_s: float = 0.001, memory: int = 250, **changes: object) -> Problem:
    """A source that only embeds, and *count* devices of which two hold the model; one micro-batch in flight each."""
    nodes = [A, *(NodeId(f"n{index}") for index in range(count))]
    times_s = (first_s, 0.1, 0.1, 0.1, 0.1)
    made = Problem(
        blocks=tuple(BlockSpec(name=f"block {i}", weights_bytes=10 if i == 0 else 100) for i in range(5)),
        devices=tuple(
            DeviceSpec(node=node, memory_budget_bytes=20 if node == A else memory, decode_s=times_s, prefill_s=times_s)
            for node in nodes
        ),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=0.001, bytes_per_s=1e9) for a in nodes for b in nodes if a != b
        ),
        shape=RequestShape(tokens_in=2, tokens_out=8, context_tokens=0, slots=1),
        objective=Objective.THROUGHPUT,
        source=A,
    )
    return replace(made, **changes)


def answered(problem: Problem, most: int = 0) -> Replicas:
    answer = replicate(problem, most, StepBudget(10**9))
    assert isinstance(answer, Replicas)
    return answer


def test_three_pairs_of_devices_answer_three_times_as_much_as_one() -> None:
    answer = answered(alike(6))

    assert len(answer.pipelines) == 3
    assert answer.tokens_per_s == pytest.approx(3 * answer.single_tokens_per_s, rel=1e-3)
    assert [p.weight for p in answer.pipelines] == pytest.approx([1 / 3] * 3, rel=1e-3)
    assert answer.limited_by


def test_no_more_pipelines_are_placed_than_are_asked_for() -> None:
    answer = answered(alike(6), most=2)

    assert len(answer.pipelines) == 2
    assert answer.tokens_per_s == pytest.approx(2 * answer.single_tokens_per_s, rel=1e-3)
    assert answer.upper_bound == pytest.approx(answer.tokens_per_s, rel=1e-3)
    assert answer.gap == pytest.approx(0, abs=1e-3)
    assert sum(not reason.used for reason in answer.reasons) == 2
    assert all("left out: no further pipeline" in reason.text for reason in answer.reasons if not reason.used)


def test_a_source_that_every_request_passes_bounds_all_pipelines_together() -> None:
    answer = answered(alike(6, first_s=0.3))

    assert answer.tokens_per_s == pytest.approx(1 / 0.3)
    assert answer.gap == pytest.approx(0, abs=1e-6)
    assert "device a" in answer.limited_by


def test_a_source_that_holds_the_model_answers_beside_the_others() -> None:
    problem = alike(2)
    roomy = replace(problem.devices[0], memory_budget_bytes=600)

    answer = answered(replace(problem, devices=(roomy, *problem.devices[1:])))

    assert sorted(len(p.stages) for p in answer.pipelines) == [1, 3]
    assert answer.tokens_per_s > answer.single_tokens_per_s * 1.5


def test_requests_change_pipelines_where_shards_line_up_and_that_gives_more() -> None:
    """The quick front of one and the quick back of the other: alone, each pipeline is as slow as its slow half."""
    problem = alike(4, shape=RequestShape(tokens_in=2, tokens_out=8, context_tokens=0, slots=8, in_flight=8))
    n0, n1, n2, n3 = (device.node for device in problem.devices[1:])
    factor = {n0: 1.0, n1: 4.0, n2: 4.0, n3: 1.0, A: 1.0}
    devices = tuple(
        replace(
            device,
            decode_s=tuple(t * factor[device.node] for t in device.decode_s),
            prefill_s=tuple(t * factor[device.node] for t in device.prefill_s),
        )
        for device in problem.devices
    )
    uneven = replace(problem, devices=devices)

    def way(front: NodeId, back: NodeId) -> Way:
        return (Span(A, 0, 1), Span(front, 1, 3), Span(back, 3, 5))

    straight = spread(
        replace(uneven, links=tuple(k for k in uneven.links if {k.source, k.target} not in ({n0, n3}, {n1, n2}))),
        [way(n0, n1), way(n2, n3)],
    )
    crossed = spread(uneven, [way(n0, n1), way(n2, n3)])

    assert crossed.rate == pytest.approx(2.5 * straight.rate)
    assert {way(n0, n3), way(n2, n1)} == set(crossed.ways) - set(straight.ways)


def test_micro_batches_are_chosen_before_pipelines_are() -> None:
    answer = answered(alike(6, choose=Choose(in_flight=4, slots=4)))

    assert answer.shape.in_flight > 1
    assert answer.tokens_per_s > answered(alike(6)).tokens_per_s


def test_a_block_that_is_pinned_elsewhere_is_passed_by_every_pipeline() -> None:
    answer = answered(alike(6, pins=(Pin(block=4, node=NodeId("n5")),)))

    assert all(p.stages[-1].node == NodeId("n5") for p in answer.pipelines)


def test_a_number_of_tokens_that_no_set_of_pipelines_gives_is_refused_with_the_most_there_is() -> None:
    reached = replicate(alike(6, limits=Limits(tokens_per_s=6.0)), 0, StepBudget(10**9))
    missed = replicate(alike(6, limits=Limits(tokens_per_s=60.0)), 2, StepBudget(10**9))

    assert isinstance(reached, Replicas)
    assert isinstance(missed, Infeasible)
    assert "2 pipelines give 4.9" in missed.reason
    assert "no set of pipelines exceeds" in missed.reason


def test_a_fleet_that_holds_no_pipeline_says_what_is_missing() -> None:
    answer = replicate(alike(1), 0, StepBudget(10**9))

    assert isinstance(answer, Infeasible)
    assert answer.missing_bytes == 140


def test_a_shard_that_several_pipelines_pass_holds_the_cache_of_each() -> None:
    problem = alike(6, shape=RequestShape(tokens_in=2, tokens_out=8, context_tokens=10, slots=1))
    blocks = (
        replace(problem.blocks[0], kv_bytes_per_token=1),
        *problem.blocks[1:],
    )  # 10 bytes of weights, 10 of each cache

    def pipelines(memory_bytes: int) -> int:
        source = replace(problem.devices[0], memory_budget_bytes=memory_bytes)
        return len(answered(replace(problem, blocks=blocks, devices=(source, *problem.devices[1:]))).pipelines)

    assert [pipelines(memory_bytes) for memory_bytes in (20, 30, 40)] == [1, 2, 3]
