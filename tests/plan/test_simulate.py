"""The simulator against closed forms of simple pipelines, and what it refuses."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from shoal.errors import InfeasibleError, InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.cost import Span
from shoal.plan.problem import BatchTimes, BlockSpec, DeviceSpec, LinkSpec, Problem, RequestShape
from shoal.plan.simulate import simulate
from shoal.plan.simulated import Load, Simulated, jitter

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
TOKEN_S = 64e-9
"""A token's 64 bytes on the wires below."""


def line(times: Sequence[float], shape: RequestShape, *, rate: float = 1e9, latency_s: float = 0.0) -> Problem:
    """One block per device, `times[j]` seconds for a step and for the prompt; 1000 bytes per row over every cut."""
    nodes = [A, B, C][: len(times)]
    count = len(nodes)
    return Problem(
        blocks=tuple(BlockSpec(name=f"block {i}", weights_bytes=1, output_bytes_per_token=1000) for i in range(count)),
        devices=tuple(
            DeviceSpec(node=node, memory_budget_bytes=9, decode_s=(time_s,) * count, prefill_s=(time_s,) * count)
            for node, time_s in zip(nodes, times, strict=True)
        ),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=latency_s, bytes_per_s=rate if a < b else 1e9)
            for a in nodes
            for b in nodes
            if a != b
        ),
        shape=shape,
        source=A,
    )


def one_each(problem: Problem) -> list[Span]:
    return [Span(device.node, index, index + 1) for index, device in enumerate(problem.devices)]


def in_flight(streams: int, **changes: int) -> RequestShape:
    known = {"tokens_in": 1, "tokens_out": 20, "context_tokens": 0, "slots": 64, "prefill_chunk_tokens": 64}
    return RequestShape(**(known | changes), in_flight=streams)


def run(problem: Problem, streams: int, requests: int = 64) -> Simulated:
    return simulate(problem, one_each(problem), Load(streams=streams, requests=requests))


def test_one_device_gives_a_token_per_step_however_many_streams_it_serves() -> None:
    for streams in (1, 3):
        seen = run(line([0.01], in_flight(streams)), streams)

        assert seen.tokens_per_s == pytest.approx(100)
        assert seen.time_per_output_token_s == pytest.approx(0.01 * streams)
        assert seen.devices[0].share == pytest.approx(1)


@pytest.mark.parametrize(("streams", "tokens_per_s"), [(1, 50), (2, 100), (3, 100), (5, 100)])
def test_two_equal_stages_work_at_once_from_two_streams_on(streams: int, tokens_per_s: float) -> None:
    seen = run(line([0.01, 0.01], in_flight(streams), rate=1e12), streams)

    assert seen.tokens_per_s == pytest.approx(tokens_per_s, rel=1e-4)
    assert seen.devices[0].share == pytest.approx(tokens_per_s / 100, rel=1e-3)


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 6, 9])
def test_streams_are_bound_by_the_lap_until_the_slowest_server_binds(streams: int) -> None:
    problem = line([0.01, 0.02, 0.01], in_flight(streams), latency_s=0.015)

    seen = run(problem, streams)

    lap_s = 0.04 + 3 * 0.015 + 2e-6 + TOKEN_S
    assert seen.tokens_per_s == pytest.approx(1 / max(0.02, lap_s / streams), rel=1e-3)
    assert seen.time_per_output_token_s == pytest.approx(max(lap_s, streams * 0.02), rel=1e-3)


def test_a_slow_link_is_the_bottleneck_but_its_latency_is_not() -> None:
    slow = run(line([0.01, 0.01], in_flight(8), rate=1000 / 0.05), 8)
    far = run(line([0.01, 0.01], in_flight(8), rate=1e12, latency_s=0.02), 8)

    assert slow.tokens_per_s == pytest.approx(20, rel=1e-3)
    assert next(link.share for link in slow.links if link.name == "a to b") == pytest.approx(1, rel=1e-3)
    assert far.tokens_per_s == pytest.approx(100, rel=1e-3)


