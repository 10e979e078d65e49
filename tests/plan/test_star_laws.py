"""Laws of the polynomial solvers: exact on stars, and true bounds everywhere."""

import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.plan.arrays import INF
from shoal.plan.budget import StepBudget
from shoal.plan.chain import sweep
from shoal.plan.circuit import Scope, circuit, circuit_tokens, load_of
from shoal.plan.cpsat import installed
from shoal.plan.crowd import STAR, crowd
from shoal.plan.found import FREE, Choice
from shoal.plan.periodic import periodic
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Objective, Problem, RequestShape
from shoal.plan.star import applies, fill, period_bound_s, prices
from shoal.plan.tables import Tables, build_tables, cost_passes

pytestmark = pytest.mark.skipif(not installed(), reason="OR-tools is not installed")

LAWS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEVER = 10**9

times = st.integers(1, 40).map(lambda value: value / 1000)


@st.composite
def fleets(draw: st.DrawFn, *, star: bool, wires: bool = False) -> Problem:
    """Identical layers; on a star a link takes what its ends take, or with *wires* its bandwidth is that of the slower end."""
    nodes = [NodeId(name) for name in "abcdef"[: draw(st.integers(2, 6))]]
    layers = draw(st.integers(2, 10))
    up = {node: draw(times) for node in nodes}
    down = {node: draw(times) for node in nodes}
    rate = {node: draw(st.sampled_from([100.0, 200.0, 1000.0])) for node in nodes}
    head = not wires and draw(st.booleans())

    def latency_s(a: NodeId, b: NodeId) -> float:
        return 0.0 if wires else up[a] + down[b] if star else draw(times)

    return Problem(
        blocks=tuple(
            BlockSpec(name="block", weights_bytes=10, output_bytes_per_token=8) for _ in range(layers + 2 * head)
        ),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=10 * draw(st.integers(1, 8)),
                step_overhead_s=0.0 if wires else draw(times),
                decode_s=(speed := draw(times),) * (layers + 2 * head),
                prefill_s=(speed,) * (layers + 2 * head),
            )
            for node in nodes
        ),
        links=tuple(
            LinkSpec(
                source=a, target=b, latency_s=latency_s(a, b), bytes_per_s=min(rate[a], rate[b]) if wires else 1e12
            )
            for a in nodes
            for b in nodes
            if a != b
        ),
        shape=RequestShape(tokens_in=1, tokens_out=4, context_tokens=0, slots=10**5, in_flight=10**5 if wires else 1),
        objective=Objective.THROUGHPUT if wires else Objective.LATENCY,
        source=nodes[0],
    )


def optimum(tables: Tables, choice: Choice = FREE, *, alone: bool = True) -> float:
    finals = [final for search in cost_passes(tables) for final in sweep(tables, search, StepBudget(NEVER))]
    return min(
        (final.cost for final in finals if choice.admits(final.mask) and (alone or final.stages > 1)), default=INF
    )


@LAWS
@given(fleets(star=True))
def test_on_a_star_the_knapsack_alone_is_the_optimum(problem: Problem) -> None:
    tables = build_tables(problem)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    assume(applies(form))
    devices = list(range(1, len(tables.nodes)))

    charged = prices(form, devices)
    filled = fill(form, charged, devices, FREE)

    assert charged.exact
    assert filled.bound == pytest.approx(optimum(tables, alone=False), rel=1e-9)
    found = crowd(tables, passes, form, StepBudget(NEVER), FREE)
    assert found is not None
    assert found.cost == pytest.approx(optimum(tables), rel=1e-9)
    assert found.bound == pytest.approx(found.cost, rel=1e-9)
    assert found.solver == STAR or math.isinf(found.cost) or len(found.chain or ()) == 1


@LAWS
@given(fleets(star=False), st.integers(0, 63))
def test_elsewhere_no_chain_costs_less_than_the_knapsack_with_all_or_with_one_device(
    problem: Problem, wanted: int
) -> None:
    tables = build_tables(problem)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    assume(applies(form))
    devices = list(range(1, len(tables.nodes)))
    choice = Choice(require=wanted & ((1 << len(tables.nodes)) - 1))

    filled = fill(form, prices(form, devices), devices, choice)
    found = crowd(tables, passes, form, StepBudget(NEVER), choice)

    assert filled.bound <= optimum(tables, choice, alone=False) * (1 + 1e-9)
    for device in devices:
        both = Choice(require=choice.require | 1 << device)
        assert filled.forced[device] <= optimum(tables, both, alone=False) * (1 + 1e-9)
    assert found is not None
    assert found.cost == pytest.approx(optimum(tables, choice), rel=1e-9)
    assert found.bound == pytest.approx(found.cost, rel=1e-9)


@LAWS
@given(fleets(star=True, wires=True))
def test_on_a_star_of_wires_the_reachable_room_tells_the_best_period(problem: Problem) -> None:
    tables = build_tables(problem)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    load = load_of(tables, passes, form)
    assert load is not None
    assert form.rhythm.first == form.rhythm.last == 0

    found = circuit_tokens(tables, passes, form, StepBudget(NEVER))

    assert found is not None
    bound_s = period_bound_s(load.busy)
    assert bound_s <= found.cost * (1 + 1e-9)
    if found.chain and found.cost > circuit(tables, passes, form, StepBudget(NEVER)).cost / tables.in_flight * 1.001:
        assert bound_s == pytest.approx(found.cost, rel=1e-6)


@LAWS
@given(fleets(star=False))
def test_no_chain_has_a_shorter_period_than_the_reachable_room_allows(problem: Problem) -> None:
    tables = build_tables(problem)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    load = load_of(tables, passes, form)
    assert load is not None

    found = circuit_tokens(tables, passes, form, StepBudget(NEVER), Scope())

    assert found is not None
    assert period_bound_s(load.busy) <= found.cost * (1 + 1e-9)
