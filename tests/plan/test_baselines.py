"""Named baselines: plans that keep every constraint, the faults that their papers have, and never better than the best."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.baselines import (
    BASELINES,
    best_pair,
    best_single,
    edgeshard_latency,
    edgeshard_throughput,
    even_split,
    memory_ring,
    pipeedge,
    speed_greedy,
    worth,
)
from shoal.plan.budget import StepBudget
from shoal.plan.cost import Span, bottleneck_s, price
from shoal.plan.exact import enumerate_best, placements, satisfies
from shoal.plan.layerwise import layer_by_layer
from shoal.plan.placement import place
from shoal.plan.problem import (
    BlockSpec,
    DeviceSpec,
    LinkSpec,
    Objective,
    Pin,
    Plan,
    Problem,
    RequestShape,
    Residency,
)
from shoal.plan.tables import Weights, build_tables, spans_of

Chain = Callable[..., Problem]
LAWS = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])

times = st.integers(1, 40).map(lambda value: value / 1000)
small = st.integers(0, 6)


@st.composite
def problems(draw: st.DrawFn, objectives: tuple[Objective, ...] = tuple(Objective)) -> Problem:
    """Two to four devices in any order, the source somewhere among them; tight and loose memory; links that may be missing."""
    blocks = draw(st.integers(2, 5))
    nodes = [NodeId(name) for name in "abcd"[: draw(st.sampled_from([2, 3, 3, 4]))]]
    source = draw(st.sampled_from(nodes))
    pins = draw(st.sampled_from([(), (), (), (Pin(block=blocks // 2, node=nodes[-1]),)])) if blocks > 2 else ()
    pin_first = draw(st.booleans())
    return Problem(
        blocks=tuple(
            BlockSpec(
                name=f"block {index}",
                weights_bytes=40 + 10 * draw(small),
                kv_bytes_per_token=draw(st.integers(0, 1)),
                output_bytes_per_token=draw(small),
            )
            for index in range(blocks)
        ),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=draw(st.integers(60, 500)),
                fixed_bytes=draw(small),
                step_overhead_s=draw(times),
                decode_s=draw(st.tuples(*[times] * blocks)),
                prefill_s=draw(st.tuples(*[times] * blocks)),
                active_watts=float(draw(small)),
                price_per_hour=float(draw(small)),
                joules_limit=draw(st.sampled_from([None, None, 0.5])),
                region=draw(st.sampled_from(["home", "home", "far"])),
            )
            for node in nodes
        ),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=draw(times), bytes_per_s=draw(st.sampled_from([50.0, 1e3, 1e6])))
            for a in nodes
            for b in nodes
            if a != b and draw(small)
        ),
        shape=RequestShape(
            tokens_in=draw(st.integers(1, 6)),
            tokens_out=draw(st.integers(1, 6)),
            context_tokens=draw(st.sampled_from([0, 16])),
            slots=4,
            in_flight=draw(st.sampled_from([1, 1, 2, 4])),
            prefill_chunk_tokens=draw(st.sampled_from([2, 8])),
        ),
        objective=draw(st.sampled_from(objectives)),
        source=source,
        pin_first=pin_first,
        pin_last=draw(st.sampled_from([False, False, True])),
        pins=pins,
        max_stages=draw(st.sampled_from([0, 0, 0, 2])),
        require=draw(st.sampled_from([(), (), (source,)])),
        residency=Residency(regions=draw(st.sampled_from([(), (), ("home",)]))),
        relay=draw(st.sampled_from([False, False, False, True])),
    )


@pytest.mark.parametrize("name", BASELINES)
@settings(LAWS, max_examples=40)
@given(problem=problems())
def test_a_baseline_keeps_every_constraint_and_is_never_better_than_the_best(name: str, problem: Problem) -> None:
    spans = BASELINES[name](problem)
    if spans is None:
        return

    assert satisfies(problem, spans)
    value, best = worth(problem, spans), enumerate_best(problem)
    assert best is not None
    answer = place(problem, StepBudget(10**9))
    assert isinstance(answer, Plan)
    assert value >= answer.lower_bound * (1 - 1e-9)
    if answer.gap < 1e-9:
        assert value >= worth(problem, [Span(s.node, s.start, s.stop) for s in answer.stages]) * (1 - 1e-9)


def _valid(problem: Problem) -> Iterator[tuple[Span, ...]]:
    """All chains without relays that keep every constraint."""
    for spans in placements(replace(problem, relay=False)):
        if worth(problem, spans) < float("inf"):
            yield spans


def _busiest_s(problem: Problem, spans: tuple[Span, ...]) -> float:
    wires = {(link.source, link.target): link for link in problem.links}
    laps = problem.shape.tokens_out - 1
    return bottleneck_s(problem, wires, price(problem, spans).stages, (problem.shape.batch, laps))


@LAWS
@given(problems((Objective.THROUGHPUT,)))
def test_edgeshard_and_pipeedge_find_the_least_bottleneck_and_the_shortest_lap_of_those(problem: Problem) -> None:
    """Required devices are no part of their formulation, and unlike devices are classes of their own."""
    problem = replace(problem, require=())
    busiest = {spans: _busiest_s(problem, spans) for spans in _valid(problem)}
    least_s = min(busiest.values(), default=0.0)

    for baseline in (edgeshard_throughput, pipeedge):
        spans = baseline(problem)

        assert (spans is None) == (not busiest)
        if spans is not None:
            assert _busiest_s(problem, spans) == pytest.approx(least_s)
            ties = [price(problem, s).estimate for s, busy_s in busiest.items() if busy_s <= least_s * (1 + 1e-12)]
            shortest_s = min(e.latency_s for e in ties)
            assert price(problem, spans).estimate.latency_s <= shortest_s * (1 + 1e-9) or _chunks_overlap(problem)


def _chunks_overlap(problem: Problem) -> bool:
    """A prompt's price is then no sum over stages, and laps are compared by a bound of it."""
    return problem.shape.in_flight > 1 and problem.shape.tokens_in > problem.shape.prefill_chunk_tokens


