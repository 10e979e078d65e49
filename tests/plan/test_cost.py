"""The cost model, by hand."""

import pytest
from msgspec.structs import replace

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.cost import Span, decode_times, price, shard_memory
from shoal.plan.problem import BatchTimes, BlockSpec, DeviceSpec, LinkSpec, Problem, RequestShape, SharedTensor

A, B = NodeId("a"), NodeId("b")


@pytest.fixture
def problem() -> Problem:
    """Two blocks, two devices; 10 prompt tokens in chunks of 4, 5 answer tokens; 64 bytes of a token frame take 64 us."""
    return Problem(
        blocks=(
            BlockSpec(
                name="low", weights_bytes=1000, kv_bytes_per_token=3, output_bytes_per_token=100, workspace_bytes=7
            ),
            BlockSpec(name="high", weights_bytes=500, kv_bytes_per_token=3, load_peak_bytes=900, workspace_bytes=5),
        ),
        devices=(
            DeviceSpec(
                node=A,
                memory_budget_bytes=5000,
                fixed_bytes=50,
                weights_factor=1.5,
                step_overhead_s=0.001,
                decode_s=(0.01, 0.02),
                prefill_s=(0.1, 0.2),
            ),
            DeviceSpec(
                node=B, memory_budget_bytes=5000, step_overhead_s=0.002, decode_s=(0.03, 0.04), prefill_s=(0.3, 0.4)
            ),
        ),
        links=(
            LinkSpec(source=A, target=B, latency_s=0.005, bytes_per_s=1e5),
            LinkSpec(source=B, target=A, latency_s=0.007, bytes_per_s=1e6),
        ),
        shape=RequestShape(tokens_in=10, tokens_out=5, context_tokens=20, slots=2, in_flight=1, prefill_chunk_tokens=4),
        source=A,
    )


def test_two_stages_take_their_blocks_their_steps_and_their_transfers(problem: Problem) -> None:
    priced = price(problem, [Span(A, 0, 1), Span(B, 1, 2)])

    first, second = priced.stages
    assert first.prefill_s == pytest.approx(0.1 + 3 * 0.001)
    assert first.decode_s == pytest.approx(0.011)
    assert first.send_prefill_s == pytest.approx(0.005 + 10 * 100 / 1e5)
    assert first.send_decode_s == pytest.approx(0.005 + 100 / 1e5)
    assert second.send_decode_s == second.send_prefill_s == pytest.approx(0.007 + 64e-6)
    estimate = priced.estimate
    # Three chunks, each a lap of its own: three times the latency there, two answers back and the token.
    assert estimate.time_to_first_token_s == pytest.approx(0.103 + 0.406 + 0.01 + 3 * 0.005 + 2 * 0.007064 + 0.007064)
    assert estimate.time_per_output_token_s == pytest.approx(0.011 + 0.006 + 0.042 + 0.007064)
    assert estimate.latency_s == pytest.approx(estimate.time_to_first_token_s + 4 * estimate.time_per_output_token_s)


@pytest.mark.parametrize(("latency_s", "between_s"), [(0.005, 0.406 / 3), (0.5, (0.519 / 3 + 0.5 + 0.007064) / 2)])
def test_chunks_in_flight_follow_each_other_by_the_slowest_stage_or_their_share_of_the_lap(
    problem: Problem, latency_s: float, between_s: float
) -> None:
    links = (replace(problem.links[0], latency_s=latency_s), problem.links[1])
    two = replace(problem, links=links, shape=replace(problem.shape, in_flight=2))

    estimate = price(two, [Span(A, 0, 1), Span(B, 1, 2)]).estimate

    first_chunk_s = 0.519 / 3 + latency_s
    assert estimate.time_to_first_token_s == pytest.approx(first_chunk_s + 2 * between_s + 0.007064)


def test_one_device_alone_pays_no_transfer(problem: Problem) -> None:
    estimate = price(problem, [Span(A, 0, 2)]).estimate

    assert estimate.time_per_output_token_s == pytest.approx(0.031)
    assert estimate.time_to_first_token_s == pytest.approx(0.303)


