"""A stage that is lost and started anew in the middle of a pipeline: whoever it answered is told at once, and can go on."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.effects import FollowerMet
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams
from shoal.runtime.stage_state import start

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
LastDelta = Callable[[LocalPipeline, str], tuple[FinishReason | None, str]]
SEEDED = SamplingParams(temperature=0.9, seed=42)
CUTS = (2, 4)


def meet_everybody(pipeline: LocalPipeline) -> None:
    for stage in range(len(pipeline.machines)):
        pipeline.give(stage, FollowerMet(birth=10 + (stage + 1) % len(pipeline.machines)))


def renew(pipeline: LocalPipeline, stage: int, birth: int) -> None:
    """Another worker with nothing in it takes the place of *stage*; what was on its way there is lost."""
    pipeline._queue[:] = sorted(item for item in pipeline._queue if item[2] != stage)
    settings = pipeline.stages[stage].settings
    if stage == 0:
        settings = msgspec.structs.replace(settings, run=birth)
    pipeline.machines[stage] = start(settings)
    for slot in range(settings.slots):
        pipeline.stages[stage].session.release(slot)
    before = (stage - 1) % len(pipeline.machines)
    pipeline.give(before, FollowerMet(birth=birth))
    pipeline.give(stage, FollowerMet(birth=10 + (stage + 1) % len(pipeline.machines)))


@pytest.mark.parametrize("lost", [1, 2])
def test_answers_of_a_stage_that_was_started_anew_end_at_once_and_leave_nothing_behind(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests, lost: int
) -> None:
    pipeline = make_pipeline(CUTS, slots=2, step_s=lambda *_: 0.1)
    meet_everybody(pipeline)
    for name in ("a", "bb", "ccc"):
        pipeline.submit(make_request(name, max_tokens=200))
    for _ in range(100):
        pipeline.turn()

    renew(pipeline, lost, birth=99)
    pipeline.run()  # no clock ticks: nobody waits for a probe

    assert {last_delta(pipeline, name) for name in ("a", "bb", "ccc")} == {(FinishReason.ERROR, "shard_lost")}
    assert [m.slots.held for m in pipeline.machines] == [{}] * 3
    assert pipeline.generate(make_request("x")) == make_pipeline().generate(make_request("x"))


def test_a_first_stage_that_was_started_anew_is_not_told_of_older_losses(
    last_delta: LastDelta, make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(CUTS)
    meet_everybody(pipeline)
    pipeline.run()
    renew(pipeline, 2, birth=98)
    pipeline.run()
    renew(pipeline, 0, birth=99)
    pipeline.wait(2.0)

    pipeline.submit(make_request("a"))
    pipeline.wait(3.0)

    assert last_delta(pipeline, "a") == (FinishReason.LENGTH, "")
    assert pipeline.machines[1].renewals == 1


def test_a_way_to_the_same_worker_that_is_made_again_disturbs_nobody(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline(CUTS)
    meet_everybody(pipeline)
    pipeline.submit(make_request("a"))
    for _ in range(20):
        pipeline.turn()

    meet_everybody(pipeline)
    for stage in range(3):
        pipeline.give(stage, FollowerMet(birth=0))  # of an older version: nobody knows who it is
    pipeline.run()

    assert pipeline.tokens(RequestId("a")) == make_pipeline().generate(make_request("a"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.sampled_from([(3,), (2, 4), (2, 2, 4)]),
    losses=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 120)), min_size=1, max_size=3),
    prompt=st.integers(1, 40),
    chunk=st.integers(3, 50),
    in_flight=st.integers(1, 4),
    step_s=st.sampled_from([0.0, 0.05]),
    others=st.integers(0, 3),
)
def test_whichever_stages_are_lost_whenever_every_answer_goes_on_to_the_same_end(
    make_pipeline: Pipelines,
    make_request: Requests,
    cuts: tuple[int, ...],
    losses: list[tuple[int, int]],
    prompt: int,
    chunk: int,
    in_flight: int,
    step_s: float,
    others: int,
) -> None:
    names = ["a", *(f"o{n}" for n in range(others))]
    wanted = {n: make_request(n, prompt=prompt, max_tokens=30, sampling=SEEDED, reproducible=True) for n in names}
    pipeline = make_pipeline(cuts, chunk=chunk, in_flight=in_flight, step_s=lambda *_: step_s)
    meet_everybody(pipeline)
    answers: dict[str, list[int]] = {n: [] for n in names}

    def send(attempt: int) -> None:
        """As a gateway does: what is not whole goes on under another name."""
        for name, tokens in answers.items():
            if attempt:
                tokens += pipeline.tokens(RequestId(f"{name}~{attempt - 1}"))
            if len(tokens) < 30:
                again = msgspec.structs.replace(
                    wanted[name], request=RequestId(f"{name}~{attempt}"), resume=tuple(tokens)
                )
                pipeline.submit(again)

    send(0)
    for attempt, (stage, turns) in enumerate(losses, 1):
        for _ in range(turns):
            pipeline.turn()
        renew(pipeline, stage % len(pipeline.machines), birth=100 + attempt)
        pipeline.run()
        send(attempt)
    pipeline.run()
    send(len(losses) + 1)

    whole = {n: make_pipeline().generate(request) for n, request in wanted.items()}
    assert answers == whole
    assert not any(machine.slots.held for machine in pipeline.machines)
