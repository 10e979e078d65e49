"""What goes wrong between stages ends the answers that it must, and no others."""

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import pytest

from shoal.ids import RequestId
from shoal.runtime.effects import (
    Abandon,
    BatchArrived,
    RunStep,
    SendTokens,
    StepDone,
    Tick,
    TokensArrived,
)
from shoal.runtime.frames import BatchFrame, ClosedSequence, OpenedSequence, RequestTokens, TokensFrame
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import FinishReason, GenerateRequest, OutputDelta, SampledToken
from shoal.runtime.stage import advance
from shoal.runtime.stage_state import start

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
LastDelta = Callable[[LocalPipeline, str], tuple[FinishReason | None, str]]


def test_frames_of_another_plan_epoch_are_dropped_and_counted(make_pipeline: Pipelines, make_request: Requests) -> None:
    request = make_request("a")
    pipeline = make_pipeline((3,))
    pipeline.submit(request)
    pipeline.turn()
    rows = SequenceStep(request=RequestId("a"), slot=0, start=0, count=1, logits=1)
    stale = BatchFrame(
        plan_epoch=2, step=0, sequences=(rows,), opened=(OpenedSequence(request=RequestId("a"), slot=0, prompt=(1,)),)
    )

    pipeline.give(1, BatchArrived(frame=stale, tensors={}))
    pipeline.give(0, TokensArrived(frame=TokensFrame(plan_epoch=2, step=0)))
    pipeline.run()

    assert [m.discarded for m in pipeline.machines] == [1, 1]
    assert pipeline.tokens(RequestId("a")) == make_pipeline().generate(request)


@pytest.mark.parametrize(
    "rows",
    [
        {"slot": 99}, {"slot": -1}, {"start": -1}, {"count": 0}, {"count": 10_000}, {"logits": 2},
    ],
)  # fmt: skip
def test_impossible_frames_are_dropped_and_counted(make_pipeline: Pipelines, rows: dict[str, int]) -> None:
    pipeline = make_pipeline((3,))
    values = {"slot": 0, "start": 0, "count": 1, "logits": 1} | rows
    frame = BatchFrame(plan_epoch=3, step=0, sequences=(SequenceStep(request=RequestId("x"), **values),))

    pipeline.give(1, BatchArrived(frame=frame, tensors={"hidden": np.zeros((1, 1, 4), np.float32)}))
    pipeline.run()

    assert pipeline.machines[1].discarded == 1


def test_a_frame_that_comes_twice_is_run_once(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,))
    pipeline.submit(make_request("a"))
    while not pipeline.sent:
        pipeline.turn()
    (_, _, stage, given) = next(item for item in pipeline._queue if isinstance(item[3], BatchArrived))

    pipeline.give(stage, given)
    pipeline.run()

    assert pipeline.machines[1].discarded == 1
    assert pipeline.tokens(RequestId("a")) == make_pipeline().generate(make_request("a"))


def lossy(pipeline: LocalPipeline, lost: int) -> None:
    """Run, dropping the *lost*-th frame to the second stage."""
    seen = 0
    while pipeline._queue:
        arrivals = [i for i in pipeline._queue if i[2] == 1 and isinstance(i[3], BatchArrived)]
        if arrivals and min(pipeline._queue) is arrivals[0]:
            seen += 1
            if seen == lost:
                pipeline._queue.remove(arrivals[0])
                pipeline._queue.sort()
                continue
        pipeline.turn()


def test_a_lost_frame_fails_its_request_as_shard_lost_and_no_other(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), slots=2, chunk=4)
    pipeline.submit(make_request("a", prompt=8, max_tokens=3))
    pipeline.submit(make_request("bb", prompt=4, max_tokens=6))

    lossy(pipeline, lost=1)

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "shard_lost")
    assert pipeline.tokens(RequestId("bb")) == make_pipeline(chunk=4).generate(
        make_request("bb", prompt=4, max_tokens=6)
    )
    assert [m.slots.held for m in pipeline.machines] == [{}, {}]


def test_a_chunk_lost_from_the_middle_of_a_prompt_is_noticed(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), chunk=4)
    pipeline.submit(make_request("a", prompt=12, max_tokens=3))

    lossy(pipeline, lost=2)

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "shard_lost")
    assert [m.slots.held for m in pipeline.machines] == [{}, {}]


