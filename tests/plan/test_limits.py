"""Limits: what a plan must keep to, and what is said when none can."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.plan.test_placement_laws import problems

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.cost import Priced, Span, meets, objective_value, price
from shoal.plan.exact import enumerate_best, placements, satisfies
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Limits, Objective, Plan, Problem, Residency

Chain = Callable[..., Problem]
LAWS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ENDLESS = 10**9


@st.composite
def limited(draw: st.DrawFn) -> Problem:
    """A small problem with limits near what its placements give, so that they bind, and sometimes contradict each other."""
    problem = draw(problems().map(eased))
    priced = every(problem)
    assume(len(priced) > 1)
    names = draw(st.sets(st.sampled_from(Limits.__struct_fields__), min_size=1, max_size=3))
    chosen = {name: getattr(draw(st.sampled_from(priced)).estimate, name) for name in sorted(names)}
    slack = draw(st.sampled_from([1.0, 1.0, 1.2, 0.9]))
    return replace(problem, limits=Limits(**{name: slack * value for name, value in chosen.items()}))


def eased(problem: Problem) -> Problem:
    """The same with room for several placements: little but memory, links and batteries demands anything."""
    devices = tuple(
        replace(device, memory_budget_bytes=device.memory_budget_bytes + 150 * (index % 2 + 1))
        for index, device in enumerate(problem.devices)
    )
    return replace(problem, devices=devices, pins=(), stages_exactly=0, exclude=(), residency=Residency())


def every(problem: Problem) -> list[Priced]:
    """All placements of a problem, priced; the judge shares only the cost model with the solvers."""
    links = {(link.source, link.target) for link in problem.links}
    chains = (spans for spans in placements(problem) if satisfies(problem, spans) and _linked(problem, spans, links))
    return [price(problem, spans) for spans in chains]


def _linked(problem: Problem, spans: tuple[Span, ...], links: set[tuple[NodeId, NodeId]]) -> bool:
    nodes = [span.node for span in spans]
    pairs = [*pairwise(nodes), (problem.source, nodes[0]), (nodes[-1], problem.source)]
    return all(a == b or (a, b) in links for a, b in [*pairs, (nodes[-1], nodes[0])])


@LAWS
@given(limited())
def test_a_plan_keeps_its_limits_and_is_the_best_that_does(problem: Problem) -> None:
    best = enumerate_best(problem)

    answer = place(problem, StepBudget(ENDLESS))

    match answer:
        case Plan():
            assert best is not None
            assert meets(problem.limits, answer.estimate)
            optimum = objective_value(problem.objective, best.estimate)
            assert objective_value(problem.objective, answer.estimate) == pytest.approx(optimum, rel=1e-8, abs=1e-12)
            assert answer.gap == pytest.approx(0, abs=1e-8)
        case Infeasible():
            assert best is None, (answer, best)


@settings(LAWS, max_examples=10)
@given(limited())
def test_a_search_that_is_cut_short_keeps_limits_and_its_bound_is_true(problem: Problem) -> None:
    best = enumerate_best(problem)

    answer = place(problem, StepBudget(3))

    if isinstance(answer, Plan):
        assert best is not None
        assert meets(problem.limits, answer.estimate)
        optimum = objective_value(problem.objective, best.estimate)
        assert answer.lower_bound <= optimum * (1 + 1e-8) + 1e-12


@pytest.fixture
def split(chain: Chain) -> Problem:
    """Alone the source takes 0.8 s and 1.6 J; with all but one block on the quick device 0.149 s and 4.4 J."""
    base = chain([1] * 8, [0.100, 0.005], [9, 9], {(0, 1): 0.007})
    watts = (2.0, 120.0)
    return replace(base, devices=tuple(replace(d, active_watts=w) for d, w in zip(base.devices, watts, strict=True)))


def solve(problem: Problem) -> Plan | Infeasible:
    return place(problem, StepBudget(ENDLESS))


def homes(answer: Plan | Infeasible) -> str:
    assert isinstance(answer, Plan), answer
    return "".join(stage.node[1] * (stage.stop - stage.start) for stage in answer.stages)


def test_a_limit_on_joules_moves_blocks_to_the_thrifty_device(split: Problem) -> None:
    assert homes(solve(split)) == "01111111"
    assert homes(solve(replace(split, limits=Limits(joules=3.3)))) == "00001111"
    assert homes(solve(replace(split, limits=Limits(joules=1.7)))) == "00000000"


def test_the_least_energy_within_a_latency_is_a_plan_between_the_ends(split: Problem) -> None:
    thrifty = replace(split, objective=Objective.ENERGY)

    assert homes(solve(thrifty)) == "00000000"
    answer = solve(replace(thrifty, limits=Limits(latency_s=0.5)))
    assert homes(answer) == "00001111"
    assert isinstance(answer, Plan)
    assert answer.gap == 0


def test_a_limit_out_of_reach_is_named_with_the_best_that_there_is(split: Problem) -> None:
    answer = solve(replace(split, limits=Limits(latency_s=0.1, joules=9.0)))

    assert isinstance(answer, Infeasible)
    assert answer.reason == "a request's latency of at most 100 ms is out of reach: the best is 149 ms"
    assert answer.hint == "set the limit to 149 ms, or drop it"


def test_throughput_that_no_plan_reaches_is_told_in_tokens_per_second(split: Problem) -> None:
    answer = solve(replace(split, limits=Limits(tokens_per_s=100.0)))

    assert isinstance(answer, Infeasible)
    assert answer.reason == "throughput of at least 100 tok/s is out of reach: the best is 6.711 tok/s"


def test_limits_that_contradict_each_other_are_told_together(split: Problem) -> None:
    """Each can be had alone."""
    answer = solve(replace(split, limits=Limits(latency_s=0.3, joules=2.0)))

    assert isinstance(answer, Infeasible)
    assert answer.reason == (
        "energy of at most 2 J is out of reach with a request's latency of 300 ms: the best is 4 J"
    )


def test_without_memory_the_limits_are_not_blamed(chain: Chain) -> None:
    problem = chain([5, 5], [1.0], [6], {}, limits=Limits(latency_s=0.001))

    answer = solve(problem)

    assert isinstance(answer, Infeasible)
    assert answer.missing_bytes == 4


def test_reasons_compare_with_plans_that_keep_to_the_limits_too(split: Problem) -> None:
    """Without the quick device the request takes 0.8 s, which the limit rules out."""
    answer = solve(replace(split, limits=Limits(latency_s=0.5)))

    assert isinstance(answer, Plan)
    assert "no plan without it fits and keeps to the limits" in answer.reasons[1].text


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_limit_that_is_no_amount_is_refused(split: Problem, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"limits\.joules is"):
        solve(replace(split, limits=Limits(joules=value)))
