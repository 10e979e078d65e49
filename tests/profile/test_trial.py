"""Which steps are timed, and how often."""

from dataclasses import dataclass, field

import pytest

from shoal.profile.fleet import BlockTrial
from shoal.profile.trial import TrialBudget, TrialLimits, TrialPoint, half_iqr, measure, median_trials, trial_points


@dataclass
class ScriptedRunner:
    """Takes the next time of its script, then repeats the last one."""

    script: list[float]
    calls: list[TrialPoint] = field(default_factory=list)

    def step_s(self, *, rows: int, context: int, batch: int) -> float:
        self.calls.append(TrialPoint(rows=rows, context=context, batch=batch))
        return self.script[min(len(self.calls), len(self.script)) - 1]


def test_points_stay_within_what_the_session_can_do() -> None:
    for context_tokens in (0, 2, 20, 128, 600, 8192):
        for max_batch in (1, 3, 8):
            points = trial_points(TrialLimits(context_tokens=context_tokens, max_rows=64, max_batch=max_batch))

            assert len(set(points)) == len(points)
            assert all(point.rows <= 64 and point.batch <= max_batch for point in points)
            assert all(point.rows + point.context <= context_tokens for point in points) or context_tokens == 0


def test_decoding_is_timed_at_two_contexts_and_prompts_in_chunks_of_several_sizes() -> None:
    points = trial_points(TrialLimits(context_tokens=2048, max_batch=4))

    assert {point.context for point in points if point.rows == 1} == {16, 512}
    assert {point.rows for point in points} == {1, 16, 128}
    assert {point.batch for point in points} == {1, 2, 4}


def test_a_steady_point_is_left_after_the_fewest_repeats_and_warm_up_does_not_count() -> None:
    runner = ScriptedRunner([9.0, 1.0])

    (trial,) = measure("layer", runner, [TrialPoint(rows=1, context=0)], TrialBudget(steps=100, repeats=5, warm_up=1))

    assert len(runner.calls) == 6
    assert (trial.kind, trial.time_s, trial.spread_s) == ("layer", 1.0, 0.0)


def test_a_noisy_point_is_timed_until_the_budget_is_used() -> None:
    runner = ScriptedRunner([1.0, 3.0] * 20)

    (trial,) = measure("layer", runner, [TrialPoint(rows=1, context=0)], TrialBudget(steps=20, warm_up=0))

    assert len(runner.calls) == 20
    assert trial.time_s == pytest.approx(2.0)
    assert trial.spread_s == pytest.approx(1.0)


def test_points_take_turns_and_the_budget_counts_all_of_them() -> None:
    runner = ScriptedRunner([1.0, 2.0, 4.0] * 20)
    points = [TrialPoint(rows=1, context=0), TrialPoint(rows=16, context=0)]

    trials = measure("layer", runner, points, TrialBudget(steps=5, warm_up=0))

    assert [call.rows for call in runner.calls] == [1, 16, 1, 16, 1]
    assert len(trials) == 2


def test_a_point_that_the_budget_does_not_reach_is_left_out() -> None:
    runner = ScriptedRunner([1.0])
    points = [TrialPoint(rows=1, context=0), TrialPoint(rows=16, context=0)]

    assert [trial.rows for trial in measure("layer", runner, points, TrialBudget(steps=1, warm_up=0))] == [1]


def test_half_the_interquartile_range_ignores_one_stray_value() -> None:
    assert half_iqr([1.0, 1.0, 1.0, 1.0, 50.0]) == 0.0
    assert half_iqr([1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert half_iqr([7.0]) == 0.0


def test_a_point_is_timed_a_few_times_before_the_next_ones_turn() -> None:
    runner = ScriptedRunner([1.0, 2.0, 4.0] * 20)
    points = [TrialPoint(rows=1, context=0), TrialPoint(rows=16, context=0)]

    measure("layer", runner, points, TrialBudget(steps=7, warm_up=0, burst=2))

    assert [call.rows for call in runner.calls] == [1, 1, 16, 16, 1, 1, 16]


def test_a_slow_device_is_timed_once_round_and_no_longer_than_was_allowed() -> None:
    runner = ScriptedRunner([10.0, 20.0] * 20)
    points = [TrialPoint(rows=1, context=0), TrialPoint(rows=16, context=0)]

    trials = measure("layer", runner, points, TrialBudget(steps=50, warm_up=0, timed_s=25.0))

    assert [trial.rows for trial in trials] == [1, 16]
    assert len(runner.calls) == 2


def test_of_several_passes_the_median_one_counts_for_each_shape() -> None:
    def trial(time_s: float, rows: int = 1) -> BlockTrial:
        return BlockTrial(kind="layer", rows=rows, batch=1, context=0, time_s=time_s, spread_s=time_s / 10)

    found = median_trials([[trial(3.0), trial(9.0, rows=16)], [trial(1.0)], [trial(2.0)]])

    assert found == (trial(2.0), trial(9.0, rows=16))
