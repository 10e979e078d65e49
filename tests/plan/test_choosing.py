"""Throughput with micro-batches to choose, against every choice and every placement."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.plan.test_placement_laws import overlaps, problems

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.choosing import shaped
from shoal.plan.cost import Priced, Span, objective_value, price
from shoal.plan.exact import enumerate_best, satisfies
from shoal.plan.placement import place
from shoal.plan.problem import (
    BatchTimes,
    BlockSpec,
    Choose,
    DeviceSpec,
    Infeasible,
    Limits,
    LinkSpec,
    Objective,
    Plan,
    Problem,
    RequestShape,
)

LAWS = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
A, B = NodeId("a"), NodeId("b")


@st.composite
def open_problems(draw: st.DrawFn) -> Problem:
    """Small fleets with batch, number in flight, and perhaps slots to choose; sometimes within a limit."""
    stated = draw(problems())
    asked = Choose(
        batch=draw(st.sampled_from([(), (1,), (1, 2), (2, 3), (1, 4)])),
        in_flight=draw(st.integers(1, 4)),
        slots=draw(st.sampled_from([0, 0, 4, 6])),
    )
    limit_s = draw(st.sampled_from([None, None, 0.3, 1.0]))
    shape = replace(stated.shape, slots=draw(st.sampled_from([8, 4])), in_flight=1, batch=draw(st.sampled_from([1, 2])))
    return replace(
        stated,
        objective=Objective.THROUGHPUT,
        choose=asked,
        shape=shape,
        limits=Limits(latency_s=limit_s),
        stages_exactly=0,
        relay=False,
        links=tuple(replace(link, medium="") for link in stated.links),
    )


@st.composite
def tight_problems(draw: st.DrawFn) -> Problem:
    """Each sequence's cache takes as much as some weights: more in flight need more devices, or slower ones."""
    blocks, nodes = 4, [NodeId(name) for name in "abc"]
    speeds = [draw(st.sampled_from([0.005, 0.01, 0.03, 0.05])) for _ in nodes]
    steep = draw(st.sampled_from([1.2, 2.0, 4.0]))
    return Problem(
        blocks=tuple(BlockSpec(name=f"block {i}", weights_bytes=40, kv_bytes_per_token=1) for i in range(blocks)),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=draw(st.sampled_from([90, 120, 160, 240, 400])),
                decode_s=(speed,) * blocks,
                prefill_s=(speed,) * blocks,
                batched=(BatchTimes(batch=4, decode_s=(steep * speed,) * blocks),),
            )
            for node, speed in zip(nodes, speeds, strict=True)
        ),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=draw(st.sampled_from([0.001, 0.02, 0.1])), bytes_per_s=1e6)
            for a in nodes
            for b in nodes
            if a != b
        ),
        shape=RequestShape(tokens_in=4, tokens_out=6, context_tokens=10, slots=1),
        objective=Objective.THROUGHPUT,
        source=nodes[0],
        choose=Choose(batch=draw(st.sampled_from([(1,), (1, 2), (2, 4)])), in_flight=6, slots=12),
    )


def every_choice(problem: Problem) -> Iterator[Problem]:
    """All problems that one choice makes of it, by counting alone."""
    asked, shape = problem.choose, problem.shape
    for batch in asked.batch or (shape.batch,):
        for in_flight in range(1, asked.in_flight + 1):
            if batch * in_flight <= (asked.slots or shape.slots):
                slots = batch * in_flight if asked.slots else shape.slots
                yield replace(
                    problem,
                    choose=Choose(),
                    shape=replace(shape, batch=batch, in_flight=in_flight, slots=slots),
                )


def best_of_all(problem: Problem) -> Priced | None:
    found = [best for stated in every_choice(problem) if (best := enumerate_best(stated)) is not None]
    return max(found, key=lambda priced: priced.estimate.tokens_per_s or float("inf"), default=None)


@LAWS
@given(open_problems() | tight_problems())
def test_no_choice_and_no_placement_gives_more_than_the_plan(problem: Problem) -> None:
    best = best_of_all(problem)

    answer = place(problem, StepBudget(10**9))

    match answer:
        case Plan():
            assert best is not None
            optimum = objective_value(problem.objective, best.estimate)
            value = objective_value(problem.objective, answer.estimate)
            assert answer.lower_bound <= optimum * (1 + 1e-9) + 1e-12
            assert value >= optimum * (1 - 1e-9)
            if not any(overlaps(stated.shape) for stated in every_choice(problem)):
                assert value == pytest.approx(optimum, rel=1e-9, abs=1e-12)
        case Infeasible():
            assert best is None


@LAWS
@given(open_problems() | tight_problems())
def test_a_chosen_plan_is_one_of_the_choices_and_keeps_every_demand(problem: Problem) -> None:
    answer = place(problem, StepBudget(10**9))
    if isinstance(answer, Infeasible):
        return

    spans = [Span(stage.node, stage.start, stage.stop) for stage in answer.stages]
    stated = next(stated for stated in every_choice(problem) if stated.shape == answer.shape)

    assert satisfies(stated, spans)
    speeds = [
        price(other, spans).estimate.tokens_per_s
        for other in every_choice(problem)
        if other.shape.batch == answer.shape.batch and other.shape.in_flight < answer.shape.in_flight
    ]
    assert all(speed < answer.estimate.tokens_per_s for speed in speeds)  # none in flight for nothing


