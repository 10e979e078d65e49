"""One stage of a pipeline as a pure machine: `advance(state, input) -> (state, effects)` (ADR 6, ADR 7).

The same machine runs in a worker process and in the virtual-time pipeline of tests and rehearsals; it does no I/O and
reads no clock.  `advance` changes the state that it is given and returns it: the state has exactly one owner, and the
tables of all live sequences are not copied per token.

How it flows.  The first stage schedules; each stage runs the rows of a frame and sends the frame on with its boundary tensors; the
last one samples and answers the first with token ids.  A stage runs one step at a time and begins the next as soon as its
input is there and its last output has left.  At most `credits` frames are on their way between two stages, so that no queue
of the fabric ever fills.  A frame that only closes sequences overtakes nothing but waits for nothing except a running step.

What can go wrong.  A frame of another plan epoch, of an old step, or naming impossible slots is dropped and counted in
`discarded`.  A sequence whose earlier rows never arrived here (a lost frame) fails as `shard_lost` in the frame itself, its
neighbours go on.  A failed engine step fails the requests of that frame; the failure travels down the pipeline like a result.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import assert_never

import msgspec
import numpy as np

from shoal.errors import ShardLostError
from shoal.model.spec import LOGITS
from shoal.runtime.effects import (
    Abandon,
    BatchArrived,
    CancelArrived,
    CreditArrived,
    Effect,
    EmitResult,
    InferArrived,
    ReleaseSlot,
    RunStep,
    SendCredit,
    SendFrame,
    SendTokens,
    StageInput,
    StepDone,
    StepFailed,
    SubmitArrived,
    Suspect,
    Tensors,
    Tick,
    TokensArrived,
)
from shoal.runtime.first import FirstStage
from shoal.runtime.frames import BatchFrame, CreditFrame, Failure, InferDone, TokensFrame
from shoal.runtime.last import LastStage
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array
from shoal.runtime.settings import StageSettings
from shoal.runtime.slots import SlotTable

Work = tuple[BatchFrame, Tensors]


@dataclass(slots=True)
class StageState:
    """All that a stage remembers.  `first` and `last` are there only on those stages.

    `unacked` holds (step, time sent) of frames whose credit has not come back.
    """

    settings: StageSettings
    slots: SlotTable
    first: FirstStage | None
    last: LastStage | None
    inbox: deque[Work] = field(default_factory=deque)
    outbox: deque[Work] = field(default_factory=deque)
    running: Work | None = None
    unacked: deque[tuple[int, float]] = field(default_factory=deque)
    last_step: int = -1
    began_s: float | None = None
    now_s: float = 0.0
    beaten_s: float = 0.0
    suspected: bool = False
    discarded: int = 0


def start(settings: StageSettings) -> StageState:
    """A stage that has seen nothing yet."""
    slots = SlotTable(settings.slots)
    return StageState(
        settings=settings,
        slots=slots,
        first=FirstStage(settings, slots) if settings.is_first else None,
        last=LastStage() if settings.is_last else None,
    )


def advance(state: StageState, given: StageInput) -> tuple[StageState, tuple[Effect, ...]]:
    """Take one input; the effects are to be carried out in order before the next one."""
    effects = _take(state, given)
    effects += _proceed(state)
    return state, tuple(effects)


def _take(state: StageState, given: StageInput) -> list[Effect]:
    match given:
        case BatchArrived(frame=frame, tensors=tensors):
            return _arrive(state, frame, tensors)
        case StepDone(outputs=outputs):
            return _step_done(state, outputs)
        case StepFailed(code=code, text=text):
            return _step_failed(state, code, text)
        case CreditArrived(frame=frame):
            return _credit(state, frame)
        case Tick(now_s=now_s):
            return _tick(state, now_s)
        case TokensArrived() | SubmitArrived() | InferArrived() | CancelArrived() | Abandon():
            return _take_first(state, given)
        case _:
            assert_never(given)


def _take_first(
    state: StageState, given: TokensArrived | SubmitArrived | InferArrived | CancelArrived | Abandon
) -> list[Effect]:
    first = state.first
    if first is None:
        state.discarded += 1
        return []
    match given:
        case TokensArrived(frame=frame):
            _acknowledge(state, frame.plan_epoch, frame.step)
            known = frame.plan_epoch == state.settings.plan_epoch and frame.step in first.flights
            state.discarded += not known
            return first.take_tokens(frame) if known else []
        case SubmitArrived(submit=submit):
            return first.submit(submit)
        case InferArrived(submit=infer, tensors=tensors):
            return first.submit_infer(infer, tensors)
        case CancelArrived(request=request):
            return first.cancel(request)
        case Abandon(code=code, text=text):
            return first.abandon(code, text)
        case _:
            assert_never(given)


def _arrive(state: StageState, frame: BatchFrame, tensors: Tensors) -> list[Effect]:
    if state.first is not None or frame.step <= state.last_step or not _plausible(frame, state.settings):
        state.discarded += 1
        return []
    state.last_step = frame.step
    state.inbox.append((frame, tensors))
    return []


def _plausible(frame: BatchFrame, settings: StageSettings) -> bool:
    rows = all(s.start >= 0 and 0 <= s.logits <= s.count and s.count > 0 for s in frame.sequences)
    inside = all(s.start + s.count <= settings.context_tokens for s in frame.sequences)
    named = [s.slot for s in frame.sequences] + [s.slot for s in frame.opened] + [s.slot for s in frame.closed]
    slots = all(0 <= slot < settings.slots for slot in named)
    return frame.plan_epoch == settings.plan_epoch and rows and inside and slots


def _credit(state: StageState, frame: CreditFrame) -> list[Effect]:
    state.discarded += not _acknowledge(state, frame.plan_epoch, frame.step)
    return []


def _acknowledge(state: StageState, plan_epoch: int, step: int) -> bool:
    """Forget what the next stage is done with: all up to *step*; False when it speaks of another plan."""
    if plan_epoch != state.settings.plan_epoch:
        return False
    while state.unacked and state.unacked[0][0] <= step:
        state.unacked.popleft()
    state.suspected = False
    return True


def _tick(state: StageState, now_s: float) -> list[Effect]:
    # A clock's zero is arbitrary: the machine's own time begins with its first tick.
    if state.began_s is None:
        state.began_s = now_s
    state.now_s = now_s - state.began_s
    lost = state.first.lose_overdue(state.now_s) if state.first else []
    return lost + _beat(state) + _watch(state)


def _beat(state: StageState) -> list[Effect]:
    """Signs of life for the gateways; also covers requests that wait for a slot."""
    if state.first is None or state.now_s - state.beaten_s < state.settings.heartbeat_s:
        return []
    state.beaten_s = state.now_s
    return state.first.signs_of_life()


def _watch(state: StageState) -> list[Effect]:
    overdue_s = state.now_s - state.unacked[0][1] if state.unacked else 0.0
    if state.suspected or overdue_s <= state.settings.overdue_s:
        return []
    state.suspected = True
    return [Suspect(overdue_s=overdue_s)]


def _step_done(state: StageState, outputs: Tensors) -> list[Effect]:
    if state.running is None:
        state.discarded += 1
        return []
    (frame, inputs), state.running = state.running, None
    return _complete(state, frame, inputs, outputs)


def _step_failed(state: StageState, code: str, text: str) -> list[Effect]:
    if state.running is None:
        state.discarded += 1
        return []
    (frame, _), state.running = state.running, None
    victims = [s.request for s in frame.sequences] + ([frame.infer.request] if frame.infer else [])
    failed = tuple(Failure(request=r, code=code, text=text) for r in victims)
    hollow = msgspec.structs.replace(frame, sequences=(), infer=None, failed=frame.failed + failed)
    return _complete(state, hollow, {}, {})


def _complete(state: StageState, frame: BatchFrame, inputs: Tensors, outputs: Tensors) -> list[Effect]:
    """Pass a frame's results on: to the next stage, or back to the first as tokens."""
    effects: list[Effect] = []
    if state.last is not None:
        effects += _answer(state, state.last, frame, outputs)
    else:
        state.outbox.append((frame, _outgoing(state.settings, frame, inputs, outputs)))
        effects += _flush(state)
    # Between two stages the answer says as much as a credit would, and nothing is to be read beside it.
    answered = state.settings.stages == 2 and frame.wants_answer()
    if state.first is None and not answered:
        effects.append(SendCredit(frame=CreditFrame(plan_epoch=frame.plan_epoch, step=frame.step)))
    return effects