def test_a_single_stream_is_bound_by_the_lap_and_many_by_the_busiest_device(problem: Problem) -> None:
    spans = [Span(A, 0, 1), Span(B, 1, 2)]
    one = price(problem, spans).estimate

    def tokens_per_s(in_flight: int) -> float:
        shape = RequestShape(
            tokens_in=10, tokens_out=5, context_tokens=20, slots=9, in_flight=in_flight, prefill_chunk_tokens=4
        )
        return price(_with_shape(problem, shape), spans).estimate.tokens_per_s

    busiest_s = 0.406 + 4 * 0.042
    assert tokens_per_s(1) == pytest.approx(5 / one.latency_s)
    assert tokens_per_s(9) == pytest.approx(5 / busiest_s)


def test_a_prompt_that_enters_elsewhere_is_carried_to_the_first_stage_and_its_answer_back(problem: Problem) -> None:
    estimate = price(problem, [Span(B, 0, 2)]).estimate

    entry_s = 0.005 + (64 + 4 * 10) / 1e5
    assert estimate.time_to_first_token_s == pytest.approx(entry_s + 0.706 + 0.007064)
    assert estimate.time_per_output_token_s == pytest.approx(0.072)


def test_memory_is_packed_weights_and_the_greater_of_serving_and_loading(problem: Problem) -> None:
    low = shard_memory(problem, problem.devices[0], 0, 1)
    both = shard_memory(problem, problem.devices[0], 0, 2)

    assert (low.weights, low.kv, low.total) == (1500, 120, 50 + 1500 + 120 + 7)
    assert both.total == 50 + 2250 + max(240 + 7, 900)


def test_slots_that_share_a_cache_take_what_they_share_and_one_context_at_least(problem: Problem) -> None:
    def kv(slots: int, shared: int, context: int = 200) -> int:
        shape = replace(problem.shape, context_tokens=context, slots=slots, cache_tokens=shared)
        return shard_memory(replace(problem, shape=shape), problem.devices[0], 0, 1).kv // 3

    assert kv(4, 0) == kv(4, 10_000) == 800
    assert kv(4, 600) == 600
    assert kv(4, 200) == 200 + 3 * 64, "each slot may be touched"


def test_a_tensor_of_several_blocks_is_held_once_per_shard(problem: Problem) -> None:
    tied = replace(problem, shared=(SharedTensor(size_bytes=400, blocks=(0, 1)),))

    assert shard_memory(tied, problem.devices[0], 0, 1).weights == 1500
    assert shard_memory(tied, problem.devices[0], 1, 2).weights == 750
    assert shard_memory(tied, problem.devices[0], 0, 2).weights == 1650


def test_a_missing_link_is_named(problem: Problem) -> None:
    lonely = Problem(blocks=problem.blocks, devices=problem.devices, links=(), source=A)

    with pytest.raises(InfeasibleError, match="no link from a to b"):
        price(lonely, [Span(A, 0, 1), Span(B, 1, 2)])


def _with_shape(problem: Problem, shape: RequestShape) -> Problem:
    return Problem(
        blocks=problem.blocks, devices=problem.devices, links=problem.links, shape=shape, source=problem.source
    )


def test_a_step_of_several_sequences_takes_what_was_timed_between_and_beyond(problem: Problem) -> None:
    device = replace(problem.devices[0], batched=(BatchTimes(batch=5, decode_s=(0.03, 0.04)),))

    assert decode_times(device, 1) == (0.01, 0.02)
    assert decode_times(device, 3) == pytest.approx((0.02, 0.03))
    assert decode_times(device, 9) == pytest.approx((0.05, 0.06))
    assert decode_times(problem.devices[0], 3) == pytest.approx((0.03, 0.06))


