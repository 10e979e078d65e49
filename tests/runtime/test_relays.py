"""Pipelines in which frames pass through a stage without blocks: nobody's answer changes, and its faults are any stage's."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import DeploymentId, RequestId
from shoal.runtime.backend.passing import PassingSession
from shoal.runtime.effects import BatchArrived, InferArrived, Tensors
from shoal.runtime.frames import BatchFrame, InferStep, SubmitInfer
from shoal.runtime.pipeline import LocalPipeline, Message
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
LastDelta = Callable[[LocalPipeline, str], tuple[FinishReason | None, str]]
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1)
RELAYED = (3, 3)
"""Layers 0 to 2, a relay, layers 3 to 5."""


def relays(pipeline: LocalPipeline) -> list[int]:
    return [i for i, stage in enumerate(pipeline.stages) if isinstance(stage.session, PassingSession)]


@pytest.mark.parametrize(
    ("cuts", "where"), [(RELAYED, [1]), ((2, 2, 4), [1]), ((2, 2, 4, 4), [1, 3]), ((3, 3, 3), [1, 2])], ids=str
)
@pytest.mark.parametrize("sampling", [SamplingParams(), SEEDED], ids=["greedy", "seeded"])
def test_a_pipeline_with_relays_answers_token_for_token_like_the_one_without(
    make_pipeline: Pipelines,
    make_request: Requests,
    cuts: tuple[int, ...],
    where: list[int],
    sampling: SamplingParams,
) -> None:
    request = make_request("a", prompt=300, max_tokens=40, sampling=sampling)
    relayed = make_pipeline(cuts, context=512)
    assert relays(relayed) == where

    direct = make_pipeline(tuple(dict.fromkeys(cuts)), context=512).generate(request)

    assert len(set(direct)) > 5
    assert relayed.generate(request) == direct


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    chunk=st.integers(1, 16),
    in_flight=st.integers(1, 5),
    slots=st.integers(1, 3),
)
def test_requests_through_a_relay_do_not_disturb_each_other(
    make_pipeline: Pipelines, make_request: Requests, prompts: list[int], chunk: int, in_flight: int, slots: int
) -> None:
    requests = [make_request("r" * (i + 1), prompt=n, max_tokens=6, sampling=SEEDED) for i, n in enumerate(prompts)]
    alone = {r.request: make_pipeline().generate(r) for r in requests}
    pipeline = make_pipeline((2, 2, 4, 4), slots=slots, chunk=chunk, in_flight=in_flight)

    for request in requests:
        pipeline.submit(request)
    pipeline.run()

    assert {r.request: pipeline.tokens(r.request) for r in requests} == alone
    assert all(machine.slots.held == {} and machine.discarded == 0 for machine in pipeline.machines)


def test_a_cancelled_answer_frees_its_slot_behind_the_relay_too(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(RELAYED, slots=1)
    pipeline.submit(make_request("a", max_tokens=100))
    pipeline.submit(make_request("b", max_tokens=3))
    while len(pipeline.tokens(RequestId("a"))) < 4:
        pipeline.turn()

    pipeline.cancel(RequestId("a"))
    pipeline.run()

    assert last_delta(pipeline, "a") == (FinishReason.CANCELLED, "")
    assert pipeline.tokens(RequestId("b")) == make_pipeline().generate(make_request("b", max_tokens=3))
    assert [m.slots.held for m in pipeline.machines] == [{}, {}, {}]
    assert [pipeline.stages[i].session.held_bytes() for i in (0, 2)] == [0, 0]  # type: ignore[attr-defined]


def test_a_relay_that_dies_ends_every_answer_as_shard_lost(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    dead: set[int] = set()
    pipeline = make_pipeline(RELAYED, slots=1, passes=lambda a, b: not dead & {a, b}, step_s=lambda *_: 0.1)
    for name in ("a", "bb"):
        pipeline.submit(make_request(name, max_tokens=200))
    pipeline.wait(3.0)

    dead.add(1)
    pipeline.wait(14.0)

    assert last_delta(pipeline, "a") == last_delta(pipeline, "bb") == (FinishReason.ERROR, "shard_lost")
    assert "stage 1 has shown no sign of life" in pipeline.machines[0].trouble
    assert 0 in pipeline.suspects


def test_a_stage_that_dies_behind_a_relay_is_noticed_at_the_first(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    dead: set[int] = set()
    pipeline = make_pipeline(RELAYED, passes=lambda a, b: not dead & {a, b}, step_s=lambda *_: 0.1)
    pipeline.submit(make_request("a", max_tokens=200))
    pipeline.wait(3.0)

    dead.add(2)
    pipeline.wait(14.0)

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "shard_lost")
    assert "stage 2 has shown no sign of life" in pipeline.machines[0].behind


@pytest.mark.parametrize("edge", [0, 1])
def test_a_frame_lost_before_or_behind_a_relay_fails_its_request_and_no_later_one(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, edge: int
) -> None:
    broken = {"now": True}
    pipeline = make_pipeline(RELAYED, chunk=2, passes=lambda a, _: not (broken["now"] and a == edge))
    pipeline.submit(make_request("a", prompt=9))
    pipeline.wait(4.0)
    broken["now"] = False
    pipeline.wait(12.0)

    pipeline.submit(make_request("b"))
    pipeline.wait(1.0)

    assert last_delta(pipeline, "a") == (FinishReason.ERROR, "shard_lost")
    assert pipeline.tokens(RequestId("b")) == make_pipeline().generate(make_request("b"))


def test_a_relay_passes_an_inference_on_as_it_came(make_pipeline: Pipelines) -> None:
    seen: list[tuple[Message, Tensors]] = []

    def hop_s(_source: int, target: int, sent: Message, tensors: Tensors) -> float:
        if target == 2:
            seen.append((sent, tensors))
        return 0.0

    pipeline = make_pipeline(RELAYED, hop_s=hop_s)
    pixels = {"hidden": np.arange(12, dtype=np.float16).reshape(1, 3, 4)}
    frame = BatchFrame(plan_epoch=3, step=0, infer=InferStep(request=RequestId("i"), reply_to="there"))

    pipeline.give(1, BatchArrived(frame=frame, tensors=pixels))
    pipeline.run()

    [(sent, tensors)] = seen
    assert sent == frame
    assert np.array_equal(tensors["hidden"], pixels["hidden"])
    assert tensors["hidden"].dtype == np.float16


@pytest.mark.parametrize(
    "rows", [{"slot": 99}, {"slot": -1}, {"start": -1}, {"count": 0}, {"count": 10_000}, {"logits": 2}], ids=str
)
def test_impossible_frames_do_not_pass_a_relay(make_pipeline: Pipelines, rows: dict[str, int]) -> None:
    pipeline = make_pipeline(RELAYED)
    values = {"slot": 0, "start": 0, "count": 1, "logits": 1} | rows
    frame = BatchFrame(plan_epoch=3, step=0, sequences=(SequenceStep(request=RequestId("x"), **values),))

    pipeline.give(1, BatchArrived(frame=frame, tensors={"hidden": np.zeros((1, 1, 4), np.float32)}))
    pipeline.run()

    assert pipeline.machines[1].discarded == 1
    assert pipeline.sent == []


def test_tensors_of_other_rows_than_the_frame_names_do_not_pass_a_relay(make_pipeline: Pipelines) -> None:
    pipeline = make_pipeline(RELAYED)
    step = SequenceStep(request=RequestId("x"), slot=0, start=0, count=2, logits=1)

    frame = BatchFrame(plan_epoch=3, step=0, sequences=(step,))
    pipeline.give(1, BatchArrived(frame=frame, tensors={"hidden": np.zeros((1, 3, 4), np.float32)}))
    pipeline.run()

    assert (pipeline.machines[1].discarded, pipeline.sent) == (1, [])


def test_a_relay_is_asked_for_no_inference_itself(make_pipeline: Pipelines) -> None:
    pipeline = make_pipeline(RELAYED)
    asked = SubmitInfer(request=RequestId("i"), deployment=DeploymentId("m"), reply_to="there")

    pipeline.give(1, InferArrived(submit=asked, tensors={}))
    pipeline.run()

    assert pipeline.machines[1].discarded == 1
