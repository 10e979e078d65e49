"""Whatever time is left, no named baseline's plan is better than the one that is given."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.plan.fleets import Family, fleet
from tests.plan.test_baselines import problems

from shoal.plan.baselines import BASELINES, best_baseline, worth
from shoal.plan.budget import StepBudget
from shoal.plan.choosing import as_chosen, shaped
from shoal.plan.cost import Span, objective_value
from shoal.plan.exact import satisfies
from shoal.plan.pareto import Front, pareto
from shoal.plan.placement import BASELINE, place
from shoal.plan.problem import Choose, Infeasible, Limits, Objective, Plan, Problem
from shoal.plan.tables import build_tables

LAWS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROUNDED = 1 + 1e-9


@st.composite
def within_limits(draw: st.DrawFn) -> Problem:
    problem = draw(problems())
    limits = Limits(
        latency_s=draw(st.sampled_from([None, None, 0.2, 0.8])),
        tokens_per_s=draw(st.sampled_from([None, None, 5.0, 20.0])),
        joules=draw(st.sampled_from([None, None, 0.5])),
    )
    return replace(problem, limits=draw(st.sampled_from([Limits(), limits])))


@st.composite
def larger(draw: st.DrawFn) -> Problem:
    """Too many devices for a search over all sets, with memory that binds."""
    family = Family(
        devices=draw(st.integers(11, 14)),
        layers=draw(st.integers(6, 14)),
        links=draw(st.sampled_from(["star", "mesh", "sites"])),
        tight=draw(st.sampled_from([1.05, 1.2, 2.0, 4.0])),
        spread=draw(st.sampled_from([0.0, 0.5])),
        objective=draw(st.sampled_from([Objective.LATENCY, Objective.THROUGHPUT])),
        in_flight=draw(st.sampled_from([1, 4])),
    )
    return fleet(family, draw(st.integers(0, 10**6)))


def assert_none_better(problem: Problem, steps: int) -> None:
    rivals = {name: worth(problem, spans) for name, baseline in BASELINES.items() if (spans := baseline(problem))}

    answer = place(problem, StepBudget(steps))

    match answer:
        case Infeasible():
            assert not rivals
        case Plan():
            value = objective_value(problem.objective, answer.estimate)
            assert satisfies(problem, [Span(s.node, s.start, s.stop) for s in answer.stages])
            assert value <= min(rivals.values(), default=value) * ROUNDED
            assert answer.lower_bound <= value * ROUNDED


@LAWS
@given(within_limits(), st.integers(0, 40))
def test_no_baseline_is_better_under_any_objective_limits_and_time(problem: Problem, steps: int) -> None:
    assert_none_better(problem, steps)


@settings(LAWS, max_examples=40)
@given(larger(), st.integers(0, 5))
def test_no_baseline_is_better_where_there_is_no_time_for_a_proof(problem: Problem, steps: int) -> None:
    assert_none_better(problem, steps)


def test_a_baselines_plan_that_is_taken_is_named_and_keeps_the_bound() -> None:
    """No time at all: the narrow beam's plan is worse than that of EdgeShard's search."""
    problem = fleet(Family(devices=13, layers=10, spread=0.5, links="mesh", tight=2.0), 0)

    answer = place(problem, StepBudget(0))

    best = best_baseline(problem, build_tables(problem))
    assert isinstance(answer, Plan)
    assert best is not None
    assert answer.solver == f"{BASELINE}: {best[0]}"
    assert objective_value(problem.objective, answer.estimate) == worth(problem, best[1])
    assert 0 < answer.gap < 1


@LAWS
@given(problems((Objective.THROUGHPUT,)), st.integers(0, 5), st.booleans())
def test_no_baseline_is_better_at_the_size_of_micro_batches_that_was_chosen(
    problem: Problem, steps: int, held: bool
) -> None:
    free = replace(problem, choose=Choose(batch=(1, 2), in_flight=4, slots=8 if held else 0))

    answer = place(free, StepBudget(steps))

    stated = as_chosen(free, answer.shape) if isinstance(answer, Plan) else shaped(free, 1, 1)
    rivals = [worth(stated, spans) for baseline in BASELINES.values() if (spans := baseline(stated))]
    match answer:
        case Infeasible():
            assert not rivals
        case Plan():
            value = objective_value(Objective.THROUGHPUT, answer.estimate)
            assert value <= min(rivals, default=value) * ROUNDED
            assert answer.lower_bound <= value * ROUNDED


@settings(LAWS, max_examples=12)
@given(larger(), st.integers(0, 5))
def test_no_baseline_is_better_than_a_front_by_any_of_its_aims(problem: Problem, steps: int) -> None:
    goals = (Objective.LATENCY, Objective.THROUGHPUT)

    front = pareto(problem, StepBudget(steps), goals)

    for place_, goal in enumerate(goals):
        judged = replace(problem, objective=goal)
        rivals = [worth(judged, spans) for b in BASELINES.values() if (spans := b(judged))]
        match front:
            case Infeasible():
                assert not rivals
            case Front():
                best = min(front.values(index)[place_] for index in range(len(front.points)))
                assert best <= min(rivals, default=best) * ROUNDED