def test_a_micro_batch_shares_its_steps_and_pays_each_prompt(problem: Problem) -> None:
    spans = [Span(A, 0, 1), Span(B, 1, 2)]
    two = _with_shape(problem, replace(problem.shape, batch=2, slots=4, in_flight=2))

    one, both = price(problem, spans).estimate, price(two, spans).estimate

    lap_s = 0.021 + 0.005 + 200 / 1e5 + 0.082 + 0.007064
    assert both.time_per_output_token_s == pytest.approx(lap_s)
    busiest_s = 2 * 0.406 + 4 * 0.082
    assert both.tokens_per_s == pytest.approx(2 * 5 / busiest_s)
    assert one.tokens_per_s < both.tokens_per_s


def test_links_of_one_medium_take_turns(problem: Problem) -> None:
    slow = replace(
        problem,
        blocks=(problem.blocks[0], *[replace(problem.blocks[0], name="middle")], problem.blocks[1]),
        devices=tuple(replace(d, decode_s=(*d.decode_s, 0.0), prefill_s=(*d.prefill_s, 0.0)) for d in problem.devices),
        links=tuple(replace(link, bytes_per_s=1e3, medium="air") for link in problem.links),
        shape=replace(problem.shape, in_flight=2),
        pin_last=True,
    )
    spans = [Span(A, 0, 1), Span(B, 1, 2), Span(A, 2, 3)]
    wired = replace(slow, links=tuple(replace(link, medium="") for link in slow.links))

    sent_s = (10 * 100 + 4 * 100) / 1e3
    assert price(wired, spans).estimate.tokens_per_s == pytest.approx(
        5 / max(sent_s, price(wired, spans).estimate.latency_s / 2)
    )
    assert price(slow, spans).estimate.tokens_per_s == pytest.approx(
        5 / max(2 * sent_s, price(slow, spans).estimate.latency_s / 2)
    )


def test_joules_and_money_are_those_of_busy_devices_and_sent_bytes(problem: Problem) -> None:
    devices = tuple(replace(d, active_watts=10.0, price_per_hour=36.0) for d in problem.devices)
    links = tuple(replace(link, joules_per_byte=0.001, price_per_byte=0.0001) for link in problem.links)

    estimate = price(replace(problem, devices=devices, links=links), [Span(A, 0, 1), Span(B, 1, 2)]).estimate

    busy_s = (0.103 + 4 * 0.011) + (0.406 + 4 * 0.042)
    sent = 10 * 100 + 4 * 100
    assert estimate.joules == pytest.approx(10 * busy_s + 0.001 * sent)
    assert estimate.price == pytest.approx(0.01 * busy_s + 0.0001 * sent)


def test_kept_outputs_are_memory_of_every_stage_but_the_last(problem: Problem) -> None:
    kept = replace(problem, shape=replace(problem.shape, retain_outputs=True))

    assert (
        shard_memory(kept, kept.devices[0], 0, 1).total
        == shard_memory(problem, problem.devices[0], 0, 1).total + 100 * 40
    )
    assert shard_memory(kept, kept.devices[1], 1, 2) == shard_memory(problem, problem.devices[1], 1, 2)


def test_a_relay_costs_its_steps_and_a_hop_more(problem: Problem) -> None:
    c = NodeId("c")
    relay = DeviceSpec(
        node=c,
        memory_budget_bytes=100,
        fixed_bytes=40,
        step_overhead_s=0.001,
        decode_s=(9.0, 9.0),
        prefill_s=(9.0, 9.0),
    )
    ways = (
        *problem.links,
        LinkSpec(source=A, target=c, latency_s=0.0, bytes_per_s=1e6),
        LinkSpec(source=c, target=B, latency_s=0.0, bytes_per_s=1e6),
    )
    through = replace(problem, devices=(*problem.devices, relay), links=ways, relay=True)

    stages = price(through, [Span(A, 0, 1), Span(c, 1, 1), Span(B, 1, 2)]).stages

    assert stages[1].decode_s == pytest.approx(0.001)
    assert stages[0].send_decode_s == stages[1].send_decode_s == pytest.approx(100 / 1e6)
    assert (stages[1].memory_bytes, stages[1].weights_bytes, stages[1].first_block) == (40, 0, "")
