"""Latency and bandwidth from round trips; which pairs are probed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.profile.link import PROBE_BYTES, LinkSample, link_profile, probe_pairs

A, B = NodeId("a"), NodeId("b")


@given(st.floats(1e-5, 0.5), st.floats(1e4, 1e10), st.integers(0, 2), st.floats(2, 100))
def test_clean_samples_give_back_latency_and_bandwidth_and_one_stray_in_seven_changes_nothing(
    rtt_s: float, bytes_per_s: float, stray: int, factor: float
) -> None:
    samples = [
        LinkSample(
            payload_bytes=size,
            round_trip_s=(rtt_s + size / bytes_per_s) * (factor if turn == 0 and index == stray else 1),
        )
        for index, size in enumerate(PROBE_BYTES)
        for turn in range(7)
    ]

    link = link_profile(A, B, samples)

    assert link.rtt_p50_s == pytest.approx(rtt_s + PROBE_BYTES[0] / bytes_per_s)
    assert link.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)
    assert link.rtt_p99_s >= link.rtt_p50_s


def test_the_99th_percentile_sees_the_slow_probe_that_the_median_does_not() -> None:
    link = link_profile(A, B, [LinkSample(payload_bytes=64, round_trip_s=time_s) for time_s in [0.01] * 9 + [0.2]])

    assert link.rtt_p50_s == pytest.approx(0.01)
    assert link.rtt_p99_s > 0.15


@given(st.floats(1e-3, 0.1), st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_half_of_the_round_trips_are_within_the_jitter_of_the_median(rtt_s: float, late: list[float]) -> None:
    times = [rtt_s * (1 + share) for share in late]

    link = link_profile(A, B, [LinkSample(payload_bytes=64, round_trip_s=time_s) for time_s in times])

    within = [time_s for time_s in times if abs(time_s - link.rtt_p50_s) <= link.jitter_s + 1e-12]
    assert 2 * len(within) >= len(times) == link.round_trips


def test_a_steady_link_has_no_jitter_whatever_its_slowest_probe() -> None:
    link = link_profile(A, B, [LinkSample(payload_bytes=64, round_trip_s=time_s) for time_s in [0.01] * 9 + [0.2]])

    assert link.jitter_s == 0


def test_a_link_too_fast_to_show_a_slope_is_credited_with_what_it_reached() -> None:
    samples = [LinkSample(payload_bytes=size, round_trip_s=1e-4) for size in (64, 1_000_000)]

    assert link_profile(A, B, samples).bytes_per_s == pytest.approx(1e10)


def test_no_answer_is_an_error_that_names_the_link() -> None:
    with pytest.raises(InvalidRequestError, match="from a to b"):
        link_profile(A, B, [])


@given(st.integers(1, 40), st.integers(1, 4))
def test_everybody_is_probed_with_the_source_and_with_a_few_others_both_ways(count: int, k: int) -> None:
    nodes = [NodeId(f"node-{index}") for index in range(count)]

    pairs = probe_pairs(nodes, nodes[0], k)

    assert len(set(pairs)) == len(pairs)
    assert all(a != b and (b, a) in pairs for a, b in pairs)
    assert {(nodes[0], node) for node in nodes[1:]} <= set(pairs)
    assert len(pairs) <= 2 * count * (k + 1)
    if count - 2 <= k:
        assert len(pairs) == count * (count - 1)


def test_neighbours_are_of_one_region_first_and_a_newcomer_changes_few_pairs() -> None:
    nodes = [NodeId(f"node-{index}") for index in range(20)]
    regions = {node: "east" if index % 2 else "west" for index, node in enumerate(nodes)}

    pairs = probe_pairs(nodes, nodes[0], 2, regions)
    later = probe_pairs([*nodes, NodeId("new")], nodes[0], 2, regions | {NodeId("new"): "east"})

    across = [pair for pair in pairs if nodes[0] not in pair and regions[pair[0]] != regions[pair[1]]]
    assert len(across) <= 12
    assert len({*pairs} - {*later}) <= 6