def test_a_request_whose_only_frame_was_lost_fails_within_seconds(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((2, 4))
    pipeline.submit(make_request("a"))
    lossy(pipeline, lost=1)

    pipeline.wait(9.0)

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "shard_lost")
    assert pipeline.suspects == []
    assert pipeline.generate(make_request("b")) == make_pipeline().generate(make_request("b"))


@pytest.mark.parametrize("cuts", [(3,), (2, 4)])
@pytest.mark.parametrize("edge", [0, 1, -1])
def test_a_link_that_lost_everything_and_comes_back_carries_answers_again(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, cuts: tuple[int, ...], edge: int
) -> None:
    """Whatever is lost, in however many goes: credit windows that are full of lost frames open again."""
    broken = {"now": False}
    source = edge % (len(cuts) + 1)
    pipeline = make_pipeline(
        cuts, slots=4, chunk=2, in_flight=8, passes=lambda a, _: not (broken["now"] and a == source)
    )
    for attempt in range(3):
        broken["now"] = True
        for n in range(4):
            pipeline.submit(make_request(f"lost{attempt}{n}", prompt=9))
        pipeline.wait(4.0)  # no time to be sure that the link is broken
        broken["now"] = False
        pipeline.wait(12.0)
        ends = {last_delta(pipeline, f"lost{attempt}{n}") for n in range(4)}
        assert {finish for finish, _ in ends} <= {FinishReason.ERROR, FinishReason.LENGTH}

        pipeline.submit(make_request(f"next{attempt}"))
        pipeline.wait(1.0)

        assert pipeline.tokens(RequestId(f"next{attempt}")) == make_pipeline().generate(make_request(f"next{attempt}"))
    assert pipeline.suspects == []
    assert [m.slots.held for m in pipeline.machines] == [{}] * len(pipeline.machines)


@pytest.mark.parametrize(
    ("cuts", "lost"), [((3,), (0, 1)), ((2, 4), (0, 1)), ((2, 4), (1, 2)), ((2, 4), (2, 0))], ids=str
)
def test_a_pipeline_that_was_stuck_for_long_serves_again_when_its_frames_arrive_again(
    last_delta: LastDelta,
    make_pipeline: Pipelines,
    make_request: Requests,
    cuts: tuple[int, ...],
    lost: tuple[int, int],
) -> None:
    """Every stage shows signs of life all the time; nobody plans anew, and nobody asks for anything meanwhile."""
    broken = {"now": True}
    pipeline = make_pipeline(cuts, slots=1, passes=lambda a, b: not (broken["now"] and (a, b) == lost))
    pipeline.submit(make_request("a"))
    pipeline.wait(180.0)
    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "shard_lost")
    assert "no answer has come out" in pipeline.machines[0].trouble
    assert len(pipeline.machines[0].first.flights.out) <= 1  # type: ignore[union-attr]
    pipeline.submit(make_request("refused"))
    pipeline.wait(0.25)
    assert last_delta(pipeline, "refused") == (FinishReason.ERROR, "shard_lost")

    broken["now"] = False
    pipeline.wait(12.0)
    pipeline.submit(make_request("next"))
    pipeline.wait(5.0)

    assert pipeline.tokens(RequestId("next")) == make_pipeline().generate(make_request("next"))
    assert [m.trouble + m.behind for m in pipeline.machines] == [""] * len(pipeline.machines)
    assert [m.slots.held for m in pipeline.machines] == [{}] * len(pipeline.machines)


@pytest.mark.parametrize("silent", [1, 2])
def test_a_silent_stage_ends_every_answer_and_refuses_others_until_it_shows_life(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, silent: int
) -> None:
    frozen: set[int] = set()
    pipeline = make_pipeline((2, 4), slots=1, passes=lambda a, b: not frozen & {a, b}, step_s=lambda *_: 0.1)
    for name in ("a", "bb"):
        pipeline.submit(make_request(name, max_tokens=200))
    pipeline.wait(3.0)
    frozen.add(silent)
    pipeline.wait(14.0)

    assert last_delta(pipeline, "a") == last_delta(pipeline, "bb") == (FinishReason.ERROR, "shard_lost")
    assert silent - 1 in pipeline.suspects
    assert f"stage {silent} has shown no sign of life" in pipeline.machines[silent - 1].trouble
    pipeline.submit(make_request("refused"))
    pipeline.wait(0.25)
    assert last_delta(pipeline, "refused") == (FinishReason.ERROR, "shard_lost")

    frozen.clear()
    pipeline.wait(5.0)
    pipeline.submit(make_request("c"))
    pipeline.wait(5.0)
    assert pipeline.tokens(RequestId("c")) == make_pipeline().generate(make_request("c"))
    assert [m.trouble + m.behind for m in pipeline.machines] == ["", "", ""]


