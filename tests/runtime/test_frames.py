import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import MalformedFrameError
from shoal.ids import DeploymentId, RequestId
from shoal.runtime.frames import (
    BatchFrame,
    Cancel,
    ClosedSequence,
    CreditFrame,
    Delta,
    Failure,
    GatewayMessage,
    InferDone,
    InferStep,
    OpenedSequence,
    RequestTokens,
    StageFrame,
    Submit,
    SubmitInfer,
    TokensFrame,
    decode_gateway_message,
    decode_stage_frame,
    encode,
)
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import (
    FinishReason,
    GenerateRequest,
    OutputDelta,
    SampledToken,
    SamplingParams,
    TokenLogprob,
)

ids = st.text(max_size=8).map(RequestId)
small = st.integers(0, 2**40)
floats = st.floats(allow_nan=False, allow_infinity=False)
sampling = st.builds(
    SamplingParams,
    temperature=floats,
    top_k=small,
    seed=st.integers(-(2**63), 2**64 - 1),
    logit_bias=st.dictionaries(small, floats, max_size=3),
)
prompts = st.lists(small, max_size=5).map(tuple)
rows = st.builds(SequenceStep, request=ids, slot=small, start=small, count=small, logits=small)
logprobs = st.builds(TokenLogprob, token=small, logprob=floats)
tokens = st.builds(
    SampledToken, token=small, position=small, logprob=st.none() | floats, top=st.lists(logprobs, max_size=2).map(tuple)
)
failures = st.builds(Failure, request=ids, code=st.text(max_size=5), text=st.text(max_size=5))


def few(of: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(of, max_size=3).map(tuple)


stage_frames = st.one_of(
    st.builds(
        BatchFrame,
        plan_epoch=small,
        step=small,
        sequences=few(rows),
        opened=few(st.builds(OpenedSequence, request=ids, slot=small, prompt=prompts, sampling=sampling)),
        closed=few(st.builds(ClosedSequence, request=ids, slot=small)),
        failed=few(failures),
        infer=st.none() | st.builds(InferStep, request=ids, reply_to=st.text(max_size=5)),
    ),
    st.builds(
        TokensFrame,
        plan_epoch=small,
        step=small,
        tokens=few(st.builds(RequestTokens, request=ids, tokens=few(tokens))),
        failed=few(failures),
    ),
    st.builds(CreditFrame, plan_epoch=small, step=small),
)
requests = st.builds(
    GenerateRequest,
    request=ids,
    deployment=st.just(DeploymentId("m")),
    prompt=prompts,
    max_tokens=small,
    sampling=sampling,
)
deltas = st.builds(
    OutputDelta,
    request=ids,
    tokens=few(tokens),
    finish=st.none() | st.sampled_from(FinishReason),
    error=st.text(max_size=5),
)
gateway_messages = st.one_of(
    st.builds(Submit, request=requests, reply_to=st.text(max_size=5)),
    st.builds(SubmitInfer, request=ids, deployment=st.just(DeploymentId("m"))),
    st.builds(Cancel, request=ids),
    st.builds(Delta, delta=deltas),
    st.builds(InferDone, request=ids, error_code=st.text(max_size=5)),
)


@given(stage_frames)
def test_every_stage_frame_survives_the_wire(frame: StageFrame) -> None:
    assert decode_stage_frame(encode(frame)) == frame


@given(gateway_messages)
def test_every_gateway_message_survives_the_wire(message: GatewayMessage) -> None:
    assert decode_gateway_message(encode(message)) == message


@given(st.binary(max_size=60))
def test_garbage_is_a_malformed_frame_and_nothing_else(payload: bytes) -> None:
    for decode in (decode_stage_frame, decode_gateway_message):
        with pytest.raises(MalformedFrameError):
            decode(payload)


@given(stage_frames, st.data())
def test_a_damaged_frame_never_crashes_the_parser(frame: StageFrame, data: st.DataObject) -> None:
    payload = bytearray(encode(frame))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))

    try:
        decoded: object = decode_stage_frame(bytes(payload))
    except MalformedFrameError:
        return
    assert isinstance(decoded, StageFrame)


def test_a_frame_of_a_newer_release_is_read_without_what_we_do_not_know() -> None:
    newer = msgspec.msgpack.encode({"type": "credit", "plan_epoch": 1, "step": 2, "invented_later": [1, 2]})

    assert decode_stage_frame(newer) == CreditFrame(plan_epoch=1, step=2)


def test_a_kind_of_frame_that_we_do_not_know_is_malformed() -> None:
    with pytest.raises(MalformedFrameError, match="bytes are no message"):
        decode_stage_frame(msgspec.msgpack.encode({"type": "surprise", "plan_epoch": 1}))
