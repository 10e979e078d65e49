"""An answer that goes on elsewhere is the one that would have come."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1, frequency_penalty=0.3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.integers(1, 60),
    tokens=st.integers(2, 40),
    lost=st.lists(st.integers(1, 39), max_size=3),
    chunk=st.integers(3, 50),
    cuts=st.sampled_from([(), (3,), (2, 4)]),
    reproducible=st.booleans(),
    others=st.integers(0, 2),
)
def test_whenever_it_is_lost_and_wherever_it_goes_on_the_answer_is_the_same(
    make_pipeline: Pipelines,
    make_request: Requests,
    prompt: int,
    tokens: int,
    lost: list[int],
    chunk: int,
    cuts: tuple[int, ...],
    reproducible: bool,
    others: int,
) -> None:
    request = make_request("a", prompt=prompt, max_tokens=tokens, sampling=SEEDED, reproducible=reproducible)
    whole = make_pipeline(cuts).generate(request)
    answer: list[int] = []
    for at in [*sorted({min(at, tokens - 1) for at in lost}), tokens]:
        pipeline = make_pipeline(cuts, chunk=chunk, slots=3)
        for n in range(others):
            pipeline.submit(make_request(f"o{n}", prompt=20 + n, max_tokens=30))
        pipeline.submit(msgspec.structs.replace(request, resume=tuple(answer)))
        while len(answer) + len(pipeline.tokens(RequestId("a"))) < at:
            pipeline.turn()
        answer += pipeline.tokens(RequestId("a"))

    assert answer == whole
    assert pipeline.deltas[RequestId("a")][-1].finish is FinishReason.LENGTH


def test_rows_of_a_reproducible_answer_are_computed_one_by_one_as_they_were(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    counts = []
    for reproducible in (True, False):
        pipeline = make_pipeline((3,), chunk=10)
        request = make_request("a", prompt=12, max_tokens=20, resume=(1, 2, 3, 4, 5), reproducible=reproducible)
        pipeline.generate(request)
        counts.append([s.count for frame in pipeline.sent for s in frame.sequences if s.start < 17])

    assert counts == [[10, 2, 1, 1, 1, 1, 1], [10, 7]]


def test_where_speed_counts_for_more_they_are_computed_in_chunks(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    request = make_request("a", prompt=12, max_tokens=20, resume=(1, 2, 3, 4, 5), reproducible=True)
    whole = make_pipeline((3,)).generate(request)
    pipeline = make_pipeline((3,), chunk=10, replays_exactly=False)

    assert pipeline.generate(request) == whole
    assert [s.count for frame in pipeline.sent for s in frame.sequences if s.start < 17] == [10, 7]


@pytest.mark.parametrize(
    ("resume", "max_tokens", "context", "code"),
    [
        ((1, 2), 2, 64, "invalid_request"),
        (tuple(range(50)), 90, 32, "context_length_exceeded"),
        ((99,), 9, 64, "invalid_request"),
    ],
    ids=["nothing is left", "the context is full", "an id outside of the vocabulary"],
)
def test_what_cannot_go_on_is_refused(
    make_pipeline: Pipelines,
    make_request: Requests,
    resume: tuple[int, ...],
    max_tokens: int,
    context: int,
    code: str,
) -> None:
    pipeline = make_pipeline(context=context)
    pipeline.generate(make_request("a", prompt=5, max_tokens=max_tokens, resume=resume))

    assert pipeline.deltas[RequestId("a")][-1].error_code == code
