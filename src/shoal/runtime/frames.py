"""What stages and gateways say to each other: values, encoded as msgpack; tensors travel beside them.

Rules that keep a thin uplink usable: a request is described whole once (`opened`) and known by its id afterwards; the last
stage sends token ids, never logits; defaults are left out; structs that repeat per token are arrays.  Every batch frame
that carries rows, an inference or failures is answered by exactly one tokens frame, so that the first stage can count what is in
the pipeline.  Credits are cumulative (`all steps up to`), so that a lost one heals itself, and said again every second: as a
sign of life.

Steps are counted by the first stage, from 0 in each *run* of it: a first stage that was started anew begins another run, and
whatever belongs to an older one is over.
"""

import msgspec
from msgspec.msgpack import Decoder

from shoal.ids import DeploymentId, RequestId
from shoal.runtime.grammar import Bound, Grammar
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import GenerateRequest, OutputDelta, SampledToken, SamplingParams
from shoal.transport.parse import parse


class OpenedSequence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sequence that a stage has not seen yet; the last stage samples with it."""

    request: RequestId
    slot: int
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    grammar: Grammar | None = None
    resume: tuple[int, ...] = ()
    """The answer so far, which was drawn elsewhere."""
    reuse: int = 0
    """It begins behind so many positions that are in the cache already."""
    source: int = 0
    """Where they are: in `slot` itself, or in another one that they are copied from."""
    of: RequestId = RequestId("")
    """Whose they are: a stage that holds something else there does not use it."""


class ClosedSequence(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A sequence that has ended: its slot is free."""

    request: RequestId
    slot: int
    keep: int = 0
    """So many positions stay in the cache for whoever can begin behind them; 0: it is given back."""


class Failure(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Why a request cannot go on: a code of `shoal.errors` and a text for people."""

    request: RequestId
    code: str
    text: str


class InferStep(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A stateless run; the last stage sends its tensors to *reply_to*."""

    request: RequestId
    reply_to: str = ""


class BatchFrame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="batch"):
    """What a stage does in one step; `closed` comes before `opened`, `opened` before the rows.

    The rows of `sequences` lie one after another in the boundary tensors beside the frame.
    """

    plan_epoch: int
    step: int
    sequences: tuple[SequenceStep, ...] = ()
    opened: tuple[OpenedSequence, ...] = ()
    closed: tuple[ClosedSequence, ...] = ()
    failed: tuple[Failure, ...] = ()
    infer: InferStep | None = None
    run: int = 0
    probe: bool = False
    """Asks for an answer and nothing else: what was sent before it and is not answered by then is lost."""
    drafts: dict[RequestId, tuple[int, ...]] = {}
    """Guessed ids: those of the last rows of a sequence.  The last stage samples row by row as far as they are right."""

    def wants_answer(self) -> bool:
        """Whether a tokens frame answers it."""
        return bool(self.sequences or self.failed or self.infer or self.probe)


class RequestTokens(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Tokens that a step gave one request."""

    request: RequestId
    tokens: tuple[SampledToken, ...]
    bound: Bound = Bound.FREE


class TokensFrame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokens"):
    """From the last stage to the first: what became of a step."""

    plan_epoch: int
    step: int
    tokens: tuple[RequestTokens, ...] = ()
    failed: tuple[Failure, ...] = ()
    run: int = 0


class CreditFrame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="credit"):
    """From a stage to the one before it: all frames up to *step* are done with (-1: none yet); a sign of life in any case."""

    plan_epoch: int
    step: int
    run: int = 0
    trouble: str = ""
    """Why the pipeline from the sender on does not work; empty from the first stage, or it would go round for ever."""
    renewals: int = 0
    """How many stages behind the sender were started anew since it was started."""


class SentFrame(msgspec.Struct, frozen=True, kw_only=True, tag="sent"):
    """From a stage to the next one: all frames up to *step* went before this; those that have not arrived never will."""

    plan_epoch: int
    step: int
    run: int = 0


class HelloFrame(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Over a new way to the next stage, and back: proves that it works in both directions."""

    plan_epoch: int
    number: int
    back: bool = False
    birth: int = 0
    """Of the worker that says it (`StageSettings.birth`)."""


StageFrame = BatchFrame | TokensFrame | CreditFrame | SentFrame | HelloFrame


class Submit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """From a gateway to the first stage; answers go to *reply_to*, an address that only the shell understands."""

    request: GenerateRequest
    reply_to: str = ""


class SubmitInfer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit_infer"):
    """Run a plain model once on the tensors beside this message."""

    request: RequestId
    deployment: DeploymentId
    reply_to: str = ""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Nobody wants this answer any more."""

    request: RequestId


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """A piece of an answer, to the gateway that asked."""

    delta: OutputDelta


class InferDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="infer_done"):
    """The outputs of a plain model lie beside this message, unless it failed."""

    request: RequestId
    error_code: str = ""
    error: str = ""


GatewayMessage = Submit | SubmitInfer | Cancel | Delta | InferDone

_stage_frames: Decoder[StageFrame] = Decoder(StageFrame)
_gateway_messages: Decoder[GatewayMessage] = Decoder(GatewayMessage)


def encode(message: StageFrame | GatewayMessage) -> bytes:
    """The message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode_stage_frame(payload: bytes) -> StageFrame:
    """Parse what another stage sent; raises MalformedFrameError."""
    return parse(payload, _stage_frames, "message of ours")


def decode_gateway_message(payload: bytes) -> GatewayMessage:
    """Parse what a gateway or a first stage sent; raises MalformedFrameError."""
    return parse(payload, _gateway_messages, "message of ours")
