"""What a stage tells of its steps and of its way to the next one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet.report import HopTimes, StepTimes
from shoal.ids import RequestId
from shoal.node.live_times import BUSY_AT_LEAST_S, BUSY_S, KEPT, PINGS, BusyShare, LiveTimes
from shoal.runtime.ports import SequenceStep


def step(start: int = 10, count: int = 1) -> SequenceStep:
    return SequenceStep(request=RequestId("r"), slot=0, start=start, count=count, logits=1)


def test_a_report_tells_the_median_of_the_steps_since_the_last_one() -> None:
    live = LiveTimes()
    for time_s, start in ((1.0, 10), (3.0, 11), (9.0, 12)):
        live.stepped([step(start)], time_s)

    assert live.take_steps() == StepTimes(until=3, time_s=3.0, batch=1, context=11.0)
    assert live.take_steps() is None


def test_prompts_and_inferences_are_not_told_of() -> None:
    live = LiveTimes()
    live.stepped([step(count=5)], 1.0)
    live.stepped([step(), step(count=5)], 1.0)
    live.stepped([], 1.0)

    assert live.take_steps() is None


def test_steps_of_the_most_common_batch_are_told_of() -> None:
    live = LiveTimes()
    live.stepped([step()], 1.0)
    for _ in range(3):
        live.stepped([step(), step(30)], 2.0)

    assert live.take_steps() == StepTimes(until=4, time_s=2.0, batch=2, context=20.0)


def test_a_stage_that_reports_seldom_forgets_old_steps_and_counts_them_all() -> None:
    live = LiveTimes()
    for number in range(2 * KEPT):
        live.stepped([step()], float(number >= KEPT))

    told = live.take_steps()

    assert told is not None
    assert (told.until, told.time_s) == (2 * KEPT, 1.0)


def test_round_trips_are_told_beside_the_first_ones_of_the_same_way() -> None:
    live = LiveTimes()
    for _ in range(PINGS):
        live.pinged(0.01)
    assert live.hop() is None

    for _ in range(PINGS):
        live.pinged(0.05)
    assert live.hop() == HopTimes(until=2 * PINGS, rtt_s=0.05, base_s=0.01)

    live.wired()
    assert live.hop() is None


def test_hellos_that_met_a_busy_stage_do_not_count() -> None:
    live = LiveTimes()
    for rtt_s in (0.01, 0.2, 0.2, 0.01, 0.3, 0.2, 0.2, 0.01, 0.4):
        live.pinged(rtt_s)

    told = live.hop()

    assert told is not None
    assert told.rtt_s == told.base_s == 0.01


def test_the_busy_share_is_of_the_last_seconds_and_forgets_what_was_before() -> None:
    share = BusyShare()
    assert share.seen(100.0, 0.0) is None, "there is nothing to look back on"
    for second in range(1, 11):
        busy = share.seen(100.0 + second, second * 0.5)
    assert busy == pytest.approx(0.5)

    idle = [share.seen(110.0 + second, 5.0) for second in range(1, int(BUSY_S) + 1)]

    assert idle[-1] == 0.0
    assert idle == sorted(idle, reverse=True)


@given(st.lists(st.tuples(st.floats(0.01, 20.0), st.floats(0.0, 1.0)), min_size=1, max_size=60))
def test_a_busy_share_lies_between_the_least_and_the_most_busy_stretch(stretches: list[tuple[float, float]]) -> None:
    share, now_s, worked_s = BusyShare(), 0.0, 0.0
    share.seen(now_s, worked_s)

    for length_s, busy in stretches:
        now_s, worked_s = now_s + length_s, worked_s + length_s * busy
        told = share.seen(now_s, worked_s)
        if told is None:
            assert now_s < BUSY_AT_LEAST_S + 1e-9
            continue
        shares = [part for _, part in stretches]
        assert min(shares) - 1e-6 <= told <= max(shares) + 1e-6