def test_neither_a_long_step_nor_a_slow_link_is_taken_for_a_broken_one(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    """40 s for a step of the last stage, 15 s for a frame on the link to it: far beyond every limit on silence."""

    def hop_s(source: int, target: int, *_: object) -> float:
        return 15.0 if (source, target) == (1, 2) else 0.01

    request = make_request("a", prompt=24, max_tokens=3)
    pipeline = make_pipeline((2, 4), chunk=4, step_s=lambda stage, _: 40.0 if stage == 2 else 0.1, hop_s=hop_s)
    pipeline.submit(request)
    pipeline.wait(600.0)

    assert pipeline.suspects == []
    assert pipeline.tokens(RequestId("a")) == make_pipeline(chunk=4).generate(request)


def test_an_engine_that_hangs_in_a_living_worker_ends_every_answer(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), slots=1, step_s=lambda stage, _: 1e6 if stage else 0.0)
    for name in ("a", "bb"):
        pipeline.submit(make_request(name))
    pipeline.wait(119.0)
    assert last_delta(pipeline, "a")[0] is None

    pipeline.wait(3.0)

    assert last_delta(pipeline, "a") == last_delta(pipeline, "bb") == (FinishReason.ERROR, "shard_lost")
    assert pipeline.suspects == [0]


@pytest.mark.parametrize("restarted", [0, 1, 2])
@pytest.mark.parametrize("running", [False, True])
def test_a_stage_that_was_started_anew_fits_in_again(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, restarted: int, running: bool
) -> None:
    """Its machine and its cache are empty; the others have served before and know steps that it has never counted."""
    pipeline = make_pipeline((2, 4), slots=2, step_s=lambda *_: 0.1)
    pipeline.submit(make_request("before"))
    pipeline.wait(5.0)
    if running:
        pipeline.submit(make_request("cut", max_tokens=200))
        pipeline.wait(2.05)

    settings = msgspec.structs.replace(pipeline.stages[restarted].settings, run=7 if restarted == 0 else 0)
    pipeline.machines[restarted] = start(settings)
    for slot in range(2):
        pipeline.stages[restarted].session.release(slot)
    pipeline.wait(12.0)

    if running and restarted:
        assert last_delta(pipeline, "cut") == (FinishReason.ERROR, "shard_lost")
    for name in ("x", "yy"):
        pipeline.submit(make_request(name))
    pipeline.wait(10.0)
    for name in ("x", "yy"):
        assert pipeline.tokens(RequestId(name)) == make_pipeline().generate(make_request(name))
    assert [m.slots.held for m in pipeline.machines] == [{}, {}, {}]


def test_answers_to_an_older_run_are_nobodys(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,))
    request = make_request("a")
    pipeline.submit(request)
    while not pipeline.sent:
        pipeline.turn()
    token = RequestTokens(request=RequestId("a"), tokens=(SampledToken(token=1, position=len(request.prompt)),))

    pipeline.give(0, TokensArrived(frame=TokensFrame(plan_epoch=3, step=0, run=9, tokens=(token,))), after_s=-1.0)
    pipeline.run()

    assert pipeline.tokens(RequestId("a")) == make_pipeline().generate(request)


def test_a_token_for_another_position_than_the_next_ends_the_answer_as_malformed(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,))
    pipeline.submit(make_request("a"))
    while not pipeline.sent:
        pipeline.turn()
    wrong = RequestTokens(request=RequestId("a"), tokens=(SampledToken(token=1, position=9),))

    pipeline.give(0, TokensArrived(frame=TokensFrame(plan_epoch=3, step=0, tokens=(wrong,))), after_s=-1.0)
    pipeline.run()

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "malformed_frame")


