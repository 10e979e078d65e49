"""What the demo says of predicted against measured, and of the profile."""

import pytest
from rich.console import Console

from shoal.cli.demo import compare, far_off, missed
from shoal.cli.profile_table import render_speeds
from shoal.ids import NodeId
from shoal.plan.problem import Estimate
from shoal.profile.fleet import BlockTrial, DeviceProfile, FleetProfile

PREDICTED = Estimate(time_to_first_token_s=0.2, time_per_output_token_s=0.04, latency_s=3.0, tokens_per_s=20)


@pytest.mark.parametrize(
    ("first_s", "per_token_s", "expected"),
    [(0.2, 0.04, False), (0.249, 0.031, False), (0.26, 0.04, True), (0.2, 0.051, True), (0.2, 0.029, True)],
)
def test_a_quarter_apart_is_worth_a_word(first_s: float, per_token_s: float, expected: bool) -> None:
    assert far_off(PREDICTED, first_s, per_token_s) is expected


def test_predicted_stands_above_measured() -> None:
    predicted, measured = compare(PREDICTED, 0.3, 0.05).splitlines()

    assert "200 ms to the first token,  40.0 ms per token" in predicted
    assert "300 ms to the first token,  50.0 ms per token" in measured


def test_the_errors_are_of_what_was_measured() -> None:
    assert missed(PREDICTED, 0.25, 0.05).startswith("missed by 20% and 20%")
    assert missed(PREDICTED, 0.0, 0.04).startswith("missed by - and 0%")


def device(letter: str, factor: float) -> DeviceProfile:
    points = ((1, 16, 1e-3), (1, 512, 2e-3), (128, 0, 8e-3), (128, 512, 9e-3))
    trials = tuple(
        BlockTrial(kind="0123456789abcdef", rows=rows, batch=1, context=context, time_s=time_s * factor, spread_s=0)
        for rows, context, time_s in points
    )
    return DeviceProfile(
        node=NodeId(letter * 32), fingerprint="f" * 32, cores=1, threads=1, memory_total_bytes=1, memory_budget_bytes=1,
        trials=trials, step_overhead_s=1e-4,
    )  # fmt: skip


def test_speeds_are_shown_by_kind_and_device_in_the_order_of_the_names_within_80_columns() -> None:
    profile = FleetProfile(profile_epoch=1, devices=(device("a", 2), device("b", 1)), links=())
    console = Console(width=80, color_system=None)

    with console.capture() as captured:
        console.print(render_speeds(profile, {NodeId("b" * 32): "box", NodeId("a" * 32): "attic"}))

    header, kind, overhead = captured.get().splitlines()[-3:]
    assert header.split() == ["BLOCK", "KIND", "box", "attic"]
    assert kind.split() == ["01234567", "2", "ms", "/", "8", "ms", "4", "ms", "/", "16", "ms"]
    assert overhead.split() == ["each", "call", "0.1", "ms", "0.1", "ms"]