@LAWS
@given(open_problems() | tight_problems())
def test_a_bound_holds_for_all_choices_when_there_is_no_time_at_all(problem: Problem) -> None:
    best = best_of_all(problem)

    answer = place(problem, StepBudget(0))

    if isinstance(answer, Plan):
        assert best is not None
        assert answer.lower_bound <= objective_value(problem.objective, best.estimate) * (1 + 1e-9) + 1e-12


def pair(memory: int, choose: Choose, **changes: object) -> Problem:
    """Two equal devices, four blocks; a step of 4 costs 1.5 times that of one, a sequence's cache 10 bytes a block."""
    devices = tuple(
        DeviceSpec(
            node=node,
            memory_budget_bytes=memory,
            decode_s=(0.1,) * 4,
            prefill_s=(0.1,) * 4,
            batched=(BatchTimes(batch=4, decode_s=(0.15,) * 4),),
        )
        for node in (A, B)
    )
    stated = Problem(
        blocks=tuple(BlockSpec(name=f"block {i}", weights_bytes=100, kv_bytes_per_token=1) for i in range(4)),
        devices=devices,
        links=tuple(LinkSpec(source=a, target=b, latency_s=0.01, bytes_per_s=1e9) for a, b in ((A, B), (B, A))),
        shape=RequestShape(tokens_in=2, tokens_out=8, context_tokens=10, slots=1, in_flight=1),
        objective=Objective.THROUGHPUT,
        source=A,
        choose=choose,
    )
    return replace(stated, **changes)


def placed(problem: Problem) -> Plan:
    answer = place(problem, StepBudget(10**9))
    assert isinstance(answer, Plan)
    return answer


def test_as_many_micro_batches_as_pay_off_are_in_flight() -> None:
    plan = placed(pair(10_000, Choose(in_flight=8, slots=8)))

    assert len(plan.stages) == 2
    assert plan.shape.in_flight == 3  # two keep both devices busy but for the links, a third hides these
    assert plan.shape.slots == 3
    assert plan.gap == pytest.approx(0, abs=1e-9)


def test_larger_micro_batches_are_chosen_where_they_share_a_step() -> None:
    plan = placed(pair(10_000, Choose(batch=(1, 4), in_flight=4, slots=16)))

    assert plan.shape.batch == 4
    assert [row.batch for row in plan.weighed] == [1, 4] or [row.batch for row in plan.weighed] == [4]


def test_cache_that_does_not_fit_beside_the_weights_keeps_choices_small() -> None:
    roomy = placed(pair(10_000, Choose(batch=(1, 4), in_flight=4, slots=16)))
    tight = placed(pair(300, Choose(batch=(1, 4), in_flight=4, slots=16)))

    assert tight.shape.slots < roomy.shape.slots
    assert all(stage.memory_bytes <= 300 for stage in tight.stages)


def test_a_limit_on_latency_rules_out_batches_that_take_too_long() -> None:
    asked = Choose(batch=(1, 4), in_flight=4, slots=16)

    plan = placed(pair(10_000, asked, limits=Limits(latency_s=3.5)))

    assert plan.shape.batch == 1
    assert plan.estimate.latency_s <= 3.5


def test_what_nobody_leaves_open_is_taken_as_it_stands() -> None:
    stated = pair(
        10_000, Choose(), shape=RequestShape(tokens_in=2, tokens_out=8, context_tokens=10, slots=2, in_flight=2)
    )

    assert placed(stated).shape == stated.shape
    assert (
        placed(replace(stated, objective=Objective.LATENCY, choose=Choose(in_flight=8, slots=8))).shape == stated.shape
    )


def test_a_choice_that_fits_nowhere_says_what_is_missing_at_the_least() -> None:
    answer = place(pair(150, Choose(batch=(2, 4), in_flight=4, slots=16)), StepBudget(10**9))

    assert isinstance(answer, Infeasible)
    assert answer.needed_bytes == 4 * (100 + 20)
    assert "it is not proven" not in answer.reason


@pytest.mark.parametrize(
    ("choose", "param"),
    [
        (Choose(batch=(0, 1)), "choose.batch"),
        (Choose(in_flight=-1), "choose"),
        (Choose(in_flight=5000), "choose"),
        (Choose(batch=(8,), in_flight=2), "choose.slots"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(choose: Choose, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        place(pair(1000, choose), StepBudget(10))

    assert caught.value.param == param


def test_a_choice_made_by_hand_is_a_problem_without_one() -> None:
    made = shaped(pair(1000, Choose(batch=(1, 2), in_flight=4, slots=8)), 2, 3)

    assert (made.shape.batch, made.shape.in_flight, made.shape.slots) == (2, 3, 6)
    assert made.choose == Choose()