def test_links_of_a_medium_take_turns() -> None:
    problem = line([0.001, 0.001, 0.001], in_flight(8), rate=1000 / 0.01)
    air = replace(
        problem, links=tuple(replace(link, medium="air" if link.source < link.target else "") for link in problem.links)
    )

    assert run(problem, 8).tokens_per_s == pytest.approx(100, rel=1e-3)
    assert run(air, 8).tokens_per_s == pytest.approx(50, rel=1e-3)
    assert "medium air" in {link.name for link in run(air, 8).links}


def test_chunks_of_a_prompt_overlap_as_far_as_frames_may_be_in_flight() -> None:
    def first_token_s(frames: int) -> float:
        shape = in_flight(frames, tokens_in=40, prefill_chunk_tokens=10)
        return run(line([0.4, 0.4], shape, rate=1e12), 1, 8).time_to_first_token_s

    # Four chunks of 0.1 s at each of two stages: one after another, or in step.
    assert first_token_s(1) == pytest.approx(0.8, rel=1e-4)
    assert first_token_s(2) == pytest.approx(0.5, rel=1e-4)
    assert first_token_s(9) == pytest.approx(0.5, rel=1e-4)


def test_a_last_chunk_that_is_short_takes_its_rows_share() -> None:
    shape = in_flight(4, tokens_in=5, prefill_chunk_tokens=4)

    seen = run(line([0.5, 0.05], shape, rate=1e12), 1, 8)

    # The second stage has the fifth row alone when the first is done with it.
    assert seen.time_to_first_token_s == pytest.approx(0.5 + 0.01, rel=1e-4)


def test_a_micro_batch_pays_each_prompt_and_shares_its_steps() -> None:
    problem = line([0.01, 0.01], in_flight(1, batch=3), rate=1e12)
    timed = BatchTimes(batch=3, decode_s=(0.015, 0.015))
    problem = replace(problem, devices=tuple(replace(device, batched=(timed,)) for device in problem.devices))

    seen = run(problem, 1)

    assert seen.time_to_first_token_s == pytest.approx(0.02, rel=1e-4)
    assert seen.time_per_output_token_s == pytest.approx(0.03, rel=1e-4)
    assert seen.tokens_per_s == pytest.approx(3 * 20 / (3 * 0.02 + 19 * 0.03), rel=1e-4)


def test_a_prompt_from_elsewhere_travels_and_its_answer_travels_back() -> None:
    problem = replace(line([0.01, 0.01], in_flight(1), latency_s=0.1), source=B, pin_first=False)

    seen = simulate(problem, [Span(A, 0, 2)], Load(streams=1))

    assert seen.time_to_first_token_s == pytest.approx(0.2 + 0.02, rel=1e-4)
    assert seen.time_per_output_token_s == pytest.approx(0.02, rel=1e-4)


def test_a_relay_passes_frames_on_after_its_overhead() -> None:
    problem = line([0.01, 0.01, 0.01], in_flight(1), latency_s=0.1)
    devices = tuple(replace(device, step_overhead_s=0.002) for device in problem.devices)

    seen = simulate(replace(problem, devices=devices), [Span(A, 0, 1), Span(B, 1, 1), Span(C, 1, 3)], Load(streams=1))

    assert seen.time_per_output_token_s == pytest.approx(0.03 + 3 * 0.002 + 3 * 0.1, rel=1e-4)


def test_a_relay_does_not_wait_for_the_blocks_of_its_device() -> None:
    problem = line([0.01, 0.05, 0.01], in_flight(3), rate=1e12, latency_s=0.02)
    chain = [Span(A, 0, 1), Span(B, 1, 1), Span(C, 1, 2), Span(B, 2, 3)]

    seen = simulate(problem, chain, Load(streams=3))

    # Three streams keep B busy all the time, and each still takes its own lap only.
    assert seen.tokens_per_s == pytest.approx(20, rel=1e-2)
    assert seen.time_per_output_token_s == pytest.approx(0.07 + 4 * 0.02, rel=1e-2)


