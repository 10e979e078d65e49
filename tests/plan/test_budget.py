"""Budgets and their shares."""

import pytest

from shoal.clock import ManualClock
from shoal.plan.budget import DeadlineBudget, StepBudget


def spends(budget: StepBudget) -> int:
    """How many questions it answers with no."""
    count = 0
    while not budget.spent():
        count += 1
    return count


def test_a_share_of_steps_is_a_part_of_what_is_left_and_is_taken_from_the_whole() -> None:
    whole = StepBudget(10)
    share = whole.share(0.4)

    assert isinstance(share, StepBudget)
    assert spends(share) == 4
    assert spends(whole) == 5  # the fifth question of the share was asked, too


def test_a_share_ends_with_the_whole() -> None:
    whole = StepBudget(10)
    share = whole.share(1.0)
    spends(whole)

    assert share.spent()


@pytest.mark.parametrize("limit_s", [10.0, 4.0])
def test_a_share_of_time_counts_from_now(limit_s: float) -> None:
    clock = ManualClock()
    whole = DeadlineBudget(clock.now_s, limit_s)
    clock.advance(2.0)
    share = whole.share(0.5)

    clock.advance((limit_s - 2.0) / 2 - 0.1)
    assert not share.spent()
    clock.advance(0.2)

    assert share.spent()
    assert not whole.spent()


def test_nothing_is_left_of_a_budget_that_is_spent() -> None:
    clock = ManualClock()
    whole = DeadlineBudget(clock.now_s, 1.0)
    clock.advance(3.0)

    assert whole.share(0.5).spent()
    assert StepBudget(0).share(0.5).spent()
