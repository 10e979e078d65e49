"""Time functions from trials."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.profile.fit import fit
from shoal.profile.fleet import BlockTrial
from shoal.profile.trial import TrialLimits, trial_points

seconds = st.floats(0, 1e-2).map(lambda value: round(value, 9))


def trial(time_s: float, *, rows: int = 1, context: int = 0, batch: int = 1) -> BlockTrial:
    return BlockTrial(kind="layer", rows=rows, batch=batch, context=context, time_s=time_s, spread_s=0.0)


@given(
    seconds,
    seconds,
    seconds,
    st.sampled_from([600, 2048]),
    st.integers(1, 128),
    st.integers(0, 2000),
    st.integers(1, 4),
)
def test_steps_that_cost_a_line_in_rows_and_context_are_met_exactly(
    a: float, b: float, c: float, context_tokens: int, rows: int, context: int, batch: int
) -> None:
    c /= 1e3
    points = trial_points(TrialLimits(context_tokens=context_tokens, max_batch=4))
    trials = [
        trial(a + p.batch * p.rows * (b + c * p.context), rows=p.rows, context=p.context, batch=p.batch) for p in points
    ]

    fitted = fit(trials)["layer"]

    assert fitted.step_s(rows, context) == pytest.approx(a + rows * (b + c * context), rel=1e-6, abs=1e-9)
    assert fitted.decode_s(context, batch) == pytest.approx(a + batch * (b + c * context), rel=1e-6, abs=1e-9)
    assert fitted.residual == pytest.approx(0, abs=1e-6)


@given(st.lists(st.builds(trial, seconds, rows=st.integers(1, 200), context=st.integers(0, 2000)), min_size=1))
def test_no_step_takes_less_than_no_time(trials: list[BlockTrial]) -> None:
    fitted = fit(trials)["layer"]

    assert all(fitted.step_s(rows, context) >= 0 for rows in (1, 7, 300) for context in (0, 100, 5000))
    assert all(line.slope_s >= 0 and line.base_s >= 0 for line in (*fitted.by_rows, *fitted.by_batch))


def test_a_prompt_costs_the_sum_of_its_chunks_each_after_the_ones_before() -> None:
    fitted = fit([trial(1e-3 + p * 1e-6, context=p) for p in (0, 100)] + [trial(10e-3, rows=100)])["layer"]

    expected_s = fitted.step_s(100, 0) + fitted.step_s(100, 100) + fitted.step_s(42, 200)

    assert fitted.prefill_s(242, 100) == pytest.approx(expected_s)
    assert fitted.step_s(100, 100) > fitted.step_s(100, 0)


def test_one_row_and_a_chunk_keep_their_own_times_where_a_line_would_split_the_difference() -> None:
    fitted = fit([trial(17e-3), trial(65e-3, rows=16), trial(338e-3, rows=128)])["layer"]

    assert fitted.step_s(1, 0) == pytest.approx(17e-3)
    assert fitted.step_s(16, 0) == pytest.approx(65e-3)
    assert fitted.step_s(72, 0) == pytest.approx((65e-3 + 338e-3) / 2)


def test_rows_cost_in_proportion_when_only_one_row_was_timed() -> None:
    assert fit([trial(2e-3)])["layer"].step_s(10, 0) == pytest.approx(20e-3)


def test_the_residual_says_how_far_the_line_misses() -> None:
    fitted = fit([trial(10e-3, context=0), trial(30e-3, context=100), trial(20e-3, context=200)])["layer"]

    assert fitted.residual == pytest.approx(1 / 3)


def test_a_kind_without_a_single_sequence_trial_has_no_fit() -> None:
    assert fit([trial(1e-3, batch=2)]) == {}
