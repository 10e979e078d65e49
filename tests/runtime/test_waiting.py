"""Who waits, in which order, for how long, and what those are told who cannot."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import DeadlineExceededError, OverloadedError
from shoal.ids import DeploymentId, RequestId
from shoal.runtime.frames import Submit
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.request import FinishReason, GenerateRequest, Priority
from shoal.runtime.waiting import Turnover, WaitingLine

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
LastDelta = Callable[[LocalPipeline, str], tuple[FinishReason | None, str]]
BATCH = Priority.BATCH


def submit(name: str, priority: Priority = Priority.INTERACTIVE, deadline_s: float | None = None) -> Submit:
    return Submit(
        request=GenerateRequest(
            request=RequestId(name),
            deployment=DeploymentId("m"),
            prompt=(1,),
            max_tokens=1,
            priority=priority,
            deadline_s=deadline_s,
        )
    )


def order(line: WaitingLine) -> list[str]:
    return [s.request.request for s in line]


def test_interactive_requests_go_before_batch_ones() -> None:
    line = WaitingLine(limit=9)
    line.join(submit("b", BATCH), 0.0)
    line.join(submit("i"), 1.0)
    line.join(submit("j"), 2.0)

    assert order(line) == ["i", "j", "b"]


@given(
    came=st.lists(st.tuples(st.floats(0, 100), st.sampled_from(Priority)), min_size=1, max_size=12),
    patience_s=st.floats(0, 50),
)
def test_nobody_is_overtaken_by_who_came_later_than_patience_allows(
    came: list[tuple[float, Priority]], patience_s: float
) -> None:
    line = WaitingLine(limit=99, patience_s=patience_s)
    arrived = dict(enumerate(sorted(came, key=lambda c: c[0])))
    for n, (at_s, priority) in arrived.items():
        line.join(submit(str(n), priority), at_s)

    places = [int(name) for name in order(line)]
    for n, (at_s, priority) in arrived.items():
        for other in places[: places.index(n)]:
            later_s = arrived[other][0] - at_s
            assert later_s <= (patience_s if priority is BATCH else 0.0)


def crowd(line: WaitingLine, count: int, priority: Priority = Priority.INTERACTIVE) -> list[OverloadedError]:
    """What those are told whom *line* has no room for, of *count* that come at once while four answers are made."""
    refused = []
    for n in range(count):
        line.join(submit(str(n), priority), 0.0)
        found = line.overflow(RequestId(str(n)), running=4)
        if found is not None:
            assert isinstance(found[1], OverloadedError)
            refused.append(found[1])
    return refused


def test_nobody_waits_much_longer_than_an_answer_takes() -> None:
    line = WaitingLine(limit=64, turnover=Turnover(mean_s=8.0, count=3))
    refused = crowd(line, 10)

    assert len(line) == 4  # the fourth begins in 4 * 8 s / 4, the fifth would later than an answer takes
    assert [e.retry_after_s for e in refused] == [2.0] * 6
    assert "4 requests wait before this one: it would begin in about 10 s, and an answer takes 8 s" in str(refused[0])


def test_very_short_answers_do_not_make_the_line_shorter_than_a_quarter_of_a_second() -> None:
    line = WaitingLine(limit=64, turnover=Turnover(mean_s=0.1, count=3))
    crowd(line, 30)

    assert len(line) == 10


def test_batch_work_waits_for_as_long_as_it_takes() -> None:
    line = WaitingLine(limit=64, turnover=Turnover(mean_s=8.0, count=3))

    assert not crowd(line, 30, BATCH)


def test_whoever_was_let_in_before_is_not_sent_away_for_a_crowd() -> None:
    line = WaitingLine(limit=2, turnover=Turnover(mean_s=8.0, count=3))
    crowd(line, 30)
    lost = submit("lost")
    lost = msgspec.structs.replace(lost, request=msgspec.structs.replace(lost.request, admitted=True))
    line.join(lost, 0.0)

    assert line.overflow(RequestId("lost"), running=4) is None


def test_the_line_takes_a_first_crowd_while_nobody_knows_how_long_answers_take() -> None:
    assert not crowd(WaitingLine(limit=64, turnover=Turnover(mean_s=8.0, count=2)), 30)


def test_batch_requests_take_at_most_half_of_the_line() -> None:
    line = WaitingLine(limit=4)
    for n in range(2):
        line.join(submit(f"b{n}", BATCH), 0.0)
        assert line.overflow(RequestId(f"b{n}"), running=1) is None
    line.join(submit("b2", BATCH), 0.0)
    refused = line.overflow(RequestId("b2"), running=1)

    assert refused is not None
    assert isinstance(refused[1], OverloadedError)
    line.join(submit("i"), 0.0)
    assert line.overflow(RequestId("i"), running=1) is None


def test_whoever_finds_the_line_full_is_told_when_a_place_is_likely() -> None:
    line = WaitingLine(limit=6, turnover=Turnover(mean_s=10.0, count=9))
    for n in range(6):
        line.join(submit(str(n)), 0.0)
    line.join(submit("late"), 0.0)

    refused = line.overflow(RequestId("late"), running=2)

    assert refused is not None
    assert refused[1].retry_after_s == pytest.approx(35.0)  # seven answers of 10 s, two at a time
    assert len(line) == 6


def test_a_request_that_cannot_begin_in_time_is_refused_at_once() -> None:
    line = WaitingLine(limit=9, turnover=Turnover(mean_s=10.0, count=9))
    line.join(submit("a"), 0.0)
    line.join(submit("b", deadline_s=9.0), 0.0)
    line.join(submit("c", deadline_s=99.0), 0.0)

    late = line.overflow(RequestId("b"), running=1)

    assert late is not None
    assert isinstance(late[1], DeadlineExceededError)
    assert "in about 20 s" in late[1].message
    assert line.overflow(RequestId("c"), running=1) is None


def test_nobody_is_refused_by_a_forecast_before_answers_have_been_seen() -> None:
    line = WaitingLine(limit=9, turnover=Turnover(mean_s=100.0, count=2))
    line.join(submit("a", deadline_s=0.1), 0.0)

    assert line.overflow(RequestId("a"), running=1) is None


def test_the_mean_follows_a_change_of_load() -> None:
    turnover = Turnover()
    for _ in range(20):
        turnover.ended(2.0)
    assert turnover.mean_s == pytest.approx(2.0)
    for _ in range(20):
        turnover.ended(8.0)

    assert 7.5 < turnover.mean_s < 8.0


def test_who_waits_beyond_the_time_given_is_told(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(slots=1, step_s=lambda _stage, _steps: 1.0)
    pipeline.submit(make_request("a", max_tokens=100))
    pipeline.submit(make_request("b", deadline_s=3.0))
    pipeline.wait(5.0)

    assert last_delta(pipeline, "b") == (FinishReason.ERROR, "deadline_exceeded")
    assert pipeline.deltas[RequestId("b")][-1].retry_after_s is not None
    assert 3.0 <= pipeline.arrivals_s[RequestId("b")][-1] <= 3.5
    assert last_delta(pipeline, "a")[0] is None


def test_an_answer_whose_time_passes_ends_and_its_slot_is_free_on_every_stage(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), slots=1, step_s=lambda _stage, _steps: 0.5)
    pipeline.submit(make_request("a", max_tokens=100, deadline_s=6.0))
    pipeline.submit(make_request("b", max_tokens=2))
    pipeline.wait(12.0)

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "deadline_exceeded")
    assert "6 of at most 100 tokens" in pipeline.deltas[RequestId("a")][-1].error
    assert last_delta(pipeline, "b")[0] is FinishReason.LENGTH
    assert [m.slots.held for m in pipeline.machines] == [{}, {}]


def test_an_answer_in_time_is_not_disturbed_by_its_deadline(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,), step_s=lambda _stage, _steps: 0.1)
    pipeline.submit(make_request("a", max_tokens=8, deadline_s=60.0))
    pipeline.wait(70.0)

    assert pipeline.tokens(RequestId("a")) == make_pipeline().generate(make_request("a", max_tokens=8))


def test_batch_work_leaves_a_quarter_of_the_slots_to_interactive_requests(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(slots=4, step_s=lambda _stage, _steps: 1.0)
    for n in range(4):
        pipeline.submit(make_request(f"b{n}", max_tokens=50, priority=BATCH))
    while not pipeline.tokens(RequestId("b0")):
        pipeline.turn()
    assert len(pipeline.machines[0].first.live) == 3

    pipeline.submit(make_request("i", max_tokens=2))
    for _ in range(12):
        pipeline.turn()
    assert last_delta(pipeline, "i")[0] is FinishReason.LENGTH
    pipeline.run()

    assert all(last_delta(pipeline, f"b{n}")[0] is FinishReason.LENGTH for n in range(4))


def test_batch_work_alone_on_one_slot_runs(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(slots=1)
    pipeline.submit(make_request("b", priority=BATCH))
    pipeline.run()

    assert last_delta(pipeline, "b")[0] is FinishReason.LENGTH


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_no_time_is_refused(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, deadline_s: float
) -> None:
    pipeline = make_pipeline()
    pipeline.submit(make_request("a", deadline_s=deadline_s))
    pipeline.run()

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "invalid_request")
