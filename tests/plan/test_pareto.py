"""Fronts: what latency, throughput, joules and money cost each other."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.plan.test_limits import eased, every, limited
from tests.plan.test_placement_laws import problems

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.cost import meets, objective_value
from shoal.plan.pareto import Front, knee, pareto, undominated, worth_weighing
from shoal.plan.placement import place
from shoal.plan.problem import (
    BlockSpec,
    DeviceSpec,
    Infeasible,
    Limits,
    LinkSpec,
    Objective,
    Plan,
    Problem,
    RequestShape,
)

LAWS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ENDLESS = 10**9

objectives = st.sampled_from([(a, b) for a in Objective for b in Objective if a is not b])


def figures(front: Front) -> list[tuple[float, ...]]:
    return [front.values(index) for index in range(len(front.points))]


def brute(problem: Problem, wanted: Sequence[Objective]) -> list[tuple[float, ...]]:
    """The front of every placement there is."""
    values = [tuple(objective_value(o, p.estimate) for o in wanted) for p in every(problem)]
    return [values[index] for index in undominated(values)]


def near(point: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    return any(point == pytest.approx(other, rel=1e-7, abs=1e-12) for other in others)


@LAWS
@given(problems().map(eased) | limited(), objectives)
def test_a_front_of_two_objectives_is_that_of_all_placements(problem: Problem, pair: tuple[Objective, ...]) -> None:
    expected = brute(problem, pair)

    front = pareto(problem, StepBudget(ENDLESS), pair)

    if isinstance(front, Infeasible):
        assert not expected
        return
    assert front.complete
    assert all(near(point, expected) for point in figures(front))
    assert all(near(point, figures(front)) for point in expected)


def test_a_plan_that_takes_no_time_keeps_to_any_rate() -> None:
    free = DeviceSpec(node=NodeId("a"), memory_budget_bytes=100, decode_s=(0.0,), prefill_s=(0.0,))
    problem = Problem(
        blocks=(BlockSpec(name="block 0", weights_bytes=40),),
        devices=(free,),
        links=(),
        shape=RequestShape(tokens_in=1, tokens_out=1),
        source=free.node,
        limits=Limits(tokens_per_s=1000.0),
    )

    front = pareto(problem, StepBudget(ENDLESS), (Objective.LATENCY, Objective.THROUGHPUT))

    assert isinstance(front, Front)
    assert figures(front) == [(0.0, 0.0)]


@settings(LAWS, max_examples=12)
@given(problems().map(eased), st.permutations(list(Objective)), st.integers(2, 4))
def test_no_point_beats_another_and_each_objectives_best_plan_is_there(
    problem: Problem, order: list[Objective], count: int
) -> None:
    front = pareto(problem, StepBudget(ENDLESS), order[:count])
    assume(isinstance(front, Front))
    points = figures(front)

    assert len(undominated(points)) == len(points)
    for place_, objective in enumerate(front.objectives):
        answer = place(replace(problem, objective=objective), StepBudget(ENDLESS))
        assert isinstance(answer, Plan)
        best = objective_value(objective, answer.estimate)
        assert min(point[place_] for point in points) <= best * (1 + 1e-8) + 1e-12


@settings(LAWS, max_examples=10)
@given(problems().map(eased), st.permutations(list(Objective)))
def test_three_objectives_on_a_few_devices_are_complete_as_well(problem: Problem, order: list[Objective]) -> None:
    wanted = order[:3]
    expected = brute(problem, wanted)

    front = pareto(problem, StepBudget(ENDLESS), wanted)

    if isinstance(front, Infeasible):
        assert not expected
        return
    assert front.complete
    assert all(near(point, figures(front)) for point in expected)
    assert len(front.points) == len(expected)


@settings(LAWS, max_examples=10)
@given(limited(), objectives)
def test_a_front_that_is_cut_short_says_so_and_keeps_limits(problem: Problem, pair: tuple[Objective, ...]) -> None:
    front = pareto(problem, StepBudget(2), pair)

    if isinstance(front, Front):
        assert not front.complete
        assert all(meets(problem.limits, plan.estimate) for plan in front.points)
        assert len(undominated(figures(front))) == len(front.points)


@pytest.fixture
def thrifty(chain: Callable[..., Problem]) -> Problem:
    """A quick device that draws much, a slow one that draws little, and one between them; any split is possible."""
    base = chain([1] * 8, [0.020, 0.005, 0.010], [9, 9, 9], {(0, 1): 0.002, (0, 2): 0.002, (1, 2): 0.002})
    watts = (2.0, 30.0, 8.0)
    devices = [replace(device, active_watts=w) for device, w in zip(base.devices, watts, strict=True)]
    return replace(base, devices=tuple(devices), pin_first=False)


def test_plans_between_the_ends_that_no_weighted_sum_prefers_are_found(thrifty: Problem) -> None:
    pair = (Objective.LATENCY, Objective.ENERGY)

    front = pareto(thrifty, StepBudget(ENDLESS), pair)

    assert isinstance(front, Front)
    points = figures(front)
    expected = brute(thrifty, pair)
    assert len(points) == len(expected)
    assert all(near(point, expected) for point in points)
    unsupported = [
        point
        for point in points[1:-1]
        if any(
            a[0] < point[0] < b[0] and a[1] + (point[0] - a[0]) / (b[0] - a[0]) * (b[1] - a[1]) < point[1] * (1 - 1e-9)
            for a in points
            for b in points
        )
    ]
    assert unsupported
    assert front.complete
    assert front.covers == "all nondominated plans"


def test_the_knee_is_the_point_farthest_below_the_line_between_the_ends() -> None:
    assert knee([(0, 10), (1, 3), (5, 2), (10, 0)]) == 1
    assert knee([(0, 10), (10, 0)]) is None
    assert knee([(0, 10), (5, 5), (10, 0)]) is None


def test_the_hypervolume_is_the_share_of_the_rectangle_that_points_dominate(thrifty: Problem) -> None:
    front = pareto(thrifty, StepBudget(ENDLESS), (Objective.LATENCY, Objective.ENERGY))
    assert isinstance(front, Front)
    assert front.hypervolume is not None
    (x0, y1), (x1, y0) = figures(front)[0], figures(front)[-1]
    points, grid = figures(front), 100
    inside = sum(
        any(point[0] <= x and point[1] <= y for point in points)
        for x in (x0 + (1.1 * x1 - x0) * (i + 0.5) / grid for i in range(grid))
        for y in (y0 + (1.1 * y1 - y0) * (i + 0.5) / grid for i in range(grid))
    )

    assert front.reference == pytest.approx((1.1 * x1, 1.1 * y1))
    assert front.hypervolume == pytest.approx(inside / grid**2, abs=0.02)


def test_a_large_fleet_gets_real_plans_and_no_claim_to_all(thrifty: Problem) -> None:
    many = _fleet(thrifty, 12)

    front = pareto(many, StepBudget(1_000), (Objective.LATENCY, Objective.ENERGY))

    assert isinstance(front, Front)
    assert not front.complete
    assert len(front.points) > 1
    assert all(plan.lower_bound <= plan.estimate.latency_s for plan in front.points)


def _fleet(problem: Problem, count: int) -> Problem:
    """The same kinds of devices, several of each, with room for two blocks."""
    devices: list[DeviceSpec] = []
    for index in range(count):
        kind = problem.devices[index % len(problem.devices)]
        devices.append(replace(kind, node=NodeId(f"n{index}"), memory_budget_bytes=2))
    pairs = [(a.node, b.node) for a in devices for b in devices if a is not b]
    links = [LinkSpec(source=a, target=b, latency_s=0.002, bytes_per_s=1e9) for a, b in pairs]
    return replace(problem, devices=tuple(devices), links=tuple(links))


def test_joules_and_money_are_weighed_where_somebody_says_what_they_are(thrifty: Problem) -> None:
    silent = replace(thrifty, devices=tuple(replace(device, active_watts=0.0) for device in thrifty.devices))

    assert worth_weighing(silent) == (Objective.LATENCY, Objective.THROUGHPUT)
    assert worth_weighing(thrifty) == (Objective.LATENCY, Objective.THROUGHPUT, Objective.ENERGY)


def test_one_objective_is_no_front(thrifty: Problem) -> None:
    with pytest.raises(InvalidRequestError, match="a front needs two objectives, latency given"):
        pareto(thrifty, StepBudget(1), (Objective.LATENCY,))


def test_limits_that_nothing_keeps_to_leave_no_front(thrifty: Problem) -> None:
    answer = pareto(replace(thrifty, limits=Limits(joules=0.001)), StepBudget(ENDLESS))

    assert isinstance(answer, Infeasible)
    assert "energy of at most 0.001 J is out of reach: the best is 0.32 J" in answer.reason
