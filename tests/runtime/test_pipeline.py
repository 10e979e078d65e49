"""Scenarios of whole pipelines in virtual time."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.ids import DeploymentId, RequestId
from shoal.runtime.effects import CreditArrived, InferArrived
from shoal.runtime.frames import SubmitInfer, encode
from shoal.runtime.last import Sampler
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams
from shoal.runtime.sampling import sample
from shoal.runtime.settings import StageSettings, credits_for

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
LastDelta = Callable[[LocalPipeline, str], tuple[FinishReason | None, str]]
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1, frequency_penalty=0.3)


@pytest.mark.parametrize("cuts", [(3,), (2, 4), (1, 2, 3, 4, 5), (0, 6)])
@pytest.mark.parametrize("sampling", [SamplingParams(), SEEDED], ids=["greedy", "seeded"])
def test_a_sharded_pipeline_answers_token_for_token_like_one_stage(
    make_pipeline: Pipelines, make_request: Requests, cuts: tuple[int, ...], sampling: SamplingParams
) -> None:
    request = make_request("a", prompt=300, max_tokens=40, sampling=sampling)

    whole = make_pipeline(context=512).generate(request)
    sharded = make_pipeline(cuts, context=512).generate(request)

    assert len(whole) == 40
    assert len(set(whole)) > 5
    assert sharded == whole


@pytest.mark.parametrize("sampling", [SamplingParams(), SEEDED], ids=["greedy", "seeded"])
def test_a_pipeline_answers_like_a_plain_loop_over_engine_and_sampler(
    make_pipeline: Pipelines, make_request: Requests, sampling: SamplingParams
) -> None:
    request = make_request("a", prompt=10, max_tokens=20, sampling=sampling)
    engine = make_pipeline().stages[0].session
    output: list[int] = []
    for position in range(10, 30):
        start = 0 if position == 10 else position - 1
        ids = [*request.prompt, *output][start:position]
        step = SequenceStep(request=request.request, slot=0, start=start, count=len(ids), logits=1)
        logits = engine.step([step], {"input_ids": np.array([ids])})["logits"][0]
        output.append(sample(logits, sampling, prompt=request.prompt, output=output, position=position).token)

    assert make_pipeline((2,)).generate(request) == output


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    chunk=st.integers(1, 16),
    in_flight=st.integers(1, 5),
    slots=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 6), max_size=3).map(sorted),
)
def test_no_request_ever_disturbs_another(
    make_pipeline: Pipelines,
    make_request: Requests,
    prompts: list[int],
    chunk: int,
    in_flight: int,
    slots: int,
    cuts: list[int],
) -> None:
    requests = [make_request("r" * (i + 1), prompt=n, max_tokens=6, sampling=SEEDED) for i, n in enumerate(prompts)]
    alone = {r.request: make_pipeline().generate(r) for r in requests}
    pipeline = make_pipeline(cuts, slots=slots, chunk=chunk, in_flight=in_flight)

    for request in requests:
        pipeline.submit(request)
    pipeline.run()

    assert {r.request: pipeline.tokens(r.request) for r in requests} == alone
    assert all(machine.slots.held == {} and machine.discarded == 0 for machine in pipeline.machines)


def test_a_finished_answer_frees_its_slot_and_pages_on_every_stage(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((2, 4))

    pipeline.generate(make_request("a"))

    assert last_delta(pipeline, "a") == (FinishReason.LENGTH, "")
    assert [m.slots.held for m in pipeline.machines] == [{}, {}, {}]
    assert [s.session.held_bytes() for s in pipeline.stages] == [0, 0, 0]


def test_cancelling_in_the_middle_frees_the_slot_on_all_stages_and_the_next_in_line_gets_it(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((2, 4), slots=1)
    pipeline.submit(make_request("a", max_tokens=100))
    pipeline.submit(make_request("b", max_tokens=3))
    while len(pipeline.tokens(RequestId("a"))) < 4:
        pipeline.turn()

    pipeline.cancel(RequestId("a"))
    pipeline.run()

    assert last_delta(pipeline, "a") == (FinishReason.CANCELLED, "")
    assert len(pipeline.tokens(RequestId("a"))) < 10
    assert pipeline.tokens(RequestId("b")) == make_pipeline().generate(make_request("b", max_tokens=3))
    assert [s.session.held_bytes() for s in pipeline.stages] == [0, 0, 0]


def test_a_cancelled_answer_reaches_the_last_stage_even_when_nothing_else_runs(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,))
    pipeline.submit(make_request("a", max_tokens=100))
    while len(pipeline.tokens(RequestId("a"))) < 2:
        pipeline.turn()

    pipeline.cancel(RequestId("a"))
    pipeline.run()

    last = pipeline.machines[-1].last
    assert last is not None
    assert last.samplers == {}


def test_cancelling_a_waiting_or_unknown_request_is_harmless(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(slots=1)
    pipeline.submit(make_request("a"))
    pipeline.submit(make_request("b"))
    pipeline.cancel(RequestId("b"))
    pipeline.cancel(RequestId("nobody"))
    pipeline.run()

    assert last_delta(pipeline, "a")[0] is FinishReason.LENGTH
    assert pipeline.tokens(RequestId("b")) == []


def test_more_requests_than_slots_and_queue_are_told_at_once(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), slots=2, queue=1)
    for name in ("a", "bb", "ccc", "dddd"):
        pipeline.submit(make_request(name))
    pipeline.run()

    assert last_delta(pipeline, "dddd") == (FinishReason.ERROR, "overloaded")
    assert [last_delta(pipeline, name)[0] for name in ("a", "bb", "ccc")] == [FinishReason.LENGTH] * 3


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prompt": ()}, "invalid_request"),
        ({"prompt": 256}, "context_length_exceeded"),
        ({"prompt": (1, 64)}, "invalid_request"),
        ({"prompt": (-1,)}, "invalid_request"),
        ({"max_tokens": 0}, "invalid_request"),
        ({"sampling": SamplingParams(top_p=7)}, "invalid_request"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_its_reason(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, change: dict[str, object], code: str
) -> None:
    pipeline = make_pipeline()

    pipeline.generate(make_request("a", **change))

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, code)


def test_a_stop_token_ends_the_answer_and_is_not_delivered(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    tokens = make_pipeline().generate(make_request("a", max_tokens=12))
    stop = tokens[6]
    pipeline = make_pipeline((3,))

    cut = pipeline.generate(make_request("a", max_tokens=12, stop_token_ids=(stop,)))

    assert cut == tokens[: tokens.index(stop)]
    assert last_delta(pipeline, "a")[0] is FinishReason.STOP
    ignored = make_pipeline().generate(make_request("a", max_tokens=12, stop_token_ids=(stop,), ignore_eos=True))
    assert ignored == tokens


def test_the_end_of_the_context_ends_the_answer(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), context=32)

    tokens = pipeline.generate(make_request("a", prompt=20, max_tokens=1000))

    assert len(tokens) == 12
    assert last_delta(pipeline, "a")[0] is FinishReason.LENGTH


def test_logprobs_travel_with_their_token(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,))

    pipeline.generate(make_request("a", sampling=SamplingParams(logprobs=3)))

    first = pipeline.deltas[RequestId("a")][0].tokens[0]
    assert first.position == 5
    assert first.top[0].token == first.token
    assert first.top[0].logprob == first.logprob
    assert len(first.top) == 3


def test_a_long_prompt_delays_another_answer_by_chunks_not_by_its_length(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    """One second per row: the decoding neighbour gets a token at least every other turn of 8 rows."""
    pipeline = make_pipeline(chunk=8, step_s=lambda _stage, steps: float(sum(s.count for s in steps)))
    pipeline.submit(make_request("a", prompt=2, max_tokens=30))
    while not pipeline.tokens(RequestId("a")):
        pipeline.turn()
    pipeline.submit(make_request("bb", prompt=200, max_tokens=2))
    pipeline.run()

    arrivals = np.array(pipeline.arrivals_s[RequestId("a")])
    assert np.diff(arrivals).max() <= 9.0


def test_answers_at_the_same_time_get_equal_turns(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,), slots=3, step_s=lambda _stage, _steps: 1.0)
    names = ("a", "bb", "ccc")
    for name in names:
        pipeline.submit(make_request(name, max_tokens=50))
    while sum(len(pipeline.tokens(RequestId(n))) for n in names) < 60:
        pipeline.turn()

    counts = [len(pipeline.tokens(RequestId(n))) for n in names]
    assert max(counts) - min(counts) <= 2


def test_several_answers_keep_both_stages_busy(make_pipeline: Pipelines, make_request: Requests) -> None:
    """With two sequences in flight two stages of 1 s give a token per second; one alone gives one in two seconds."""

    def seconds(names: tuple[str, ...]) -> float:
        pipeline = make_pipeline((3,), step_s=lambda _stage, _steps: 1.0)
        for name in names:
            pipeline.submit(make_request(name, max_tokens=20))
        pipeline.run()
        return pipeline.clock.now_s()

    assert seconds(("a",)) == 40.0
    assert seconds(("a", "bb")) <= 44.0


def test_chunks_of_a_prompt_follow_each_other_through_the_stages(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), chunk=32, step_s=lambda _stage, _steps: 1.0)

    pipeline.generate(make_request("a", prompt=128, max_tokens=1))

    assert pipeline.clock.now_s() == 5.0  # 4 chunks and one step to empty the pipe, not 8


def test_never_more_frames_than_credits_are_on_their_way(make_pipeline: Pipelines, make_request: Requests) -> None:
    """The second stage is a hundred times slower; the first must not run away from it."""
    pipeline = make_pipeline((3,), chunk=1, in_flight=50, step_s=lambda stage, _steps: 0.01 + stage)
    pipeline.submit(make_request("a", prompt=40, max_tokens=2))
    most = 0
    while pipeline.turn():
        most = max(most, len(pipeline.machines[0].edge.unacked), len(pipeline.machines[1].inbox) + 1)

    assert most == 4
    assert len(pipeline.tokens(RequestId("a"))) == 2


def test_a_long_link_takes_all_frames_that_may_be_in_the_pipeline_in_one_round_trip(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    """Eight answers, a frame each, over 50 ms each way: a lap is a round trip and two steps, not two round trips."""

    def seconds(frames_out: int) -> float:
        pipeline = make_pipeline(
            (3,), slots=8, in_flight=8, frames_out=frames_out, step_s=lambda *_: 0.005, hop_s=lambda *_: 0.05
        )
        for number in range(8):
            pipeline.submit(make_request("abcdefgh"[number] * (number + 1), max_tokens=21))
        pipeline.run()
        return pipeline.clock.now_s()

    assert seconds(credits_for(8)) < 2.5
    assert seconds(4) > 4.5


@pytest.mark.parametrize(("cuts", "with_credits"), [((3,), False), ((2, 4), True)])
def test_between_two_stages_answers_are_the_credits(
    make_pipeline: Pipelines, make_request: Requests, cuts: tuple[int, ...], with_credits: bool
) -> None:
    pipeline = make_pipeline(cuts)
    pipeline.submit(make_request("a", max_tokens=9))
    told: set[bool] = set()
    while pipeline.turn() and len(pipeline.tokens(RequestId("a"))) < 9:
        told |= {isinstance(item, CreditArrived) for *_, item in pipeline._queue}
    pipeline.run()

    assert (True in told) == with_credits
    assert all(not machine.edge.unacked for machine in pipeline.machines)


def test_sampling_a_position_again_forgets_what_came_after_it() -> None:
    sampler = Sampler((1, 2), SamplingParams(frequency_penalty=2.0))
    logits = np.array([3.0, 2.0, 1.5], np.float32)
    first = [sampler.take(logits, p).token for p in (2, 3)]

    again = [sampler.take(logits, p).token for p in (2, 3)]

    assert first == again == [0, 1]


def test_a_plain_model_runs_through_the_stages(make_pipeline: Pipelines) -> None:
    """Three stages, each adds one to what it is given; `mask` is needed only by the last."""
    pipeline = LocalPipeline([LocalStage(plain(i), AddOne()) for i in range(3)])
    submit = SubmitInfer(request=RequestId("i"), deployment=DeploymentId("m"), reply_to="gateway")
    tensors = {"x": np.zeros((2, 3), np.float32), "mask": np.ones(2, np.float32)}

    pipeline.give(0, InferArrived(submit=submit, tensors=tensors))
    pipeline.run()

    result = pipeline.results[RequestId("i")]
    assert result.reply_to == "gateway"
    assert result.done.error_code == ""
    assert result.tensors["x"].tolist() == [[3.0] * 3] * 2
    assert pipeline.machines[0].first.flights.out == {}


def test_a_plain_model_that_fails_says_so_to_its_caller() -> None:
    pipeline = LocalPipeline([LocalStage(plain(i), AddOne()) for i in range(3)])
    submit = SubmitInfer(request=RequestId("i"), deployment=DeploymentId("m"))

    pipeline.give(0, InferArrived(submit=submit, tensors={"mask": np.ones(2, np.float32)}))
    pipeline.run()

    assert pipeline.results[RequestId("i")].done.error_code == "invalid_request"


def plain(index: int) -> StageSettings:
    return StageSettings(plan_epoch=1, index=index, stages=3, sends=("x", "mask") if index < 2 else ())


class AddOne:
    """A plain model's session."""

    def step(self, sequences: object, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "x" not in tensors:
            raise InvalidRequestError("x is missing")
        return {"x": tensors["x"] + 1}

    def release(self, slot: int) -> None:
        raise AssertionError(slot)

    def close(self) -> None:
        pass


def test_a_decode_frame_is_small_on_the_wire(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,))
    pipeline.generate(make_request("chatcmpl-0123456789abcdef", prompt=100))

    decode = [f for f in pipeline.sent if f.sequences and not f.opened]
    assert len(decode) == 7
    assert max(len(encode(f)) for f in decode) < 100