def _answer(state: StageState, last: LastStage, frame: BatchFrame, outputs: Tensors) -> list[Effect]:
    effects: list[Effect] = []
    if frame.infer is not None:
        done = InferDone(request=frame.infer.request)
        effects.append(EmitResult(reply_to=frame.infer.reply_to, done=done, tensors=outputs))
    wanted = any(s.logits for s in frame.sequences)
    tokens, failed = last.sample_step(frame.sequences, outputs[LOGITS]) if wanted else ((), ())
    answer = TokensFrame(plan_epoch=frame.plan_epoch, step=frame.step, tokens=tokens, failed=frame.failed + failed)
    if not frame.wants_answer():
        return effects
    return effects + (state.first.take_tokens(answer) if state.first else [SendTokens(frame=answer)])


def _outgoing(settings: StageSettings, frame: BatchFrame, inputs: Tensors, outputs: Tensors) -> Tensors:
    if not settings.sends or not (frame.sequences or frame.infer):
        return outputs
    return {name: outputs[name] if name in outputs else inputs[name] for name in settings.sends}


def _proceed(state: StageState) -> list[Effect]:
    """Send what may be sent, then begin work until a step runs or nothing is left to do."""
    effects: list[Effect] = []
    while state.running is None:
        effects += _close(state)
        effects += _flush(state)
        if state.outbox:
            break
        work = _next_work(state)
        if work is None:
            break
        effects += _begin(state, *work)
    return effects


