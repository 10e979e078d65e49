"""How activations are written is chosen last, for each cut: exactly where the link allows it, never with more loss than asked."""

from collections.abc import Callable
from io import StringIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from shoal.cli.plan_table import render_plan
from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.placement import place
from shoal.plan.problem import BlockSpec, LinkSpec, Objective, OutputBytes, Plan, Problem, RequestShape
from shoal.plan.written import LOSS_NATS, WORTH, allowed, repriced, written
from shoal.transport.codec import Codec, encoded_bytes

Chain = Callable[..., Problem]
WIDTH = 576
LADDER = [Codec.RAW, *WORTH]


def outputs(most: Codec) -> tuple[OutputBytes, ...]:
    sizes = {codec: encoded_bytes(codec, 4, (1, WIDTH)) for codec in WORTH}
    return tuple(OutputBytes(codec=codec, bytes_per_token=sizes[codec]) for codec in allowed(most))


def problem_of(
    chain: Chain, bytes_per_s: float, rtt_s: float = 0.02, most: Codec = Codec.INT8, nodes: int = 2, **shape: int
) -> Problem:
    """A model that needs all *nodes*, with 10 ms of work a token on each."""
    made = chain([1] * nodes, [0.01] * nodes, [1] * nodes, {(i, j): rtt_s / 2 for i in range(nodes) for j in range(i)})
    blocks = tuple(
        BlockSpec(name=block.name, weights_bytes=1, output_bytes_per_token=4 * WIDTH, smaller=outputs(most))
        for block in made.blocks
    )
    links = tuple(replace(link, bytes_per_s=bytes_per_s) for link in made.links)
    asked = RequestShape(tokens_in=64, tokens_out=64, context_tokens=0, slots=4, **shape)
    return replace(made, blocks=blocks, links=links, shape=asked)


def planned(problem: Problem) -> Plan:
    answer = place(problem, StepBudget(100_000))
    assert isinstance(answer, Plan)
    return answer


def codecs(problem: Problem) -> list[Codec]:
    return [one.codec for one in planned(problem).written]


def mbit(rate: float) -> float:
    return rate * 1e6 / 8


@pytest.mark.parametrize(
    ("rate_mbit", "expected"),
    [(1000, Codec.RAW), (50, Codec.RAW), (4, Codec.INT8_PEAKS), (1, Codec.INT8_PEAKS), (0.05, Codec.INT8_PEAKS)],
)
def test_the_slower_the_link_the_smaller_activations_are_written(
    chain: Chain, rate_mbit: float, expected: Codec
) -> None:
    assert codecs(problem_of(chain, mbit(rate_mbit))) == [expected]


def test_where_no_more_loss_is_allowed_a_slow_link_gets_half_precision(chain: Chain) -> None:
    assert codecs(problem_of(chain, mbit(1), most=Codec.FP16)) == [Codec.FP16]


def test_a_long_round_trip_keeps_activations_exact_for_bytes_are_not_what_costs(chain: Chain) -> None:
    assert codecs(problem_of(chain, mbit(2), rtt_s=0.0)) != [Codec.RAW]
    assert codecs(problem_of(chain, mbit(2), rtt_s=1.0)) == [Codec.RAW]


