"""From the bytes that reach a stage to what its machine is told: parsed and checked here, trusted inside."""

from typing import assert_never

from shoal.errors import InvalidRequestError, MalformedFrameError
from shoal.runtime import frames
from shoal.runtime.effects import (
    BatchArrived,
    CancelArrived,
    CreditArrived,
    InferArrived,
    SentArrived,
    SubmitArrived,
    TokensArrived,
)
from shoal.transport.frame import unpack
from shoal.transport.keys import check_key
from shoal.transport.parse import shown

FromStage = BatchArrived | TokensArrived | CreditArrived | SentArrived | frames.HelloFrame
FromGateway = SubmitArrived | InferArrived | CancelArrived


def from_stage(whole: bytes) -> FromStage:
    """What another stage says; a hello is for the loop, all else for the machine.  Raises UntrustedError."""
    header, tensors = unpack(whole)
    frame = frames.decode_stage_frame(header)
    match frame:
        case frames.BatchFrame():
            if frame.infer is not None:
                _check_reply_to(frame.infer.reply_to)
            return BatchArrived(frame=frame, tensors=tensors)
        case frames.TokensFrame():
            return TokensArrived(frame=frame)
        case frames.CreditFrame():
            return CreditArrived(frame=frame)
        case frames.HelloFrame():
            return frame
        case frames.SentFrame():
            return SentArrived(frame=frame)
        case _:
            assert_never(frame)


def from_gateway(payload: bytes) -> FromGateway:
    """What a gateway asks; raises UntrustedError."""
    header, tensors = unpack(payload)
    message = frames.decode_gateway_message(header)
    match message:
        case frames.Submit():
            _check_reply_to(message.reply_to)
            return SubmitArrived(submit=message)
        case frames.SubmitInfer():
            _check_reply_to(message.reply_to)
            return InferArrived(submit=message, tensors=tensors)
        case frames.Cancel(request=request):
            return CancelArrived(request=request)
        case frames.Delta() | frames.InferDone():
            raise MalformedFrameError("an answer where a request belongs")
        case _:
            assert_never(message)


def _check_reply_to(key: str) -> None:
    """Raise MalformedFrameError unless something can be sent to *key*: the machine passes it on and never looks at it."""
    try:
        check_key(key)
    except InvalidRequestError as error:
        raise MalformedFrameError(f"an answer cannot be sent to {shown(key)!r}: {shown(error.message)}") from error
