"""Laws of the circuit for blocks that repeat: for every small fleet, against exhaustive search."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.plan.arrays import INF
from shoal.plan.budget import StepBudget
from shoal.plan.chain import sweep
from shoal.plan.circuit import CIRCUIT, Scope, circuit, circuit_tokens
from shoal.plan.cost import Span, objective_value, price
from shoal.plan.cpsat import installed
from shoal.plan.exact import enumerate_best, satisfies
from shoal.plan.found import FREE, Choice, Found, mask_of
from shoal.plan.periodic import periodic
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Objective, Pin, Problem, RequestShape
from shoal.plan.search import most_tokens
from shoal.plan.tables import Tables, build_tables, cost_passes, spans_of

pytestmark = pytest.mark.skipif(not installed(), reason="OR-tools is not installed")

LAWS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEVER = 10**9

times = st.integers(0, 40).map(lambda value: value / 1000)
few = st.integers(0, 6)


@st.composite
def repeating(draw: st.DrawFn, *, devices: int = 4, blocks: int = 6, noise: float = 0.0) -> Problem:
    """A first block, units of one to three kinds of blocks, and a last block."""
    period = draw(st.sampled_from([1, 1, 2, 3]))
    units = draw(st.integers(1, max(1, (blocks - 2) // period)))
    kinds = [*(draw(kind()) for _ in range(period))]
    specs = [draw(kind()), *kinds * units, draw(kind())]
    specs = specs[draw(st.integers(0, 1)) : len(specs) - draw(st.integers(0, 1))]
    nodes = [NodeId(name) for name in "abcdef"[: draw(st.integers(2, devices))]]
    closed = draw(st.booleans())
    return Problem(
        blocks=tuple(block for block, _ in specs),
        devices=tuple(draw(device(node, [share for _, share in specs], noise)) for node in nodes),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=draw(times), bytes_per_s=draw(st.sampled_from([50.0, 1e3, 1e6])))
            for a in nodes
            for b in nodes
            if a != b and draw(st.integers(0, 5))
        ),
        shape=RequestShape(tokens_in=3, tokens_out=draw(st.integers(1, 9)), context_tokens=draw(st.sampled_from([0, 18])),
                           slots=4, in_flight=draw(st.sampled_from([1, 4])), retain_outputs=draw(st.booleans())),
        objective=draw(st.sampled_from([Objective.LATENCY, Objective.THROUGHPUT])),
        source=nodes[0],
        pin_first=closed or draw(st.booleans()),
        pin_last=closed and draw(st.booleans()),
        max_stages=draw(st.sampled_from([0, 0, 0, 2, 3])),
        stages_exactly=draw(st.sampled_from([0, 0, 0, 0, 2, 3])),
        require=tuple(node for node in nodes if not draw(st.integers(0, 7))),
    )  # fmt: skip


@st.composite
def kind(draw: st.DrawFn) -> tuple[BlockSpec, int]:
    """A block, and how long it takes on a device of speed 1."""
    block = BlockSpec(
        name="block",
        weights_bytes=40 + 10 * draw(few),
        kv_bytes_per_token=draw(st.integers(0, 1)),
        output_bytes_per_token=4,
        load_peak_bytes=20 * draw(few),
        workspace_bytes=draw(few),
    )
    return block, draw(st.integers(0, 9))


@st.composite
def device(draw: st.DrawFn, node: NodeId, shares: list[int], noise: float) -> DeviceSpec:
    speed = draw(times)
    each = [share * speed * (1 + noise * draw(st.integers(0, 2))) for share in shares]
    return DeviceSpec(
        node=node,
        memory_budget_bytes=draw(st.integers(80, 500) | st.just(5000)),
        fixed_bytes=draw(few),
        step_overhead_s=draw(times),
        decode_s=tuple(each),
        prefill_s=tuple(3 * value for value in each),
    )


def circled(problem: Problem, tables: Tables, choice: Choice = FREE) -> Found:
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    assume(form.exact)
    found = (
        circuit_tokens(tables, passes, form, StepBudget(NEVER), Scope(choice=choice))
        if problem.objective is Objective.THROUGHPUT
        else circuit(tables, passes, form, StepBudget(NEVER), Scope(choice=choice))
    )
    assert found is not None
    return found


def demanded(problem: Problem, tables: Tables) -> Choice:
    return Choice(require=sum(1 << tables.nodes.index(node) for node in problem.require))


def swept(tables: Tables, cap_s: float, choice: Choice) -> Found:
    """What the search over all sets of devices says; it is itself held against every placement there is."""
    finals = [final for search in cost_passes(tables, cap_s) for final in sweep(tables, search, StepBudget(NEVER))]
    cost = min((final.cost for final in finals if choice.admits(final.mask)), default=INF)
    return Found(cost=cost, chain=None, bound=cost, solver="")


@LAWS
@given(repeating())
def test_no_placement_is_better_than_the_circuits_and_none_exists_when_it_finds_none(problem: Problem) -> None:
    tables = build_tables(problem)
    best = enumerate_best(problem)

    found = circled(problem, tables, demanded(problem, tables))

    assert found.solver == CIRCUIT
    if found.chain is None:
        assert best is None
        assert found.bound == INF
        return
    assert best is not None
    spans = found.spans(tables)
    tokens = problem.shape.tokens_out if problem.objective is Objective.THROUGHPUT else 1
    assert satisfies(problem, spans)
    assert found.cost / tokens == pytest.approx(objective_value(problem.objective, price(problem, spans).estimate))
    assert found.cost / tokens == pytest.approx(objective_value(problem.objective, best.estimate), rel=1e-9, abs=1e-12)
    assert found.bound == pytest.approx(found.cost, rel=1e-9, abs=1e-12)


@MANY
@given(repeating(devices=6, blocks=12))
def test_on_fleets_of_six_it_agrees_with_the_search_over_all_sets(problem: Problem) -> None:
    tables = build_tables(problem)
    choice = demanded(problem, tables)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    assume(form.exact)

    found = circuit(tables, passes, form, StepBudget(NEVER), Scope(choice=choice))

    assert found.cost == pytest.approx(swept(tables, INF, choice).cost, rel=1e-9, abs=1e-12)
    assert found.bound <= found.cost
    assert found.bound == pytest.approx(found.cost, rel=1e-9, abs=1e-12)


@LAWS
@given(repeating(blocks=9, noise=0.02), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=1))
def test_where_units_are_only_alike_or_a_middle_block_is_pinned_the_bound_is_true(
    problem: Problem, pins: list[tuple[int, int]]
) -> None:
    pins = [(block, node) for block, node in pins if block < len(problem.blocks) - 1 and node < len(problem.devices)]
    pinned = Problem(**{name: getattr(problem, name) for name in problem.__struct_fields__} | {
        "pins": tuple(Pin(block=block, node=problem.devices[node].node) for block, node in pins)})  # fmt: skip
    tables = build_tables(pinned)
    choice = demanded(pinned, tables)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    if form is None:
        return

    found = circuit(tables, passes, form, StepBudget(NEVER), Scope(choice=choice))

    optimum = swept(tables, INF, choice).cost
    assert found.bound <= optimum * (1 + 1e-9) + 1e-12
    assert found.cost >= optimum * (1 - 1e-9)
    if found.chain:
        assert satisfies(pinned, [Span(*span) for span in _spans(found, tables)])
        assert choice.admits(mask_of(found.chain))


def _spans(found: Found, tables: Tables) -> list[tuple[NodeId, int, int]]:
    assert found.chain is not None
    assert found.via is not None
    return [(span.node, span.start, span.stop) for span in spans_of(tables, found.chain, found.via)]


@LAWS
@given(repeating(devices=5, blocks=9))
def test_one_programme_for_throughput_agrees_with_the_search_over_periods(problem: Problem) -> None:
    tables = build_tables(problem)
    choice = demanded(problem, tables)
    passes = list(cost_passes(tables))
    form = periodic(passes)
    assert form is not None
    assume(form.exact)

    found = circuit_tokens(tables, passes, form, StepBudget(NEVER), Scope(choice=choice))

    def find(cap_s: float) -> Found:
        capped = list(cost_passes(tables, cap_s))
        shape = periodic(capped)
        assert shape is not None
        return circuit(tables, capped, shape, StepBudget(NEVER), Scope(choice=choice))

    assert found is not None
    searched = most_tokens(tables, find, 0.0)
    assert found.cost == pytest.approx(searched.cost, rel=1e-8, abs=1e-12)
    assert found.bound <= found.cost