def given_problems(*strategies: st.SearchStrategy[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The fixture only makes problems: nothing of it is left from one to the next."""
    quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
    return lambda law: quiet(given(*strategies)(law))


rates = st.floats(3, 10).map(lambda power: 10**power)
shapes = st.fixed_dictionaries({"in_flight": st.integers(1, 2), "batch": st.integers(1, 2)})


@given_problems(rates, st.floats(0, 0.5), st.sampled_from([Codec.RAW, Codec.FP16, Codec.INT8, Codec.INT8_ZSTD]), shapes)
def test_no_cut_loses_more_than_is_allowed_and_every_loss_saves_its_share(
    chain: Chain, rate: float, rtt_s: float, most: Codec, shape: dict[str, int]
) -> None:
    problem = problem_of(chain, rate, rtt_s, most, nodes=3, **shape)
    exact = planned(replace(problem, blocks=tuple(replace(block, smaller=()) for block in problem.blocks)))
    plan = planned(problem)

    assert [(s.node, s.start, s.stop, s.memory_bytes) for s in plan.stages] == [
        (s.node, s.start, s.stop, s.memory_bytes) for s in exact.stages
    ]
    for one in plan.written if most is not Codec.RAW else ():
        assert one.codec in {Codec.RAW, *allowed(most)}
        assert LOSS_NATS[one.codec] <= LOSS_NATS[most.base]
        assert plan.stages[one.stage].writes is one.codec
        share = one.saved_s / exact.estimate.latency_s
        assert share >= sum(WORTH[codec] for codec in LADDER[1 : LADDER.index(one.codec) + 1]) * (1 - 1e-9)
        assert one.text.startswith("exact" if one.codec is Codec.RAW else one.codec)
    assert plan.estimate.latency_s <= exact.estimate.latency_s * (1 + 1e-9)
    if all(one.codec is Codec.RAW for one in plan.written):
        assert plan.estimate == exact.estimate


@given_problems(st.lists(rates, min_size=2, max_size=4), st.floats(0, 0.2), shapes)
def test_a_quicker_link_never_loses_more(chain: Chain, some: list[float], rtt_s: float, shape: dict[str, int]) -> None:
    found = [LADDER.index(codecs(problem_of(chain, rate, rtt_s, **shape))[0]) for rate in sorted(some)]

    assert found == sorted(found, reverse=True)


def test_only_the_slow_one_of_two_links_is_written_smaller(chain: Chain) -> None:
    problem = problem_of(chain, mbit(1000), nodes=3)
    slow = tuple(
        replace(link, bytes_per_s=mbit(0.5)) if {link.source, link.target} == {"n1", "n2"} else link
        for link in problem.links
    )
    onward = [link for link in slow if {link.source, link.target} != {"n0", "n2"}]
    back = LinkSpec(source=NodeId("n2"), target=NodeId("n0"), latency_s=0.01, bytes_per_s=mbit(1000))
    problem = replace(problem, links=(*onward, back))

    first, second = planned(problem).written

    assert (first.codec, second.codec) == (Codec.RAW, Codec.INT8_PEAKS)
    assert "fp16 would save" in first.text
    assert "nats a token" in second.text


def test_a_plan_is_priced_anew_as_it_is_written(chain: Chain) -> None:
    plan = planned(problem_of(chain, mbit(0.05)))

    again = repriced(problem_of(chain, mbit(0.1)), plan)

    assert repriced(problem_of(chain, mbit(0.05)), plan) == plan
    assert [stage.writes for stage in again.stages] == [stage.writes for stage in plan.stages]
    assert again.estimate.latency_s < plan.estimate.latency_s


def test_a_relay_writes_what_passes_through_it_as_it_came(chain: Chain) -> None:
    made, sized = (
        chain([1, 1], [0.01] * 3, [1, 0, 1], {(0, 1): 0.01, (1, 2): 0.01}, relay=True),
        problem_of(chain, mbit(0.05)),
    )
    onward = [replace(link, bytes_per_s=mbit(0.05)) for link in made.links]
    back = LinkSpec(source=NodeId("n2"), target=NodeId("n0"), latency_s=0.01, bytes_per_s=mbit(1000))
    plan = planned(replace(made, blocks=sized.blocks, links=(*onward, back), shape=sized.shape))

    assert [(stage.node, stage.is_relay) for stage in plan.stages[:3]] == [("n0", False), ("n1", True), ("n2", False)]
    assert [stage.writes for stage in plan.stages] == [
        Codec.INT8_PEAKS,
        Codec.INT8_PEAKS,
        *[Codec.RAW] * (len(plan.stages) - 2),
    ]
    assert [one.stage for one in plan.written] == [0]


def test_a_plan_that_leaves_nothing_to_choose_stays_as_it_is(chain: Chain) -> None:
    problem = problem_of(chain, mbit(0.05), most=Codec.RAW)
    plan = planned(problem)

    assert written(problem, plan) is plan
    assert plan.written == ()


def test_a_plan_says_for_each_cut_how_it_is_written_and_why(chain: Chain) -> None:
    stream = StringIO()
    for rate in (1000, 0.05):
        plan = planned(problem_of(chain, mbit(rate)))
        Console(file=stream, width=200).print(render_plan(plan, {NodeId("n0"): "desk", NodeId("n1"): "shed"}))

    said = [line for line in stream.getvalue().splitlines() if line.startswith("desk to shed")]
    assert said[0].startswith("desk to shed: activations exact; fp16 would save 0.")
    assert said[0].endswith("%, 5.0% is asked")
    assert said[1].startswith("desk to shed: activations int8+peaks: saves ")


@pytest.mark.parametrize("objective", Objective)
def test_whatever_a_plan_is_judged_by_it_is_written(chain: Chain, objective: Objective) -> None:
    assert codecs(replace(problem_of(chain, mbit(0.05)), objective=objective)) == [Codec.INT8_PEAKS]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(Codec.RAW, ()), (Codec.FP16, (Codec.FP16,)), (Codec.INT8_PEAKS, tuple(WORTH)), (Codec.INT8, tuple(WORTH))],
)
def test_what_may_be_chosen_ends_where_it_is_said_to(most: Codec, expected: tuple[Codec, ...]) -> None:
    assert allowed(most) == expected


def test_codecs_whose_loss_is_not_known_cannot_be_chosen(chain: Chain) -> None:
    problem = problem_of(chain, mbit(1))
    odd = replace(problem.blocks[0], smaller=(OutputBytes(codec=Codec.INT8_ZSTD, bytes_per_token=1),))

    with pytest.raises(InvalidRequestError, match=r"may be written as int8\+zstd"):
        place(replace(problem, blocks=(odd, *problem.blocks[1:])), StepBudget(1000))