@LAWS
@given(problems())
def test_the_best_pair_and_the_best_single_device_are_the_best(problem: Problem) -> None:
    by_devices: dict[int, list[float]] = {1: [], 2: []}
    for spans in _valid(problem):
        by_devices.setdefault(len({span.node for span in spans}), []).append(worth(problem, spans))

    for baseline, devices in ((best_single, 1), (best_pair, 2)):
        spans = baseline(problem)

        assert (spans is None) == (not by_devices[devices])
        if spans is not None:
            assert worth(problem, spans) == pytest.approx(min(by_devices[devices]))


def test_the_best_pair_for_many_streams_balances_its_devices(chain: Chain) -> None:
    """One request is quickest with four blocks on the fast device; four streams are, where both take equally long."""
    problem = chain([1] * 5, [1, 1.5], [4, 9], {(0, 1): 0.01}, objective=Objective.THROUGHPUT)

    assert homes(best_pair(replace(problem, objective=Objective.LATENCY))) == "00001"
    assert homes(best_pair(replace(problem, shape=replace(problem.shape, slots=4, in_flight=4)))) == "00011"


def test_the_best_pair_for_a_prompt_in_chunks_balances_its_devices_too(chain: Chain) -> None:
    """Chunks follow each other: the slower stage counts, which the sum that pairs are ranked by does not see."""
    problem = chain([1] * 5, [1, 1.5], [4, 9], {(0, 1): 0.01})
    chunked = replace(problem.shape, tokens_in=4, prefill_chunk_tokens=1, slots=4, in_flight=4)

    assert homes(best_pair(replace(problem, shape=chunked))) == "00011"


@LAWS
@given(problems((Objective.LATENCY,)))
def test_edgeshards_latency_search_is_exact_where_no_memory_binds_and_nobody_is_wanted_twice(problem: Problem) -> None:
    free = replace(
        problem,
        devices=tuple(replace(d, memory_budget_bytes=10**9, joules_limit=None) for d in problem.devices),
        pins=(),
        require=(),
        max_stages=0,
        pin_last=False,
        relay=False,
    )
    best, spans = enumerate_best(free), edgeshard_latency(free)
    tables = build_tables(free) if best else None
    raw = layer_by_layer(tables, Weights(), np.ones(len(tables.nodes), bool)) if tables else None
    if raw is None or len({device for device, _, _ in raw}) < len(raw) or _chunks_overlap(free):
        return

    assert best is not None
    assert spans is not None
    assert worth(free, spans) == pytest.approx(best.estimate.latency_s)


def homes(spans: tuple[Span, ...] | None) -> str:
    return "".join(span.node[1] * (span.stop - span.start) for span in spans or ())


def test_edgeshard_dead_ends_where_the_cheap_beginning_takes_the_memory_that_the_tail_needs(chain: Chain) -> None:
    """Sizes 2, 1, 2, 2: by way of device 1 layer 1 costs as much as by way of 2, and fills what layers 2 and 3 need."""
    problem = chain([2, 1, 2, 2], [7, 6, 9], [2, 4, 1], {(0, 1): 5, (0, 2): 2, (1, 2): 2})

    assert edgeshard_latency(problem) is None
    answer = place(problem, StepBudget(10**9))
    assert isinstance(answer, Plan)
    assert answer.estimate.latency_s == pytest.approx(51 + 5)


def test_edgeshard_takes_16_where_11_would_do_and_comes_back_to_a_device_to_do_so(chain: Chain) -> None:
    """Without the way home of the answer, which the paper does not count.  Held to one shard per device it fares worse."""
    problem = chain([1, 1, 1, 1], [2, 1, 9], [2, 2, 4], {(0, 1): 5, (0, 2): 5, (1, 2): 3})
    tables = build_tables(problem)

    raw = layer_by_layer(tables, Weights(), np.ones(3, bool))

    assert raw is not None
    spans = spans_of(tables, raw, np.full((3, 3, 5), -1))
    assert homes(spans) == "0110"
    assert price(problem, spans).estimate.latency_s == pytest.approx(16)
    best = enumerate_best(problem)
    assert best is not None
    assert sum(s.prefill_s for s in best.stages) + best.stages[0].send_prefill_s == pytest.approx(11)
    kept = edgeshard_latency(problem)
    assert kept is not None
    assert price(problem, kept).estimate.latency_s > best.estimate.latency_s