def test_what_a_relay_takes_its_device_lacks() -> None:
    problem = line([0.01, 0.05, 0.01], in_flight(9), rate=1e12)
    devices = tuple(replace(device, step_overhead_s=0.005) for device in problem.devices)
    chain = [Span(A, 0, 1), Span(B, 1, 1), Span(C, 1, 2), Span(B, 2, 3)]

    seen = simulate(replace(problem, devices=devices), chain, Load(streams=9))

    assert seen.tokens_per_s == pytest.approx(1 / 0.06, rel=1e-2)


def test_jitter_is_the_same_for_a_seed_and_costs_a_busy_line_tokens() -> None:
    problem = line([0.01, 0.01, 0.01], in_flight(3), rate=1e12)

    def tokens_per_s(spread: float, seed: int) -> float:
        return simulate(problem, one_each(problem), Load(streams=3), jitter(spread, seed)).tokens_per_s

    assert tokens_per_s(0.3, 1) == tokens_per_s(0.3, 1) != tokens_per_s(0.3, 2)
    assert 70 < tokens_per_s(0.3, 1) < 97 < tokens_per_s(0.0, 1)


def test_jitter_stays_within_its_spread_around_one() -> None:
    factors = [jitter(0.2, 7)(server, count) for server in range(4) for count in range(500)]

    assert 0.8 <= min(factors) < 0.81
    assert 1.19 < max(factors) <= 1.2
    assert sum(factors) / len(factors) == pytest.approx(1, abs=0.01)
    with pytest.raises(InvalidRequestError, match=r"a jitter of 1\.5"):
        jitter(1.5, 0)


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    seen = run(line([0.01], in_flight(1, tokens_out=1)), 1)

    assert seen.time_per_output_token_s is None
    assert seen.tokens_per_s == pytest.approx(100)


def test_a_fleet_in_which_nothing_takes_time_ends_too() -> None:
    problem = line([0.0], in_flight(1))

    assert run(problem, 1).tokens_per_s == 0


def test_hundreds_of_devices_and_80_blocks_are_simulated() -> None:
    nodes = [NodeId(f"n{index}") for index in range(300)]
    shape = in_flight(40, tokens_out=8)
    problem = Problem(
        blocks=tuple(BlockSpec(name=f"b{i}", weights_bytes=1, output_bytes_per_token=100) for i in range(80)),
        devices=tuple(
            DeviceSpec(node=node, memory_budget_bytes=1, decode_s=(0.001,) * 80, prefill_s=(0.001,) * 80)
            for node in nodes
        ),
        links=tuple(
            LinkSpec(source=nodes[a], target=nodes[b % 80], latency_s=0.001, bytes_per_s=1e6)
            for a, b in zip(range(80), range(1, 81), strict=True)
        ),
        shape=shape,
        source=nodes[0],
    )

    seen = simulate(problem, [Span(nodes[i], i, i + 1) for i in range(80)], Load(streams=40))

    lap_s = 80 * (0.001 + 0.001) + 79 * 1e-4 + 64e-6
    assert seen.tokens_per_s == pytest.approx(40 / lap_s, rel=1e-6)


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([Span(A, 0, 1)], r"run 1 of 2 blocks"),
        ([], r"run 0 of 2 blocks"),
        ([Span(A, 0, 1), Span(B, 0, 2)], r"stage 2 has blocks \[0, 2\), where \[1, \.\.\.\) of 2"),
        ([Span(A, 0, 3)], r"stage 1 has blocks \[0, 3\)"),
        ([Span(A, 0, 0), Span(B, 0, 2)], r"the first must run some"),
        ([Span(A, 0, 1), Span(C, 1, 2)], r"stage 2 runs on c, which is no device"),
    ],
)
def test_stages_that_are_no_chain_of_the_problem_are_refused(spans: list[Span], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        simulate(line([0.01, 0.01], in_flight(1)), spans, Load(streams=1))


def test_a_missing_link_and_an_empty_load_are_named() -> None:
    problem = line([0.01, 0.01], in_flight(1))

    with pytest.raises(InfeasibleError, match="no link from a to b"):
        simulate(replace(problem, links=()), one_each(problem), Load(streams=1))
    with pytest.raises(InvalidRequestError, match="0 streams and 64 requests"):
        simulate(problem, one_each(problem), Load(streams=0))
