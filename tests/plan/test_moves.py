"""Local moves: never worse, always a plan, and as good as exhaustive search where one move is enough."""

from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.plan.beam import beam
from shoal.plan.budget import StepBudget
from shoal.plan.chain import relax
from shoal.plan.cost import price
from shoal.plan.exact import satisfies
from shoal.plan.found import FREE, Choice, mask_of
from shoal.plan.moves import Rules, chain_cost, cut_best, improve
from shoal.plan.problem import Problem
from shoal.plan.tables import Pass, Tables, build_tables, cost_passes, spans_of

Fleet = Callable[..., Problem]
LAWS = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

families = st.sampled_from(["star", "clusters", "mesh"])


def only_pass(problem: Problem) -> tuple[Tables, Pass]:
    tables = build_tables(problem)
    (search,) = cost_passes(tables)
    return tables, search


@LAWS
@given(data=st.data(), seed=st.integers(0, 10**6), family=families)
def test_moves_never_worsen_a_plan_and_keep_every_rule(
    fleet: Fleet, data: st.DataObject, seed: int, family: str
) -> None:
    rules = data.draw(st.sampled_from([{}, {}, {"max_stages": 4}, {"stages_exactly": 4}, {"pin_last": True}]))
    tightness = data.draw(st.sampled_from([1.2, 1.5, 2.5]))
    problem = fleet(seed, data.draw(st.integers(4, 9)), data.draw(st.integers(6, 16)), family, tightness, **rules)
    tables = build_tables(problem)
    for search in cost_passes(tables):
        start = beam(tables, search, relax(tables, search), StepBudget(0))
        if start is None:
            continue
        used = mask_of(start[1])
        choice = data.draw(st.sampled_from([FREE, Choice(require=used & -used), Choice(require=used & ~1)]))

        cost, chain = improve(Rules(tables=tables, search=search, choice=choice), start[1], StepBudget(10**6))

        assert cost <= start[0] * (1 + 1e-9)
        assert choice.admits(mask_of(chain))
        spans = spans_of(tables, chain, search.via)
        assert satisfies(problem, spans)
        assert price(problem, spans).estimate.latency_s == pytest.approx(cost)
        assert chain_cost(search, chain) == pytest.approx(cost)


@pytest.mark.parametrize(
    "worse",
    [
        ((0, 0, 2), (3, 2, 6)),
        ((0, 0, 2), (1, 2, 4), (2, 4, 6)),
        ((0, 0, 2), (3, 2, 3), (2, 3, 6)),
        ((0, 0, 2), (1, 2, 3), (3, 3, 4), (2, 4, 6)),
    ],
    ids=["a slow device in place of two", "boundaries shifted", "a slow device in place of one", "a device too many"],
)
def test_what_one_or_two_moves_mend_is_mended(
    chain: Callable[..., Problem], worse: tuple[tuple[int, int, int], ...]
) -> None:
    """Two blocks on 0, one on 1 and three on 2 are best: 3 is slow."""
    links = {(0, 1): 1, (1, 2): 1, (0, 2): 3, (0, 3): 2, (1, 3): 2, (2, 3): 2}
    tables, search = only_pass(chain([1] * 6, [2, 2, 1, 7], [2, 3, 3, 4], links))

    cost, best = improve(Rules(tables=tables, search=search, choice=FREE), worse, StepBudget(10**6))

    assert cost < chain_cost(search, worse)
    assert cost == pytest.approx(4 + 2 + 3 + 1 + 1 + 3)
    assert chain_cost(search, best) == pytest.approx(cost)


def test_a_detour_is_untied_by_reversing_it(chain: Callable[..., Problem]) -> None:
    """Devices on a ring of quick links, one block each."""
    ring = {(a, b): 1 if b - a in {1, 4} else 9 for a, b in combinations(range(5), 2)}
    tables, search = only_pass(chain([1] * 5, [1] * 5, [1] * 5, ring))
    detour = ((0, 0, 1), (3, 1, 2), (2, 2, 3), (1, 3, 4), (4, 4, 5))

    cost, best = improve(Rules(tables=tables, search=search, choice=FREE), detour, StepBudget(10**6))

    assert [device for device, _, _ in best] == [0, 1, 2, 3, 4]
    assert cost == pytest.approx(5 + 5)


def test_the_best_cuts_of_an_order_that_does_not_fit_are_none(chain: Callable[..., Problem]) -> None:
    _, search = only_pass(chain([1] * 6, [1, 1], [2, 2], {(0, 1): 1}))

    assert cut_best(search, (0, 1)) == (float("inf"), ())


def test_without_a_budget_the_plan_stays_in_its_order_with_its_best_cuts(chain: Callable[..., Problem]) -> None:
    tables, search = only_pass(chain([1] * 4, [5, 1], [3, 3], {(0, 1): 1}))

    _, best = improve(Rules(tables=tables, search=search, choice=FREE), ((0, 0, 3), (1, 3, 4)), StepBudget(0))

    assert best == ((0, 0, 1), (1, 1, 4))