def test_the_path_that_comes_back_counts_what_it_holds_there_already(chain: Chain) -> None:
    """As above with room for one block on device 0: coming back would overfill it."""
    tables = build_tables(chain([1, 1, 1, 1], [2, 1, 9], [1, 2, 4], {(0, 1): 5, (0, 2): 5, (1, 2): 3}))

    raw = layer_by_layer(tables, Weights(), np.ones(3, bool))

    assert raw is not None
    assert homes(spans_of(tables, raw, np.full((3, 3, 5), -1))) == "0112"


def test_of_equal_bottlenecks_the_shortest_lap_is_taken(chain: Chain) -> None:
    """The first block alone keeps the source busy for 10 s, whoever runs the others."""
    problem = chain([10, 1, 1], [1, 2, 1.5], [10, 9, 9], {(0, 1): 0.1, (0, 2): 0.1, (1, 2): 0.1})

    assert homes(edgeshard_throughput(problem)) == homes(pipeedge(problem)) == "022"


def test_a_source_with_both_ends_is_busy_for_both(chain: Chain) -> None:
    """2 s per block at the source, 3 s at the other: 4 and 3 blocks keep them busy for 8 and 9 s, 5 and 2 for 10 and 6 s."""
    spans = edgeshard_throughput(chain([1] * 7, [2, 3], [9, 9], {(0, 1): 0.1}, pin_last=True))

    assert sorted(homes(spans)) == sorted("0000111")


def test_edgeshard_may_come_back_to_the_source_where_the_last_block_belongs_there(chain: Chain) -> None:
    problem = chain([1] * 4, [9, 1], [2, 4], {(0, 1): 0.1}, pin_last=True)

    assert homes(edgeshard_latency(problem)) == "0110"


def test_an_even_split_gives_every_device_as_many_blocks_in_the_order_of_the_problem(chain: Chain) -> None:
    links = {(0, 1): 1, (0, 2): 1, (1, 2): 1}

    assert homes(even_split(chain([1] * 7, [1, 1, 1], [9, 9, 9], links))) == "0001122"
    assert homes(even_split(chain([1] * 6, [1, 1, 1], [9, 9, 1], links)))[-1] == "2"
    assert homes(even_split(chain([1] * 7, [1, 1, 1], [9, 1, 9], links))) in {"0001222", "0000122"}


def test_the_ring_shares_blocks_by_memory_with_the_source_in_front(chain: Chain) -> None:
    links = {(0, 1): 1, (0, 2): 1, (1, 2): 1}

    assert homes(memory_ring(chain([1] * 8, [1, 1, 1], [4, 4, 8], links))) == "00222211"


def test_speed_greedy_fills_the_fastest_and_leaves_the_slow_source_what_is_pinned_to_it(chain: Chain) -> None:
    links = {(0, 1): 1, (0, 2): 1, (1, 2): 1}

    assert homes(speed_greedy(chain([1] * 8, [9, 2, 1], [9, 9, 5], links))) == "02222211"
    assert homes(speed_greedy(chain([1] * 8, [1, 2, 3], [5, 2, 9], links))) == "00000112"


def test_a_rule_of_thumb_goes_around_a_missing_link(chain: Chain) -> None:
    """From device 1 to 2 there is none: the nearest to an even split leaves one of them out."""
    assert homes(even_split(chain([1] * 6, [1, 1, 1], [9, 9, 9], {(0, 1): 1, (0, 2): 1}))) in {
        "001111",
        "000022",
        "002222",
    }


def test_like_devices_are_one_class_and_the_best_linked_of_them_is_taken(chain: Chain) -> None:
    problem = chain([1] * 4, [9, 1, 1], [2, 3, 3], {(0, 1): 0.5, (0, 2): 0.1, (1, 2): 0.3})

    assert homes(pipeedge(problem)) == "0222"


def test_a_search_over_sets_of_thirty_unlike_devices_gives_none_instead_of_hanging(chain: Chain) -> None:
    links = {(i, j): 0.1 for j in range(30) for i in range(j)}
    problem = chain([1] * 30, [1 + index / 100 for index in range(30)], [2] * 30, links)

    assert edgeshard_throughput(problem) is None
    assert pipeedge(problem) is None
    assert even_split(problem) is not None


def test_no_baseline_answers_where_the_source_may_not_hold_activations(chain: Chain) -> None:
    problem = replace(chain([1] * 4, [1, 1], [9, 9], {(0, 1): 1}), residency=Residency(regions=("home",)))

    assert all(baseline(problem) is None for baseline in BASELINES.values())


def test_a_plan_over_a_link_that_is_missing_is_worth_nothing(chain: Chain) -> None:
    problem = chain([1] * 2, [1, 1], [9, 9], {})
    spans = (Span(NodeId("n0"), 0, 1), Span(NodeId("n1"), 1, 2))

    assert worth(problem, spans) == float("inf")
    with pytest.raises(InfeasibleError):
        price(problem, spans)
