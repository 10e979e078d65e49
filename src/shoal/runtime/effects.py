"""What a stage machine is told, and what it wants done.

Inputs come from the shell (a worker's loop, or the virtual-time pipeline); effects go back to it, to be carried out in
order.  Tensors pass through as handles: only the last stage looks into `logits`.
"""

from collections.abc import Mapping

import msgspec

from shoal.ids import RequestId
from shoal.runtime.frames import BatchFrame, CreditFrame, InferDone, SentFrame, Submit, SubmitInfer, TokensFrame
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array, OutputDelta

Tensors = Mapping[str, Array]


class BatchArrived(msgspec.Struct, frozen=True, kw_only=True):
    """The stage before sent a frame and its boundary tensors."""

    frame: BatchFrame
    tensors: Tensors


class StepDone(msgspec.Struct, frozen=True, kw_only=True):
    """The engine finished the step that `RunStep` asked for."""

    outputs: Tensors


class StepFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The engine could not: a code of `shoal.errors` and a text."""

    code: str
    text: str


class TokensArrived(msgspec.Struct, frozen=True, kw_only=True):
    """The last stage answered (first stage only)."""

    frame: TokensFrame


class CreditArrived(msgspec.Struct, frozen=True, kw_only=True):
    """The next stage is done with frames."""

    frame: CreditFrame


class SentArrived(msgspec.Struct, frozen=True, kw_only=True):
    """The stage before says what it has sent so far."""

    frame: SentFrame


class FollowerMet(msgspec.Struct, frozen=True, kw_only=True):
    """There is a way to the next stage, and the worker of that *birth* is at its end (0: it did not say)."""

    birth: int


class SubmitArrived(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway wants an answer (first stage only)."""

    submit: Submit


class InferArrived(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway wants a plain model run (first stage only)."""

    submit: SubmitInfer
    tensors: Tensors


class CancelArrived(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway no longer wants an answer (first stage only)."""

    request: RequestId


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """Time passes; told often enough that silence is noticed.

    `heard_s` is when the next stage was last heard, however many of its frames still wait to be taken.
    """

    now_s: float
    heard_s: float | None = None


class Abandon(msgspec.Struct, frozen=True, kw_only=True):
    """The pipeline is broken or retired: fail every request with this code and text."""

    code: str
    text: str


class DraftDone(msgspec.Struct, frozen=True, kw_only=True):
    """What `AskDraft` of that *number* came to: as many ids as were asked for, or `failed`."""

    number: int
    ids: tuple[int, ...] = ()
    failed: bool = False


StageInput = (
    BatchArrived
    | StepDone
    | StepFailed
    | TokensArrived
    | CreditArrived
    | SentArrived
    | FollowerMet
    | SubmitArrived
    | InferArrived
    | CancelArrived
    | DraftDone
    | Tick
    | Abandon
)


class RunStep(msgspec.Struct, frozen=True, kw_only=True):
    """Call the engine's `step`; answer with `StepDone` or `StepFailed`.  Never issued while another step runs."""

    sequences: tuple[SequenceStep, ...]
    tensors: Tensors


class SendFrame(msgspec.Struct, frozen=True, kw_only=True):
    """To the next stage."""

    frame: BatchFrame
    tensors: Tensors


class SendTokens(msgspec.Struct, frozen=True, kw_only=True):
    """To the first stage."""

    frame: TokensFrame


class SendCredit(msgspec.Struct, frozen=True, kw_only=True):
    """To the stage before."""

    frame: CreditFrame


class SendSent(msgspec.Struct, frozen=True, kw_only=True):
    """To the next stage, behind the frames."""

    frame: SentFrame


class Emit(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer, to the gateway at *reply_to*."""

    reply_to: str
    delta: OutputDelta


class EmitResult(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an inference, to the gateway at *reply_to*."""

    reply_to: str
    done: InferDone
    tensors: Tensors


class CopySlot(msgspec.Struct, frozen=True, kw_only=True):
    """Copy the first `count` positions of one slot's cache to another's, before anything else is done."""

    source: int
    target: int
    count: int


class ReleaseSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Call the engine's `release`.  Never issued while a step runs."""

    slot: int


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """The pipeline does not work as seen from here (ADR 3); the state's `trouble` says for how long that holds."""

    trouble: str


class AskDraft(msgspec.Struct, frozen=True, kw_only=True):
    """Have the draft model go on, beside whatever else is done; answer with `DraftDone`, late or never.

    Its slot holds the positions below `start`; `ids` are those from there on, behind which `count` more are its own, each the most
    likely one.  These requests are carried out in the order in which they were made.
    """

    number: int
    request: RequestId
    slot: int
    start: int
    ids: tuple[int, ...]
    count: int


Effect = (
    RunStep
    | SendFrame
    | SendTokens
    | SendCredit
    | SendSent
    | Emit
    | EmitResult
    | CopySlot
    | ReleaseSlot
    | Suspect
    | AskDraft
)
