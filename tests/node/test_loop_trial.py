"""What a stage's loop costs is timed on a real loop."""

from shoal.clock import SystemClock
from shoal.node import loop_trial
from shoal.node.loop_trial import loop_overhead_s


def test_the_loop_costs_something_and_the_engines_work_is_not_counted() -> None:
    worked: list[float] = []
    clock = SystemClock()

    overhead_s = loop_overhead_s(64, clock, lambda: worked.append(clock.now_s()))

    assert overhead_s > 0
    assert len(worked) >= 2 * loop_trial.TOKENS