def _close(state: StageState) -> list[Effect]:
    """Free the slots of answers that ended, here and (with a frame of its own, at once) on the other stages."""
    frame = state.first.closing_frame() if state.first else None
    if frame is None:
        return []
    if state.last is None:
        state.outbox.append((frame, {}))
    return _release(state, frame)


def _flush(state: StageState) -> list[Effect]:
    effects: list[Effect] = []
    while state.outbox and len(state.unacked) < state.settings.credits:
        frame, tensors = state.outbox.popleft()
        state.unacked.append((frame.step, state.now_s))
        effects.append(SendFrame(frame=frame, tensors=tensors))
    return effects


def _next_work(state: StageState) -> Work | None:
    if state.first is not None:
        return state.first.next_frame()
    return state.inbox.popleft() if state.inbox else None


def _begin(state: StageState, frame: BatchFrame, tensors: Tensors) -> list[Effect]:
    effects = _release(state, frame)
    for opened in frame.opened:
        state.slots.open(opened.slot, opened.request)
        if state.last is not None:
            state.last.open(opened)
    frame, tensors = _without_gaps(state.slots, frame, tensors)
    for rows in frame.sequences:
        state.slots.extend(rows.slot, rows.start + rows.count)
    if not (frame.sequences or frame.infer):
        return effects + _complete(state, frame, {}, {})
    state.running = (frame, tensors)
    return [*effects, RunStep(sequences=frame.sequences, tensors=tensors)]


def _release(state: StageState, frame: BatchFrame) -> list[Effect]:
    for closed in frame.closed:
        state.slots.close(closed.slot, closed.request)
        if state.last is not None:
            state.last.close(closed.request)
    return [ReleaseSlot(slot=closed.slot) for closed in frame.closed]


def _without_gaps(slots: SlotTable, frame: BatchFrame, tensors: Tensors) -> Work:
    """Fail the sequences whose earlier rows are not here, and take their rows out of the tensors."""
    kept = tuple(s for s in frame.sequences if slots.covers(s.slot, s.request, s.start))
    if len(kept) == len(frame.sequences):
        return frame, tensors
    lost = [s for s in frame.sequences if s not in kept]
    text = "earlier rows of this sequence never reached a stage"
    failed = tuple(Failure(request=s.request, code=ShardLostError.code, text=text) for s in lost)
    rest = {name: _rows_of(array, frame.sequences, kept) for name, array in tensors.items()} if kept else {}
    return msgspec.structs.replace(frame, sequences=kept, failed=frame.failed + failed), rest


def _rows_of(array: Array, sequences: tuple[SequenceStep, ...], kept: tuple[SequenceStep, ...]) -> Array:
    """The rows of *kept* among those of *sequences*, on axis 1."""
    mask = np.concatenate([np.full(s.count, s in kept) for s in sequences])
    return array[:, mask] if array.ndim > 1 and array.shape[1] == mask.size else array
