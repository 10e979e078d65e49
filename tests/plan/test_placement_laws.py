"""Laws of planning: for every small fleet, against exhaustive search."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.beam import beam
from shoal.plan.budget import StepBudget
from shoal.plan.chain import relax
from shoal.plan.cost import Span, barred, free_bytes, objective_value, owners, price, prompts_counted
from shoal.plan.exact import enumerate_best, fits, satisfies
from shoal.plan.placement import place
from shoal.plan.problem import (
    BatchTimes,
    BlockSpec,
    DeviceSpec,
    Infeasible,
    LinkSpec,
    Objective,
    Pin,
    Plan,
    Problem,
    RequestShape,
    Residency,
    SharedTensor,
)
from shoal.plan.tables import build_tables, cost_passes, spans_of

T = TypeVar("T")
LAWS = settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])

small = st.integers(0, 6)
BATTERY_JOULES = 0.3
"""A sum of times in ms: some batteries are just empty after a request, and that is enough."""
NUMBERS = 240
"""As many as the largest problem takes."""


class Numbers:
    """The numbers of a problem, out of one draw: hundreds of single draws take five times as long as planning does.

    Bytes shrink to 0, so the first of several choices is the plainest.
    """

    def __init__(self, data: bytes) -> None:
        self.left = iter(data)

    def upto(self, most: int) -> int:
        return next(self.left) % (most + 1)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.upto(len(choices) - 1)]

    def time_s(self) -> float:
        return self.upto(40) / 1000


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    blocks = draw(st.integers(2, 6))
    nodes = [NodeId(name) for name in "abcd"[: draw(st.sampled_from([2, 3, 3, 4]))]]
    source = nodes[0]
    shape = RequestShape(
        tokens_in=draw(st.integers(1, 9)),
        tokens_out=draw(st.integers(1, 9)),
        context_tokens=draw(st.sampled_from([0, 18, 32])),
        slots=8,
        in_flight=draw(st.integers(1, 4)),
        batch=draw(st.sampled_from([1, 1, 2])),
        retain_outputs=draw(st.booleans()),
        prefill_chunk_tokens=draw(st.integers(1, 5)),
    )
    pins = draw(st.lists(st.tuples(st.integers(0, blocks - 1), st.sampled_from(nodes)), max_size=1))
    pin_first = draw(st.booleans()) and not any(block == 0 and node != source for block, node in pins)
    pin_last = draw(st.booleans()) and not any(block == blocks - 1 and node != source for block, node in pins)
    owned = {source} | {node for _, node in pins}
    media = draw(st.booleans())
    numbers = Numbers(draw(st.binary(min_size=NUMBERS, max_size=NUMBERS)))
    return Problem(
        blocks=tuple(_block(numbers, index) for index in range(blocks)),
        devices=tuple(_device(numbers, node, blocks) for node in nodes),
        links=tuple(
            _link(numbers, a, b, media=media)
            for a in nodes
            for b in nodes
            if a != b and numbers.one_of([1, 1, 1, 1, 1, 0])
        ),
        shape=shape,
        objective=draw(st.sampled_from(Objective)),
        source=source,
        pin_first=pin_first,
        pin_last=pin_last,
        pins=tuple(Pin(block=block, node=node) for block, node in pins),
        max_stages=draw(st.sampled_from([0, 0, 0, 2, 3])),
        stages_exactly=draw(st.sampled_from([0, 0, 0, 0, 0, 2, 3])),
        exclude=tuple(node for node in nodes if node not in owned and not draw(small)),
        residency=Residency(regions=draw(st.sampled_from([(), (), (), ("home",), ("home", "near")]))),
        relay=draw(st.sampled_from([False, False, True])),
        shared=tuple(
            SharedTensor(size_bytes=size, blocks=tuple(sorted(uses)))
            for size, uses in draw(
                st.lists(st.tuples(st.integers(0, 40), st.sets(st.integers(0, blocks - 1), min_size=2)), max_size=1)
            )
        ),
    )


def overlaps(shape: RequestShape) -> bool:
    """Several chunks of a prompt are in flight: the price is then not additive, and the plan has a gap."""
    return shape.in_flight > 1 and shape.tokens_in > shape.prefill_chunk_tokens


def additive(problem: Problem) -> bool:
    """Whether what is minimised is a sum over stages and hops, but for the busiest device or wire: then plans are exact."""
    if problem.objective in {Objective.ENERGY, Objective.PRICE}:
        return True
    shared = problem.relay or any(link.medium for link in problem.links)
    return not overlaps(problem.shape) and not (problem.objective is Objective.THROUGHPUT and shared)


def _block(numbers: Numbers, index: int) -> BlockSpec:
    return BlockSpec(
        name=f"block {index}",
        weights_bytes=40 + 10 * numbers.upto(6),
        kv_bytes_per_token=numbers.upto(1),
        output_bytes_per_token=numbers.upto(6),
        output_bytes_fixed=numbers.upto(6),
        load_peak_bytes=20 * numbers.upto(6),
        workspace_bytes=numbers.upto(6),
    )


def _device(numbers: Numbers, node: NodeId, blocks: int) -> DeviceSpec:
    def times() -> tuple[float, ...]:
        return tuple(numbers.time_s() for _ in range(blocks))

    return DeviceSpec(
        node=node,
        memory_budget_bytes=numbers.one_of([400, 200, 20]) + 2 * numbers.upto(140),
        memory_promised_bytes=numbers.upto(6),
        fixed_bytes=numbers.upto(6),
        weights_factor=numbers.one_of([1.0, 1.1]),
        step_overhead_s=numbers.time_s(),
        decode_s=times(),
        prefill_s=times(),
        batched=(BatchTimes(batch=4, decode_s=times()),) if numbers.upto(1) else (),
        active_watts=float(numbers.upto(3)),
        price_per_hour=float(numbers.upto(3)),
        joules_limit=numbers.one_of([None, None, None, BATTERY_JOULES]),
        region=numbers.one_of(["home", "home", "home", "near", "far", ""]),
    )


def _link(numbers: Numbers, source: NodeId, target: NodeId, *, media: bool) -> LinkSpec:
    return LinkSpec(
        source=source,
        target=target,
        latency_s=numbers.time_s(),
        bytes_per_s=numbers.one_of([50.0, 1e3, 1e6]),
        medium=numbers.one_of(["", "", "", "air"]) if media else "",
        joules_per_byte=float(numbers.upto(3)),
        price_per_byte=float(numbers.upto(3)),
    )


def _there_and_back(problem: Problem) -> Problem:
    """The source runs the first and the last block, and may have others between."""
    return replace(problem, pin_first=True, pin_last=True, pins=(), max_stages=0, stages_exactly=0)


@LAWS
@given(problems() | problems().map(_there_and_back))
def test_no_placement_is_better_than_the_plan_and_none_exists_when_it_says_so(problem: Problem) -> None:
    best = enumerate_best(problem)

    answer = place(problem, StepBudget(10**9))

    match answer:
        case Plan():
            assert best is not None
            optimum = objective_value(problem.objective, best.estimate)
            if not additive(problem):
                assert answer.lower_bound <= optimum * (1 + 1e-9) + 1e-12
                assert _value(problem, answer) >= optimum * (1 - 1e-9)
            else:
                assert _value(problem, answer) == pytest.approx(optimum, rel=1e-9, abs=1e-12)
                assert answer.gap == pytest.approx(0, abs=1e-9)
        case Infeasible():
            assert best is None


@LAWS
@given(problems())
def test_a_plan_tiles_the_model_keeps_every_demand_and_is_priced_by_the_one_cost_model(problem: Problem) -> None:
    answer = place(problem, StepBudget(10**9))
    if isinstance(answer, Infeasible):
        return

    spans = [Span(stage.node, stage.start, stage.stop) for stage in answer.stages]
    budgets = {device.node: free_bytes(device) for device in problem.devices}

    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == len(problem.blocks)
    assert problem.relay or all(span.start < span.stop for span in spans)
    assert satisfies(problem, spans)
    held = {node: sum(s.memory_bytes for s in answer.stages if s.node == node) for node in budgets}
    assert all(held[node] <= budgets[node] for node in budgets)
    repriced = price(problem, spans)
    assert (repriced.stages, repriced.estimate) == (answer.stages, answer.estimate)


@settings(LAWS, max_examples=50)
@given(problems())
def test_relays_for_need_give_the_plan_without_any_or_else_the_one_with_them(problem: Problem) -> None:
    answers = [
        place(replace(problem, relay=relay, relay_if_needed=needed), StepBudget(10**9))
        for relay, needed in ((False, True), (False, False), (True, False))
    ]

    needed, without, relayed = answers
    assert needed == (relayed if isinstance(without, Infeasible) and isinstance(relayed, Plan) else without)


@LAWS
@given(problems())
def test_a_bound_is_never_above_a_plan_that_exists(problem: Problem) -> None:
    """With no budget at all the answer comes from the beam, and its certificate must still be true."""
    best = enumerate_best(problem)

    answer = place(problem, StepBudget(0))

    if isinstance(answer, Plan):
        assert best is not None
        optimum = objective_value(problem.objective, best.estimate)
        assert answer.lower_bound <= optimum * (1 + 1e-9) + 1e-12
        assert _value(problem, answer) >= optimum * (1 - 1e-9)


@LAWS
@given(problems())
def test_a_beam_answer_is_a_chain_at_its_stated_cost(problem: Problem) -> None:
    out = barred(problem)
    assume(not set(owners(problem).values()) & out.keys() and len(out) < len(problem.devices))
    tables = build_tables(problem)
    for search in cost_passes(tables):
        relaxed = relax(tables, search)
        found = beam(tables, search, relaxed, StepBudget(10**6))
        if found is None:
            continue
        cost, chain = found
        spans = spans_of(tables, chain, search.via)

        assert satisfies(problem, spans)
        batch = prompts_counted(problem)
        estimate = price(problem, spans).estimate
        latency_s = estimate.latency_s + (batch - 1) * estimate.time_to_first_token_s
        assert cost <= latency_s * (1 + 1e-9)
        assert overlaps(problem.shape) or cost == pytest.approx(latency_s)
        assert relaxed.bound <= cost * (1 + 1e-9)


@LAWS
@given(problems())
def test_adding_the_missing_memory_to_the_named_placement_makes_it_fit(problem: Problem) -> None:
    answer = place(problem, StepBudget(10**9))
    if isinstance(answer, Plan) or not answer.missing_bytes:
        return

    def grown(extra_bytes: int) -> Problem:
        return replace(problem, devices=tuple(_grown(device, extra_bytes) for device in problem.devices))

    assert isinstance(place(grown(answer.missing_bytes), StepBudget(10**9)), Plan)
    each = (answer.missing_bytes - 1) // len(problem.devices)
    assert isinstance(place(grown(each), StepBudget(10**9)), Infeasible)


def _grown(device: DeviceSpec, extra_bytes: int) -> DeviceSpec:
    held = max(device.memory_budget_bytes, device.memory_promised_bytes)
    return replace(device, memory_budget_bytes=held + extra_bytes)


def _value(problem: Problem, plan: Plan) -> float:
    return objective_value(problem.objective, plan.estimate)


def test_the_exhaustive_judge_knows_the_memory_rule() -> None:
    problem = Problem(
        blocks=(BlockSpec(name="only", weights_bytes=10),),
        devices=(DeviceSpec(node=NodeId("a"), memory_budget_bytes=9, decode_s=(1.0,), prefill_s=(1.0,)),),
        links=(),
        source=NodeId("a"),
    )

    assert not fits(problem, [Span(NodeId("a"), 0, 1)])
    assert enumerate_best(problem) is None
