"""Frames that parse and are yet not what a pipeline sends: nothing crashes, and honest requests are answered."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.backend.roles import forms_of
from shoal.runtime.door import MAX_GAP, plausible
from shoal.runtime.effects import BatchArrived, CreditArrived, SentArrived, StageInput, TokensArrived
from shoal.runtime.frames import (
    BatchFrame,
    ClosedSequence,
    CreditFrame,
    Failure,
    InferStep,
    OpenedSequence,
    RequestTokens,
    SentFrame,
    TokensFrame,
)
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import GenerateRequest, SampledToken, SamplingParams
from shoal.runtime.settings import StageSettings

Requests = Callable[..., GenerateRequest]
EPOCH, SLOTS, CONTEXT, VOCABULARY = 3, 2, 64, 64

ids = st.sampled_from([RequestId(name) for name in ("a", "b", "evil")])
numbers = st.integers(-2, 6) | st.sampled_from([63, 64, 65, MAX_GAP, 2**31, 2**60, 2**63, -(2**63)])
odd_floats = st.floats(allow_nan=True, allow_infinity=True)
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]) | odd_floats,
    top_p=st.just(1.0) | odd_floats,
    logit_bias=st.dictionaries(st.integers(-3, 70), odd_floats, max_size=2),
    logprobs=st.none() | numbers,
)
rows = st.builds(SequenceStep, request=ids, slot=numbers, start=numbers, count=numbers, logits=numbers)
failures = st.builds(Failure, request=ids, code=st.just("x"), text=st.just("y"))


def few(of: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(of, max_size=3).map(tuple)


batches = st.builds(
    BatchFrame,
    plan_epoch=st.just(EPOCH),
    step=numbers,
    sequences=few(rows),
    opened=few(
        st.builds(
            OpenedSequence,
            request=ids,
            slot=numbers,
            prompt=st.lists(numbers, max_size=3).map(tuple),
            sampling=sampling,
        )
    ),
    closed=few(st.builds(ClosedSequence, request=ids, slot=numbers)),
    failed=few(failures),
    infer=st.none() | st.builds(InferStep, request=ids),
    probe=st.booleans(),
)
tensors = st.dictionaries(
    st.sampled_from(["hidden", "input_ids", "logits", "x"]),
    st.builds(
        np.zeros,
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.sampled_from([np.float32, np.int64, np.bool_, np.uint8, ml_dtypes.bfloat16]),
    ),
    max_size=2,
)
drawn = st.builds(SampledToken, token=numbers, position=numbers)
strange = st.one_of(
    st.tuples(st.just(1), st.builds(BatchArrived, frame=batches, tensors=tensors)),
    st.tuples(
        st.just(0),
        st.builds(
            TokensArrived,
            frame=st.builds(
                TokensFrame,
                plan_epoch=st.just(EPOCH),
                step=numbers,
                tokens=few(st.builds(RequestTokens, request=ids, tokens=few(drawn))),
                failed=few(failures),
            ),
        ),
    ),
    st.tuples(
        st.integers(0, 1),
        st.builds(CreditArrived, frame=st.builds(CreditFrame, plan_epoch=st.just(EPOCH), step=numbers)),
    ),
    st.tuples(
        st.integers(0, 1), st.builds(SentArrived, frame=st.builds(SentFrame, plan_epoch=st.just(EPOCH), step=numbers))
    ),
)


def two_stages(*, checked: bool = True) -> LocalPipeline:
    stages = []
    for index in range(2):
        shard = null_shard(
            3 * index,
            3 * index + 3,
            embeds=not index,
            vocabulary=VOCABULARY * index,
            slots=SLOTS,
            context_tokens=CONTEXT,
        )
        stage = StageSettings(
            plan_epoch=EPOCH, index=index, stages=2, slots=SLOTS, context_tokens=CONTEXT, vocabulary=VOCABULARY,
            takes=forms_of(shard.graph) if checked else (),
        )  # fmt: skip
        stages.append(LocalStage(stage, NullBackend().load(shard)))
    return LocalPipeline(stages)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(strange, max_size=8), st.integers(0, 12))
def test_no_frame_crashes_a_stage_or_keeps_it_from_answering_for_long(
    make_request: Requests, frames: list[tuple[int, StageInput]], after: int
) -> None:
    pipeline = two_stages()
    for name in ("a", "b"):
        pipeline.submit(make_request(name, prompt=3, max_tokens=9))
    for _ in range(after):
        pipeline.turn()
    for stage, frame in frames:
        pipeline.give(stage, frame)
    pipeline.wait(20.0)

    assert all(pipeline.deltas[RequestId(name)][-1].finish for name in ("a", "b")), "nobody waits for ever"
    # A lie about what was sent makes the next frame an old one: that costs one request, and is found out by it.
    for name in ("first", "honest"):
        request = make_request(name, prompt=5, max_tokens=9)
        pipeline.submit(request)
        pipeline.wait(10.0)
        assert pipeline.deltas[RequestId(name)][-1].finish
    assert pipeline.tokens(RequestId("honest")) == two_stages().generate(request)


def one_row(step: int = 0, **more: object) -> BatchFrame:
    row = SequenceStep(request=RequestId("x"), slot=0, start=0, count=1, logits=1)
    opened = OpenedSequence(request=RequestId("x"), slot=0, prompt=(1,))
    return BatchFrame(plan_epoch=EPOCH, step=step, **({"sequences": (row,), "opened": (opened,)} | more))


def hidden(*shape: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"hidden": np.zeros(shape, dtype)}


@pytest.mark.parametrize(
    "tensors",
    [
        {}, hidden(4), hidden(1, 4), hidden(2, 1, 4), hidden(1, 2, 4), hidden(1, 1, 5), hidden(1, 1, 4, 1),
        hidden(1, 1, 4, dtype=np.float64), {"embedding": np.zeros((1, 1, 4), np.float32)},
        hidden(1, 1, 4) | {"more": np.zeros((1, 1, 4), np.float32)},
    ],
)  # fmt: skip
def test_rows_with_other_tensors_than_the_shard_takes_are_dropped_at_the_door(tensors: dict[str, np.ndarray]) -> None:
    stage = two_stages().stages[1].settings
    assert plausible(one_row(), hidden(1, 1, 4), stage)

    assert not plausible(one_row(), tensors, stage)


@pytest.mark.parametrize(
    "opened",
    [
        {"prompt": ()}, {"prompt": (-1,)}, {"prompt": (VOCABULARY,)}, {"prompt": (1,) * (CONTEXT + 1)}, {"slot": SLOTS},
        {"sampling": SamplingParams(temperature=float("nan"))}, {"sampling": SamplingParams(logit_bias={VOCABULARY: 1.0})},
    ],
)  # fmt: skip
def test_a_sequence_that_no_sampler_can_serve_is_not_opened(opened: dict[str, object]) -> None:
    values = {"request": RequestId("x"), "slot": 0, "prompt": (1,)} | opened
    frame = one_row(opened=(OpenedSequence(**values),))

    assert not plausible(frame, hidden(1, 1, 4), two_stages().stages[1].settings)


def test_a_frame_far_ahead_of_the_others_does_not_make_them_old(make_request: Requests) -> None:
    pipeline = two_stages()
    pipeline.generate(make_request("a"))
    pipeline.give(1, BatchArrived(frame=one_row(step=2**60), tensors=hidden(1, 1, 4)))

    assert pipeline.generate(make_request("b")) == two_stages().generate(make_request("b"))
    assert pipeline.machines[1].discarded == 1
