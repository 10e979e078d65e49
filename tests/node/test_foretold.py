"""What a plan foretold is compared with what requests took, and the error is said."""

import pytest

from shoal.clock import ManualClock
from shoal.fleet.views import PredictionView
from shoal.ids import NodeId
from shoal.node.foretold import FEWEST_TOKENS, Foretold, first_token_s
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage


def stage(prefill_s: float, send_prefill_s: float, send_decode_s: float) -> Stage:
    return Stage(
        node=NodeId("n"), start=0, stop=1, weights_bytes=0, kv_bytes=0, memory_bytes=0, prefill_s=prefill_s, decode_s=0.01,
        send_prefill_s=send_prefill_s, send_decode_s=send_decode_s,
    )  # fmt: skip


PLAN = Plan(
    stages=(stage(0.3, 0.11, 0.01), stage(0.1, 0.01, 0.01)),
    objective=Objective.LATENCY,
    shape=RequestShape(tokens_in=50),
    estimate=Estimate(time_to_first_token_s=0.52, time_per_output_token_s=0.04, tokens_per_s=1.0, latency_s=1.0),
    lower_bound=0.0,
    gap=0.0,
    solver="test",
)


def served(
    foretold: Foretold, clock: ManualClock, *, first_s: float, each_s: float, tokens: int = 10, rows: int = 50
) -> None:
    """A request from its beginning to its end."""
    watched = foretold.begin(rows)
    clock.advance(first_s)
    for number in range(tokens):
        clock.advance(each_s if number else 0.0)
        watched.take(1, clock.now_s())
    foretold.end(watched)
    foretold.end(watched)


def test_a_longer_prompt_takes_longer_in_what_grows_with_it() -> None:
    assert first_token_s(PLAN, 50) == pytest.approx(0.52)
    assert first_token_s(PLAN, 100) == pytest.approx(0.52 + 0.3 + 0.1 + 0.1)


def test_errors_are_of_what_was_measured_and_their_median_is_told() -> None:
    clock = ManualClock()
    foretold = Foretold(PLAN, clock)
    assert foretold.view() is None

    for each_s in (0.05, 0.05, 4.0):
        served(foretold, clock, first_s=0.65, each_s=each_s)

    told = foretold.view()
    assert told is not None
    assert told.requests == 3
    assert told.time_to_first_token_error == pytest.approx(0.2)
    assert told.time_per_output_token_error == pytest.approx(0.2)


def test_requests_that_share_the_pipeline_are_not_compared() -> None:
    clock = ManualClock()
    foretold = Foretold(PLAN, clock)
    one = foretold.begin(50)
    two = foretold.begin(50)
    for watched in (one, two):
        for _ in range(20):
            watched.take(1, clock.now_s())
        foretold.end(watched)

    assert foretold.view() is None
    served(foretold, clock, first_s=0.52, each_s=0.04)
    assert foretold.view() == PredictionView(
        requests=1, time_to_first_token_error=pytest.approx(0.0), time_per_output_token_error=pytest.approx(0.0)
    )


def test_very_long_prompts_and_very_short_answers_tell_nothing() -> None:
    clock = ManualClock()
    foretold = Foretold(PLAN, clock)

    served(foretold, clock, first_s=9.0, each_s=0.04, rows=500)
    served(foretold, clock, first_s=0.52, each_s=9.0, tokens=FEWEST_TOKENS - 1)
    served(foretold, clock, first_s=9.0, each_s=9.0, tokens=0)

    told = foretold.view()
    assert told is not None
    assert told.time_to_first_token_error == pytest.approx(0.0)
    assert told.time_per_output_token_error == pytest.approx(0.0)