def test_rows_after_a_gap_are_not_run(make_pipeline: Pipelines) -> None:
    settings = make_pipeline((3,)).stages[1].settings
    state, name = start(settings), RequestId("a")

    def frame(step: int, begin: int, *, opened: bool = False) -> BatchArrived:
        rows = SequenceStep(request=name, slot=0, start=begin, count=4, logits=0)
        new = (OpenedSequence(request=name, slot=0, prompt=(1,) * 12),) if opened else ()
        hidden = {"hidden": np.zeros((1, 4, 4), np.float32)}
        return BatchArrived(frame=BatchFrame(plan_epoch=3, step=step, sequences=(rows,), opened=new), tensors=hidden)

    advance(state, frame(0, 0, opened=True))
    advance(state, StepDone(outputs={}))
    _, effects = advance(state, frame(2, 8))

    answers = [e.frame for e in effects if isinstance(e, SendTokens)]
    assert [f.code for f in answers[0].failed] == ["shard_lost"]
    assert not any(isinstance(e, RunStep) for e in effects)


def test_neighbours_in_the_frame_of_a_lost_sequence_go_on(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    """All sequences share each frame; the second stage has forgotten the first of three."""
    pipeline = make_pipeline((3,), slots=3, in_flight=1)
    names = ("a", "bb", "ccc")
    for name in names:
        pipeline.submit(make_request(name, max_tokens=12))
    while len(pipeline.tokens(RequestId("ccc"))) < 3:
        pipeline.turn()
    while pipeline.machines[1].running:
        pipeline.turn()
    pipeline.machines[1].slots.close(ClosedSequence(request=RequestId("bb"), slot=1))
    pipeline.run()

    assert any(len(f.sequences) == 3 for f in pipeline.sent)
    assert last_delta(pipeline, "bb") == (FinishReason.ERROR, "shard_lost")
    for name in ("a", "ccc"):
        assert pipeline.tokens(RequestId(name)) == make_pipeline().generate(make_request(name, max_tokens=12))


def test_every_request_gets_signs_of_life_while_it_waits(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline(slots=1)
    pipeline.clock.advance(5000.0)
    for name in ("a", "bb"):
        pipeline.submit(make_request(name))
    pipeline.turn()
    pipeline.turn()
    for now_s in (5000.0, 5001.0):
        assert advance(pipeline.machines[0], Tick(now_s=now_s))[1] == ()
    _, effects = advance(pipeline.machines[0], Tick(now_s=5002.0))

    assert [e.delta for e in effects] == [OutputDelta(request=RequestId("bb")), OutputDelta(request=RequestId("a"))]


def test_a_stage_whose_engine_fails_ends_the_answer_with_an_error_and_serves_the_next(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((2, 4))
    pipeline.submit(make_request("a", max_tokens=50))
    while len(pipeline.tokens(RequestId("a"))) < 3:
        pipeline.turn()
    pipeline.stages[1].session.release(0)  # its cache is gone: the next step must fail
    pipeline.run()

    assert last_delta(pipeline, "a")[0] is FinishReason.ERROR
    assert pipeline.generate(make_request("bb")) == make_pipeline().generate(make_request("bb"))


def test_abandoning_fails_every_request_running_and_waiting(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), slots=1)
    for name in ("a", "bb"):
        pipeline.submit(make_request(name, max_tokens=100))
    while not pipeline.tokens(RequestId("a")):
        pipeline.turn()

    pipeline.give(0, Abandon(code="shard_lost", text="stage 1 died"))
    pipeline.run()

    assert last_delta(pipeline, "a") == last_delta(pipeline, "bb") == (FinishReason.ERROR, "shard_lost")


def test_numbers_that_are_not_finite_end_their_sequence_and_name_the_stage_that_sent_them(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((2, 4), in_flight=1)
    session = pipeline.stages[1].session
    step = session.step

    class Broken:
        """Sends NaN for the rows of one request, once both answer."""

        def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            done = step(sequences, tensors)
            at = [n for n, s in enumerate(sequences) if s.request == "bb" and s.count == 1]
            if len(sequences) == 2 and at:
                next(iter(done.values()))[:, at] = np.nan
            return done

        def release(self, slot: int) -> None:
            session.release(slot)

    stages = list(pipeline.stages)
    stages[1] = type(stages[1])(stages[1].settings, Broken())  # type: ignore[arg-type]
    pipeline = LocalPipeline(stages)
    for name in ("a", "bb"):
        pipeline.submit(make_request(name, max_tokens=12))
    pipeline.run()

    assert last_delta(pipeline, "bb") == (FinishReason.ERROR, "shard_lost")
    assert "stage 1 sent numbers that are not finite" in pipeline.deltas[RequestId("bb")][-1].error
    assert pipeline.tokens(RequestId("a")) == make_pipeline().generate(make_request("a", max_tokens=12))
    assert not any(machine.slots.held for machine in pipeline.machines)
