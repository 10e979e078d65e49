"""Live times correct a profile, noise does not, and a change is noticed soon."""

import random
from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.profile.drift import FACTORS, RULE, STEP_FLOOR_S, Drift, observe, ratio

seeds = st.integers(0, 2**32 - 1)


def noisy(seed: int, factor: float, spread: float, count: int) -> list[float]:
    """Samples around *factor*, with a standard deviation of *spread* in the logarithm."""
    dice = random.Random(seed)
    return [factor * exp(dice.gauss(0.0, spread)) for _ in range(count)]


def after(samples: list[float], drift: Drift | None = None) -> Drift:
    found = drift or Drift()
    for sample in samples:
        found = observe(found, sample)
    return found


def false_alarms(spread: float, samples: int, runs: int) -> int:
    """In so many runs of so many samples that scatter around what was told."""
    return sum(after(noisy(seed, 1.0, spread, samples)).changes for seed in range(runs))


def test_noise_of_15_percent_is_no_change_in_ten_thousand_samples() -> None:
    assert false_alarms(0.15, samples=1000, runs=10) <= 1


def test_noise_of_20_percent_is_a_change_about_once_in_4000_samples() -> None:
    """A false one is followed by another, back to the truth."""
    assert false_alarms(0.2, samples=400, runs=20) <= 10


@given(seeds, st.sampled_from([2.0, 0.5]), st.integers(0, 200))
def test_a_device_twice_as_slow_or_fast_is_noticed_within_six_samples(seed: int, factor: float, quiet: int) -> None:
    before = after(noisy(seed, 1.0, 0.05, quiet))
    assert before.changes == 0

    changed = after(noisy(seed + 1, factor, 0.05, 6), before)

    assert changed.changes == 1
    assert changed.factor == pytest.approx(factor, rel=0.25)


@given(seeds)
def test_a_third_slower_is_noticed_within_thirty_samples(seed: int) -> None:
    before = after(noisy(seed, 1.0, 0.05, 50))

    assert after(noisy(seed + 1, 4 / 3, 0.05, 30), before).changes >= 1


@given(seeds, st.floats(0.3, 3.0))
def test_the_factor_comes_to_the_truth(seed: int, factor: float) -> None:
    # The mean over samples of weight w scatters by spread x sqrt(w / (2 - w)): a fourth of it here.
    assert after(noisy(seed, factor, 0.1, 200)).factor == pytest.approx(factor, rel=0.15)


@given(st.floats(0.5, 2.0), st.integers(1, 300))
def test_what_never_varies_is_known_exactly(factor: float, count: int) -> None:
    drift = after([factor] * count)

    assert drift.mean == pytest.approx(log(factor), abs=1e-9)


def test_a_slow_decline_is_told_before_it_has_gone_by_two_fifths() -> None:
    """Step by step each is less than the slack; together they are not."""
    drift, told_at = Drift(), 0.0
    for step in range(400):
        factor = exp(0.002 * step)
        drift = observe(drift, factor)
        if drift.changes:
            told_at = factor
            break

    assert 1.1 < told_at < 1.4


@given(st.floats(1.0, 1000.0))
def test_three_steps_that_were_held_up_are_no_change(held_up: float) -> None:
    drift = after([1.0] * 20 + [held_up] * 3 + [1.0] * 20)

    assert drift.changes == 0


def test_a_change_back_is_a_change_too() -> None:
    there = after([1.0] * 10 + [2.0] * 8)
    back = after([1.0] * 8, there)

    assert (there.changes, back.changes) == (1, 2)
    assert back.factor == pytest.approx(1.0, rel=0.2)


@given(st.lists(st.floats(1e-6, 1e6), max_size=60))
def test_no_factor_is_absurd(samples: list[float]) -> None:
    assert FACTORS[0] <= after(samples).factor <= FACTORS[1]


@given(seeds, st.sampled_from([0.6, 0.8, 0.95, 1.0, 1.03, 1.1, 1.3, 1.6]))
def test_a_factor_moves_seldom_while_samples_scatter_a_little(seed: int, factor: float) -> None:
    settled = after([factor] * 60)

    later = [settled]
    for sample in noisy(seed, factor, 0.05, 60):
        later.append(observe(later[-1], sample))

    assert len({drift.factor for drift in later}) <= 3


def test_few_samples_correct_nothing() -> None:
    assert after([3.0] * (RULE.fewest - 1)).factor == 1.0


def test_times_that_are_next_to_nothing_do_not_differ() -> None:
    assert ratio(STEP_FLOOR_S / 50, STEP_FLOOR_S / 500, STEP_FLOOR_S) == pytest.approx(1.0, rel=0.05)
    assert ratio(0.2, 0.1, STEP_FLOOR_S) == pytest.approx(2.0, rel=0.01)
