"""How a link is sampled: over emulated wires, in virtual time."""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.clock import ManualClock
from shoal.errors import NodeUnreachableError
from shoal.ids import NodeId
from shoal.node.probe import round_trips
from shoal.profile.fleet import LinkProfile
from shoal.profile.link import PROBE_BYTES, LinkSample, link_profile
from shoal.transport.bus import Lane
from shoal.transport.shaped import Way, Wire

A, B = NodeId("a"), NodeId("b")


def over(out: Way, back: Way, clock: ManualClock, *, timeout_s: float = 5.0) -> Callable[[bytes], None]:
    """A round trip on two wires that nobody else uses; it takes no time but the clock's."""
    wires = Wire(out), Wire(back)

    def ask(payload: bytes) -> None:
        asked_s = clock.now_s()
        for wire, size_bytes in zip(wires, (len(payload), 2), strict=True):
            wire.push(clock.now_s(), Lane.CONTROL, size_bytes, lambda: None)
            while (arrival := wire.serve()) is None:
                pass
            if arrival[0] > asked_s + timeout_s:
                clock.advance(asked_s + timeout_s - clock.now_s())
                raise NodeUnreachableError("too slow")
            clock.advance(arrival[0] - clock.now_s())

    return ask


def measured(out: Way, back: Way) -> LinkProfile:
    clock = ManualClock()
    return link_profile(A, B, round_trips(over(out, back, clock), clock))


def sampled(way: Way) -> tuple[list[LinkSample], float]:
    """Samples of a link that is alike both ways, and the seconds that they took."""
    clock = ManualClock()
    return round_trips(over(way, way, clock), clock), clock.now_s()


rates = st.floats(1e5, 1e10)
latencies = st.floats(0, 0.25)


@settings(max_examples=50)
@given(rates, rates, latencies, latencies, st.floats(0, 0.05))
@example(1.25e6, 1.25e8, 0.004, 0.03, 0.05)
def test_of_an_uneven_link_each_direction_comes_out_with_its_own_bandwidth(
    there: float, home: float, there_s: float, home_s: float, unsteady: float
) -> None:
    """Within a tenth, also when messages are late by up to a twentieth of the time that the largest payload takes."""
    largest = max(PROBE_BYTES)
    out = Way(latency_s=there_s, bytes_per_s=there, jitter_s=unsteady * largest / there)
    back = Way(latency_s=home_s, bytes_per_s=home, jitter_s=unsteady * largest / home)

    forth, reverse = measured(out, Way(latency_s=home_s, bytes_per_s=home)), measured(back, Way(bytes_per_s=there))

    assert forth.bytes_per_s == pytest.approx(there, rel=0.1)
    assert reverse.bytes_per_s == pytest.approx(home, rel=0.1)


def test_a_fast_link_is_timed_often_enough_for_its_99th_percentile_and_soon_done() -> None:
    samples, took_s = sampled(Way(latency_s=0.0005, bytes_per_s=1.25e8))

    small = [sample for sample in samples if sample.payload_bytes == PROBE_BYTES[0]]
    assert len(small) == 200
    assert took_s < 0.5


def test_one_late_probe_in_two_hundred_is_not_the_99th_percentile() -> None:
    times = [0.001] * 199 + [1.0]

    link = link_profile(A, B, [LinkSample(payload_bytes=64, round_trip_s=time_s) for time_s in times])

    assert link.rtt_p99_s == pytest.approx(0.001)


@given(st.floats(0, 1), st.floats(2e3, 1e10))
def test_no_link_is_probed_for_long_and_every_one_is_sampled_in_two_sizes_at_least(
    latency_s: float, bytes_per_s: float
) -> None:
    way = Way(latency_s=latency_s, bytes_per_s=bytes_per_s)
    clock = ManualClock()
    try:
        samples = round_trips(over(way, way, clock), clock)
    except NodeUnreachableError:
        assert PROBE_BYTES[1] / bytes_per_s + 2 * latency_s > 4.9, "only a link too slow for 16 KiB is given up"
    else:
        assert len({sample.payload_bytes for sample in samples}) >= 2
    assert clock.now_s() < 20


def test_a_link_too_slow_for_the_largest_payload_is_judged_by_the_others() -> None:
    samples, _ = sampled(Way(latency_s=0.05, bytes_per_s=1e4))

    assert {sample.payload_bytes for sample in samples} == set(PROBE_BYTES[:2])
    assert link_profile(A, B, samples).bytes_per_s == pytest.approx(1e4, rel=0.1)


def test_the_first_round_trip_which_opens_the_way_is_not_counted() -> None:
    clock = ManualClock()
    takes_s = iter([3.0])

    samples = round_trips(lambda _: clock.advance(next(takes_s, 0.01)), clock)

    assert max(sample.round_trip_s for sample in samples) == pytest.approx(0.01)
