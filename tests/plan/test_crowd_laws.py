"""Laws of the bounds by site and of the chains near them: no OR-tools needed, and exact in the end."""

import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.plan.fleets import Family, fleet
from tests.plan.test_star_laws import fleets, optimum

from shoal.plan.arrays import INF
from shoal.plan.budget import StepBudget
from shoal.plan.circuit import circuit_tokens
from shoal.plan.cpsat import installed
from shoal.plan.crowd import crowd
from shoal.plan.found import FREE, Choice
from shoal.plan.lineup import lineup
from shoal.plan.periodic import periodic
from shoal.plan.placement import place
from shoal.plan.problem import Objective, Plan, Problem
from shoal.plan.search import crowd_tokens, demanded
from shoal.plan.sites import dealings, sites_of
from shoal.plan.star import applies
from shoal.plan.tables import build_tables, cost_passes
from shoal.plan.throng import Throng, throng
from shoal.plan.visits import forced, relaxed
from shoal.plan.walks import walk

LAWS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEVER = 10**9
ROUNDED = 1 + 1e-9


@st.composite
def limited(draw: st.DrawFn) -> Problem:
    """With links that are missing, devices that must take part, and limits of stages, now and then."""
    problem = draw(fleets(star=draw(st.booleans())))
    nodes = [device.node for device in problem.devices]
    return replace(
        problem,
        links=tuple(link for link in problem.links if draw(st.integers(0, 6))),
        require=tuple(node for node in nodes if not draw(st.integers(0, 5))),
        max_stages=draw(st.sampled_from([0, 0, 3])),
        stages_exactly=draw(st.sampled_from([0, 0, 0, 3])),
    )


@LAWS
@given(
    limited(), st.lists(st.integers(0, 5), min_size=6, max_size=6), st.lists(st.integers(0, 90), min_size=7, max_size=7)
)
def test_no_chain_costs_less_than_the_visits_to_any_sites_at_any_prices(
    problem: Problem, dealt: list[int], paid: list[int]
) -> None:
    tables = build_tables(problem)
    form, choice = periodic(list(cost_passes(tables))), demanded(problem, tables)
    assert form is not None
    assume(applies(form))
    line = lineup(tables, form, choice)
    count = line.devices.size
    prices = np.array([*paid[:count], paid[-1]]) / 1000

    visits = relaxed(line, sites_of(line, np.array(dealt[:count])), prices)

    assert visits.bound <= optimum(tables, choice, alone=False) * ROUNDED
    for place_, least in enumerate(forced(visits)):
        both = Choice(require=choice.require | 1 << int(line.devices[place_]))
        assert least <= optimum(tables, both, alone=False) * ROUNDED
    for width in (1, 4, NEVER):
        found = walk(visits, width, INF, StepBudget(NEVER))
        assert found.least <= optimum(tables, choice, alone=False) * ROUNDED
        assert found.cost >= optimum(tables, choice, alone=False) / ROUNDED
    assert found.cost == pytest.approx(optimum(tables, choice, alone=False), rel=1e-9)


@LAWS
@given(limited(), st.integers(0, 60))
def test_a_throngs_chain_is_the_optimum_and_its_bound_true_whenever_time_is_up(problem: Problem, steps: int) -> None:
    tables = build_tables(problem)
    form, choice = periodic(list(cost_passes(tables))), demanded(problem, tables)
    assert form is not None
    assume(applies(form))
    best = optimum(tables, choice, alone=False)
    done, cut = (Throng(line=lineup(tables, form, choice)) for _ in range(2))

    throng(done, StepBudget(NEVER))
    throng(cut, StepBudget(steps))

    assert done.cost == pytest.approx(best, rel=1e-9)
    assert done.proven
    assert cut.bound <= best * ROUNDED
    assert cut.cost >= best / ROUNDED


@LAWS
@given(limited())
def test_without_or_tools_a_crowd_is_as_good(problem: Problem) -> None:
    tables = build_tables(problem)
    passes = list(cost_passes(tables))
    form, choice = periodic(passes), demanded(problem, tables)
    assert form is not None
    assume(applies(form))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ortools", None)
        found = crowd(tables, passes, form, StepBudget(NEVER), choice)

    assert found is not None
    assert found.cost == pytest.approx(optimum(tables, choice), rel=1e-9)
    assert found.bound == pytest.approx(found.cost, rel=1e-9)


@pytest.mark.skipif(not installed(), reason="OR-tools is not installed")
@pytest.mark.parametrize("links", ["star", "mesh", "sites"])
@pytest.mark.parametrize("in_flight", [1, 3, 16])
def test_throughput_by_halves_is_that_of_the_circuit(
    links: str, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Family(devices=12, layers=8, links=links, tight=2.0, objective=Objective.THROUGHPUT, in_flight=in_flight)
    tables = build_tables(fleet(family, in_flight))
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    direct = circuit_tokens(tables, passes, form, StepBudget(NEVER))
    monkeypatch.setitem(sys.modules, "ortools", None)

    found = crowd_tokens(tables, StepBudget(NEVER), FREE, 0.0)

    assert direct is not None
    assert found.cost == pytest.approx(direct.cost, rel=1e-6)
    assert found.bound == pytest.approx(found.cost, rel=1e-9)
    assert crowd_tokens(tables, StepBudget(30), FREE, 0.0).bound <= direct.cost * ROUNDED


def test_sites_are_told_from_the_cost_of_links() -> None:
    problem = fleet(Family(devices=80, layers=40, links="sites", tight=4.0), 1)
    tables = build_tables(problem)
    form = periodic(list(cost_passes(tables)))
    assert form is not None
    line = lineup(tables, form, FREE)

    assert 6 in {len(set(of.tolist())) for of in dealings(line)}


@pytest.mark.parametrize(("links", "most"), [("star", 0.02), ("mesh", 0.02), ("sites", 0.12)])
def test_eighty_devices_have_a_small_gap_without_or_tools(
    links: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By steps, not seconds: the same on every machine."""
    monkeypatch.setitem(sys.modules, "ortools", None)

    plan = place(fleet(Family(devices=80, layers=60, links=links, tight=8.0), 2), StepBudget(250))

    assert isinstance(plan, Plan)
    assert plan.gap <= most
