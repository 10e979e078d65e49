"""How many ids to guess: as many as pay, none where none do, and never so that much time is lost."""

from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import GenerateRequest
from shoal.runtime.speculate.draft import Draft
from shoal.runtime.speculate.speculator import Speculation
from shoal.runtime.speculate.worth import Chances, Ledger, Prices, best_length, expected_tokens

Requests = Callable[..., GenerateRequest]
Pipelines = Callable[..., LocalPipeline]


@given(
    chance=st.floats(0, 1),
    lap_s=st.floats(0.001, 10),
    row_s=st.floats(0.0001, 10),
    most=st.integers(0, 20),
    others=st.integers(0, 8),
)
def test_the_chosen_length_is_the_best_by_the_forecast(
    chance: float, lap_s: float, row_s: float, most: int, others: int
) -> None:
    chosen = best_length(chance, Prices(lap_s=lap_s, row_s=row_s), most, others=others)
    rates = [(others + expected_tokens(chance, k)) / (lap_s + k * row_s) for k in range(most + 1)]

    assert rates[chosen] == max(rates) if chosen else max(rates) <= 1.05 * rates[0]


def test_a_long_lap_makes_more_guesses_worth_their_price() -> None:
    lengths = [best_length(0.7, Prices(lap_s=lap_s, row_s=0.01), 16) for lap_s in (0.01, 0.02, 0.1, 1.0)]

    assert lengths == sorted(lengths)
    assert lengths[0] == 0 < lengths[-1]


def test_sequences_that_wait_for_the_rows_of_one_make_fewer_guesses_worth_their_price() -> None:
    alone, crowded = (best_length(0.6, Prices(lap_s=0.05, row_s=0.01), 16, others=n) for n in (0, 7))

    assert crowded < alone


def test_chances_follow_what_was_right_and_forget_what_is_long_ago() -> None:
    chances = Chances()
    for _ in range(100):
        chances.judged(4, right=4, guessed=4)
    good = chances.chance(4, 0.5)
    for _ in range(200):
        chances.judged(4, right=0, guessed=4)

    assert good > 0.95
    assert chances.chance(4, 0.5) < 0.1
    assert chances.chance(8, 0.5) == 0.5


@settings(max_examples=200)
@given(
    lap_s=st.floats(0.005, 1),
    row_share=st.floats(0, 3),
    luck=st.lists(st.booleans(), min_size=400, max_size=400),
    chance=st.sampled_from([0.0, 0.3, 1.0]),
    sequences=st.integers(1, 6),
)
def test_whatever_guesses_cost_and_however_wrong_they_are_little_time_is_lost(
    lap_s: float, row_share: float, luck: list[bool], chance: float, sequences: int
) -> None:
    ledger, took_s, tokens = Ledger(), 0.0, 0
    worst_s = lap_s * (1 + 8 * row_share)
    for lucky in luck:
        prices = ledger.prices(sequences)
        guessed = 0 if prices is None else 8
        extra = 8 if guessed and lucky and chance else 0
        lap = lap_s * (1 + guessed * row_share)
        ledger.lapped(lap, sequences, guessed, extra)
        took_s += lap
        tokens += sequences + extra

    plain_s = tokens / sequences * lap_s
    assert took_s <= 1.05 * plain_s + worst_s


class Guesser:
    """Always has a guess, right or wrong."""

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer = answer
        self.known = 0

    def open(self, request: GenerateRequest) -> None:
        self.known = -len(request.prompt)

    def learn(self, request: RequestId, ids: Sequence[int]) -> None:
        self.known += len(ids)

    def propose(self, request: RequestId, most: int) -> Draft:
        return Draft(ids=tuple(self.answer[self.known : self.known + most]), match=16)

    def close(self, request: RequestId) -> None:
        pass


@pytest.fixture
def timed(make_pipeline: Pipelines) -> Callable[..., float]:
    """Seconds of virtual time of an answer in two stages, *hop_s* apart; one row takes 10 ms and each more *row_s*."""

    def run(request: GenerateRequest, drafter: Guesser, most: int, *, row_s: float, hop_s: float) -> float:
        def step_s(_stage: int, sequences: Sequence[SequenceStep]) -> float:
            return 0.01 + row_s * (sum(s.count for s in sequences) - 1)

        pipeline = make_pipeline((3,), step_s=step_s, hop_s=lambda *_: hop_s, drafter=drafter)
        stages = [
            type(s)(msgspec.structs.replace(s.settings, speculation=Speculation(most=most)), s.session)
            for s in pipeline.stages
        ]
        pipeline = LocalPipeline(stages, step_s=step_s, hop_s=pipeline.hop_s, drafter=drafter)
        pipeline.generate(request)
        return pipeline.clock.now_s()

    return run


def test_right_guesses_over_a_slow_link_are_worth_many_laps(
    make_pipeline: Pipelines, make_request: Requests, timed: Callable[..., float]
) -> None:
    request = make_request("a", prompt=9, max_tokens=200)
    plain = make_pipeline().generate(request)
    without_s = timed(request, Guesser(plain), 0, row_s=0.004, hop_s=0.05)
    with_s = timed(request, Guesser(plain), 16, row_s=0.004, hop_s=0.05)

    assert with_s < without_s / 4


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_s=st.floats(0.0, 0.02), hop_s=st.floats(0.0, 0.1), wrong=st.integers(1, 6))
def test_wrong_guesses_cost_less_than_a_twentieth(
    make_pipeline: Pipelines,
    make_request: Requests,
    timed: Callable[..., float],
    row_s: float,
    hop_s: float,
    wrong: int,
) -> None:
    request = make_request("a", prompt=9, max_tokens=240)
    plain = make_pipeline().generate(request)
    guesses = [(t + 1) % 64 if n % wrong == 0 else t for n, t in enumerate(plain)]
    without_s = timed(request, Guesser(guesses), 0, row_s=row_s, hop_s=hop_s)
    with_s = timed(request, Guesser(guesses), 16, row_s=row_s, hop_s=hop_s)

    assert with_s <= 1.05 * without_s + 2 * (0.02 + 16 * row_s + 2 * hop_s)
