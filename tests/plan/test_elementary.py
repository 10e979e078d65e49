"""Label setting and its bounds: equal to exhaustive search, and true however soon it is stopped."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.plan.budget import StepBudget
from shoal.plan.chain import Final, relax, sweep
from shoal.plan.cost import price
from shoal.plan.elementary import elementary
from shoal.plan.exact import enumerate_best, satisfies
from shoal.plan.found import FREE, Choice, Found, mask_of
from shoal.plan.labels import Search, run
from shoal.plan.memory import learnt, path_of, remember
from shoal.plan.moves import cut_best
from shoal.plan.multipliers import Asked, limits_of, priced
from shoal.plan.placement import place
from shoal.plan.problem import Plan, Problem
from shoal.plan.search import best_final
from shoal.plan.tables import Pass, Tables, build_tables, cost_passes

Fleet = Callable[..., Problem]
LAWS = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
PLENTY = 10**9

families = st.sampled_from(["star", "clusters", "mesh"])
demands = st.sampled_from(
    [
        {},
        {},
        {},
        {"pin_last": True},
        {"pin_first": False},
        {"max_stages": 3},
        {"stages_exactly": 3},
        {"stages_exactly": 5},
    ]
)
choices = st.sampled_from([FREE, FREE, Choice(require=4), Choice(require=2, forbid=4), Choice(forbid=1)])


def drawn(fleet: Fleet, data: st.DataObject, most_devices: int) -> Problem:
    devices, blocks = data.draw(st.integers(3, most_devices)), data.draw(st.integers(4, 12))
    tightness = data.draw(st.sampled_from([1.05, 1.2, 1.5, 2.5]))
    demand = data.draw(demands)
    return fleet(data.draw(st.integers(0, 10**6)), devices, blocks, data.draw(families), tightness, **demand)


def best_of_all_sets(tables: Tables, passes: list[Pass], choice: Choice) -> float:
    finals: list[Final] = [final for search in passes for final in sweep(tables, search, StepBudget(PLENTY))]
    winner = best_final(finals, choice)
    return winner.cost if winner else math.inf


def check_found(tables: Tables, passes: list[Pass], choice: Choice, found: Found, optimum: float) -> None:
    """A true certificate: bound <= optimum <= plan, and the plan is what it says."""
    assert found.bound <= optimum * (1 + 1e-9)
    assert found.cost >= optimum * (1 - 1e-9)
    assert (found.chain is None) == math.isinf(found.cost)
    if found.chain:
        assert choice.admits(mask_of(found.chain))


@LAWS
@given(data=st.data(), choice=choices)
def test_it_equals_the_search_over_all_sets_of_devices(fleet: Fleet, data: st.DataObject, choice: Choice) -> None:
    tables = build_tables(drawn(fleet, data, 7))
    passes = list(cost_passes(tables))
    optimum = best_of_all_sets(tables, passes, choice)

    found = elementary(tables, passes, StepBudget(PLENTY), choice)

    check_found(tables, passes, choice, found, optimum)
    assert found.cost == pytest.approx(optimum)
    assert found.bound == found.cost


@LAWS
@given(data=st.data())
def test_it_equals_exhaustive_search(fleet: Fleet, data: st.DataObject) -> None:
    problem = drawn(fleet, data, 4)
    best = enumerate_best(problem)
    tables = build_tables(problem)

    found = elementary(tables, list(cost_passes(tables)), StepBudget(PLENTY), FREE)

    assert (found.chain is None) == (best is None)
    if best:
        spans = found.spans(tables)
        assert satisfies(problem, spans)
        assert found.cost == pytest.approx(best.estimate.latency_s)
        assert price(problem, spans).estimate.latency_s == pytest.approx(best.estimate.latency_s)


@LAWS
@given(data=st.data(), choice=choices, steps=st.integers(0, 120))
def test_stopped_at_any_step_its_certificate_is_true(
    fleet: Fleet, data: st.DataObject, choice: Choice, steps: int
) -> None:
    tables = build_tables(drawn(fleet, data, 7))
    passes = list(cost_passes(tables))
    optimum = best_of_all_sets(tables, passes, choice)

    found = elementary(tables, passes, StepBudget(steps), choice)

    check_found(tables, passes, choice, found, optimum)


@LAWS
@given(data=st.data(), steps=st.integers(0, 40))
def test_it_is_never_worse_than_the_plan_that_it_starts_from(fleet: Fleet, data: st.DataObject, steps: int) -> None:
    tables = build_tables(drawn(fleet, data, 7))
    passes = list(cost_passes(tables))
    start = elementary(tables, passes, StepBudget(10), FREE)
    assume(start.chain is not None)

    found = elementary(tables, passes, StepBudget(steps), FREE, hint=start)

    assert found.cost <= start.cost
    assert found.bound <= found.cost


@LAWS
@given(data=st.data())
def test_a_relaxation_that_remembers_more_is_never_lower_and_never_above_the_optimum(
    fleet: Fleet, data: st.DataObject
) -> None:
    tables = build_tables(drawn(fleet, data, 6))
    passes = list(cost_passes(tables))
    for search in passes:
        optimum = best_of_all_sets(tables, [search], FREE)
        neighbours: tuple[tuple[int, ...], ...] = ((),) * len(tables.nodes)
        bound = relax(tables, search).bound
        assert remember(search, neighbours).bound == pytest.approx(bound)
        while (path := path_of(search, remember(search, neighbours))) is not None:
            known = learnt(neighbours, path, len(tables.nodes))
            if known == neighbours:
                break
            neighbours = known
            raised = remember(search, neighbours).bound
            assert raised >= bound * (1 - 1e-12)
            bound = raised
        assert bound <= optimum * (1 + 1e-9)
        if not tables.stages_exactly and tables.max_stages > len(tables.nodes):
            assert bound == pytest.approx(optimum)


@LAWS
@given(data=st.data(), choice=choices, width=st.sampled_from([1, 2, 5, 20, PLENTY]))
def test_labels_are_a_beam_with_a_true_bound_and_exact_when_none_is_dropped(
    fleet: Fleet, data: st.DataObject, choice: Choice, width: int
) -> None:
    """Under any prices, also where nothing is remembered and no plan is known."""
    problem = drawn(fleet, data, 7)
    tables = build_tables(problem)
    for search in cost_passes(tables):
        free = Choice(require=choice.require)
        optimum = best_of_all_sets(tables, [search], free)
        limits = limits_of(tables, search, free)
        some = st.lists(st.floats(0, 0.1), min_size=len(tables.nodes) + 1, max_size=len(tables.nodes) + 1)
        paid = priced(
            Asked(tables=tables, search=search, limits=limits),
            limits.clip(np.array(data.draw(some))),
            ((),) * len(tables.nodes),
        )
        table = remember(paid.search, paid.neighbours)
        labels = Search(
            asked=Asked(tables=tables, search=search, limits=limits), priced=paid, table=table, best_cost=math.inf
        )

        run(labels, width, StepBudget(PLENTY))

        assert min(labels.dropped, labels.best_cost) <= optimum * (1 + 1e-9)
        assert labels.best_cost >= optimum * (1 - 1e-9)
        assert (labels.order is None) == math.isinf(labels.best_cost)
        if labels.order:
            assert cut_best(search, labels.order)[0] <= labels.best_cost * (1 + 1e-9)
        if width == PLENTY:
            assert labels.best_cost == pytest.approx(optimum)


def test_a_cheap_beginning_that_used_the_device_for_the_end_drops_no_other(chain: Callable[..., Problem]) -> None:
    """The last block fits on device 1 alone, and 1 is the quickest for the second block too: 0, 1, 2 is cheap and stuck."""
    tables = build_tables(chain([1, 1, 1, 3], [1, 1, 9], [1, 3, 2], {(0, 1): 1, (0, 2): 1, (1, 2): 1}))
    (search,) = cost_passes(tables)
    asked = Asked(tables=tables, search=search, limits=limits_of(tables, search, FREE))
    free = priced(asked, np.zeros(4), ((),) * 3)
    labels = Search(asked=asked, priced=free, table=remember(free.search, free.neighbours), best_cost=math.inf)

    run(labels, PLENTY, StepBudget(PLENTY))

    assert labels.order == (0, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "times", "memory", "links", "cost"),
    [
        ([2, 1, 2, 2], [7, 6, 9], [2, 4, 1], {(0, 1): 5, (0, 2): 2, (1, 2): 2}, 51 + 5),
        ([1, 1, 1, 1], [2, 1, 9], [2, 2, 4], {(0, 1): 5, (0, 2): 5, (1, 2): 3}, 11 + 5),
    ],
    ids=["a layer-wise search dead-ends", "a layer-wise search is 45 % worse"],
)
def test_memory_that_a_layer_wise_search_forgets_is_kept(
    chain: Callable[..., Problem],
    sizes: list[int],
    times: list[float],
    memory: list[int],
    links: dict[tuple[int, int], float],
    cost: float,
) -> None:
    tables = build_tables(chain(sizes, times, memory, links))

    found = elementary(tables, list(cost_passes(tables)), StepBudget(PLENTY), FREE)

    assert (found.cost, found.bound) == (pytest.approx(cost), pytest.approx(cost))


@pytest.mark.parametrize("family", ["star", "clusters", "mesh"])
@pytest.mark.parametrize(("blocks", "tightness"), [(18, 2.0), (40, 1.3), (40, 2.5)])
def test_fourteen_devices_with_unequal_blocks_are_proven(
    fleet: Fleet, family: str, blocks: int, tightness: float
) -> None:
    """Of 18 blocks many devices hold one or two: close to a salesman's tour."""
    answer = place(fleet(3, 14, blocks, family, tightness), StepBudget(PLENTY))

    assert isinstance(answer, Plan)
    assert answer.gap == 0


def test_near_twins_are_told_apart(fleet: Fleet) -> None:
    """Devices that differ by one part in a thousand leave nothing to symmetry."""
    problem = fleet(5, 10, 20, "star", 1.4)
    twin = problem.devices[1]
    alike = tuple(
        replace(twin, node=device.node, decode_s=tuple(t * (1 + index / 1000) for t in twin.decode_s))
        for index, device in enumerate(problem.devices)
    )
    tables = build_tables(replace(problem, devices=alike))
    passes = list(cost_passes(tables))

    found = elementary(tables, passes, StepBudget(PLENTY), FREE)

    assert found.cost == pytest.approx(best_of_all_sets(tables, passes, FREE))


def test_what_cannot_fit_is_proven_not_to(fleet: Fleet) -> None:
    """All memory together is enough, but blocks do not divide."""
    tables = build_tables(fleet(7, 8, 9, "mesh", 1.0))
    passes = list(cost_passes(tables))
    assert best_of_all_sets(tables, passes, FREE) == math.inf

    found = elementary(tables, passes, StepBudget(PLENTY), FREE)

    assert found.chain is None
    assert found.bound == math.inf
