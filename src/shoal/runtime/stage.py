"""One stage of a pipeline as a pure machine: `advance(state, input) -> (state, effects)` (ADR 6, ADR 7).

The same machine runs in a worker process and in the virtual-time pipeline of tests and rehearsals; it does no I/O and
reads no clock.  `advance` changes the state that it is given and returns it: the state has exactly one owner, and the
tables of all live sequences are not copied per token.

How it flows.  The first stage schedules; each stage runs the rows of a frame and sends the frame on with its boundary tensors; the
last one samples and answers the first with token ids.  A stage runs one step at a time and begins the next as soon as its
input is there and its last output has left.  At most `credits` frames are on their way between two stages, so that no queue
of the fabric ever fills (`edge`).  A frame that only closes sequences overtakes nothing but waits for nothing except a running
step.

What can go wrong.  A frame of another plan epoch, of an old step, or naming impossible slots is dropped and counted in
`discarded`.  A sequence whose earlier rows never arrived here (a lost frame) fails as `shard_lost` in the frame itself, its
neighbours go on.  A failed engine step fails the requests of that frame; the failure travels down the pipeline like a result.
A stage that was started anew knows nothing: its neighbours' sequences fail as if their frames had been lost.  If it is the first,
it begins another run, and the stages that outlived it forget the old one; if it is another, the first is told and does the same
(`renewal`).
A next stage that falls silent is `trouble`: every stage hears of it from the one behind it, the first ends what it serves and
refuses what comes until there are signs of life again.  What is made of it is the shell's to say: the fleet plans anew.
"""

from typing import assert_never

import msgspec

from shoal.errors import MalformedFrameError, ShardLostError
from shoal.model.spec import LOGITS
from shoal.runtime.door import MAX_GAP, plausible
from shoal.runtime.edge import Work
from shoal.runtime.effects import (
    Abandon,
    BatchArrived,
    CancelArrived,
    CopySlot,
    CreditArrived,
    DraftDone,
    Effect,
    EmitResult,
    FollowerMet,
    InferArrived,
    ReleaseSlot,
    RunStep,
    SendCredit,
    SendFrame,
    SendTokens,
    SentArrived,
    StageInput,
    StepDone,
    StepFailed,
    SubmitArrived,
    Tensors,
    Tick,
    TokensArrived,
)
from shoal.runtime.frames import BatchFrame, CreditFrame, Failure, InferDone, SentFrame, TokensFrame
from shoal.runtime.last import LastStage
from shoal.runtime.renewal import hear_of, meet
from shoal.runtime.rows import missing, outgoing, without_gaps, without_garbage
from shoal.runtime.stage_state import StageState, release
from shoal.runtime.watch import watch


def advance(state: StageState, given: StageInput, now_s: float | None = None) -> tuple[StageState, tuple[Effect, ...]]:
    """Take one input, at *now_s* on the shell's clock (None: as at the last tick).

    The effects are to be carried out in order before the next one.
    """
    if now_s is not None:
        state.tell_time(now_s)
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
        case SentArrived(frame=sent):
            return _reminded(state, sent)
        case FollowerMet():
            return meet(state, given)
        case Tick():
            return watch(state, given)
        case TokensArrived() | SubmitArrived() | InferArrived() | CancelArrived() | DraftDone() | Abandon():
            return _take_first(state, given)
        case _:
            assert_never(given)


def _take_first(
    state: StageState, given: TokensArrived | SubmitArrived | InferArrived | CancelArrived | DraftDone | Abandon
) -> list[Effect]:
    first = state.first
    if first is None:
        state.discarded += 1
        return []
    match given:
        case TokensArrived(frame=frame):
            ours = _acknowledge(state, frame) and frame.run == state.run
            state.discarded += not ours or frame.step not in first.flights.out
            return first.take_tokens(frame) if ours else []
        case SubmitArrived(submit=submit):
            broken = state.trouble or state.behind
            return first.refuse(submit, ShardLostError.code, broken) if broken else first.submit(submit)
        case InferArrived(submit=infer, tensors=tensors):
            broken = state.trouble or state.behind
            return first.refuse(infer, ShardLostError.code, broken) if broken else first.submit_infer(infer, tensors)
        case CancelArrived(request=request):
            return first.cancel(request)
        case DraftDone():
            return first.foretold(given)
        case Abandon(code=code, text=text):
            return first.abandon(code, text)
        case _:
            assert_never(given)


def _arrive(state: StageState, frame: BatchFrame, tensors: Tensors) -> list[Effect]:
    if state.first is not None or not plausible(frame, tensors, state.settings):
        state.discarded += 1
        return []
    effects = _follow(state, frame.run)
    timely = state.last_step < frame.step <= state.last_step + MAX_GAP or state.last_step < 0
    if not timely:
        state.discarded += 1
        return effects
    state.last_step = frame.step
    state.inbox.append((frame, tensors))
    return effects


def _follow(state: StageState, run: int) -> list[Effect]:
    """Forget all of the run before, if this is another one."""
    if run == state.run:
        return []
    state.run, state.last_step = run, -1
    state.inbox.clear()
    state.garbage.forget()
    state.edge.renew()
    slots = state.slots.clear()
    if state.last is not None:
        state.last.samplers.clear()
    return release(state, slots)


def _reminded(state: StageState, frame: SentFrame) -> list[Effect]:
    """All up to that step has been sent: what is not here by now was lost, and what was ahead of it was nobody's frame."""
    if state.first is not None or frame.plan_epoch != state.settings.plan_epoch or frame.step < 0:
        state.discarded += 1
        return []
    effects = _follow(state, frame.run)
    state.last_step = frame.step
    if state.running is not None or state.inbox or state.edge.outbox:
        return effects
    return [*effects, SendCredit(frame=state.credit(frame.step))]


def _credit(state: StageState, frame: CreditFrame) -> list[Effect]:
    if not _acknowledge(state, frame):
        state.discarded += 1
        return []
    news, state.behind = frame.trouble != state.behind, frame.trouble
    effects = hear_of(state, frame)
    return effects + (
        state.first.abandon(ShardLostError.code, state.behind) if state.first and news and state.behind else []
    )


def _acknowledge(state: StageState, frame: CreditFrame | TokensFrame) -> bool:
    """Forget what the next stage is done with: all up to its step; False when it speaks of another plan."""
    if frame.plan_epoch != state.settings.plan_epoch:
        return False
    if frame.run == state.run:
        state.edge.acknowledge(frame.step)
    state.edge.hear(state.now_s)
    return True


def _step_done(state: StageState, outputs: Tensors) -> list[Effect]:
    if state.running is None:
        state.discarded += 1
        return []
    frame, inputs = state.running
    if frame.run != state.run:
        return _orphaned(state)
    lacking = missing(state.settings, frame, inputs, outputs)
    if lacking:
        return _step_failed(
            state, MalformedFrameError.code, f"no tensor {lacking} came into stage {state.settings.index}"
        )
    state.running = None
    if state.first is not None:
        state.first.flights.ran(frame.step)
    return _complete(state, frame, inputs, outputs)


def _step_failed(state: StageState, code: str, text: str) -> list[Effect]:
    if state.running is None:
        state.discarded += 1
        return []
    if state.running[0].run != state.run:
        return _orphaned(state)
    (frame, _), state.running = state.running, None
    for rows in frame.sequences:
        state.slots.cut(rows.slot, rows.request, rows.start)
    victims = [s.request for s in frame.sequences] + ([frame.infer.request] if frame.infer else [])
    failed = tuple(Failure(request=r, code=code, text=text) for r in victims)
    hollow = msgspec.structs.replace(frame, sequences=(), drafts={}, infer=None, failed=frame.failed + failed)
    return _complete(state, hollow, {}, {})


def _orphaned(state: StageState) -> list[Effect]:
    """A step of an earlier run is over: nobody wants what it made, and what its slots hold is nobody's."""
    assert state.running is not None
    (frame, _), state.running = state.running, None
    return release(state, {rows.slot for rows in frame.sequences})


def _complete(state: StageState, frame: BatchFrame, inputs: Tensors, outputs: Tensors) -> list[Effect]:
    """Pass a frame's results on: to the next stage, or back to the first as tokens."""
    effects: list[Effect] = []
    if state.last is not None:
        effects += _answer(state, state.last, frame, outputs)
    else:
        state.edge.outbox.append((frame, outgoing(state.settings, frame, inputs, outputs)))
        effects += _flush(state)
    # Between two stages the answer says as much as a credit would, and nothing is to be read beside it.
    answered = state.settings.stages == 2 and frame.wants_answer()
    if state.first is None and not answered:
        effects.append(SendCredit(frame=state.credit(frame.step)))
    return effects


def _answer(state: StageState, last: LastStage, frame: BatchFrame, outputs: Tensors) -> list[Effect]:
    effects: list[Effect] = []
    if frame.infer is not None:
        done = InferDone(request=frame.infer.request)
        effects.append(EmitResult(reply_to=frame.infer.reply_to, done=done, tensors=outputs))
    wanted = any(s.logits for s in frame.sequences)
    tokens, failed = last.sample_step(frame.sequences, outputs[LOGITS], frame.drafts) if wanted else ((), ())
    answer = TokensFrame(
        plan_epoch=frame.plan_epoch, step=frame.step, run=frame.run, tokens=tokens, failed=frame.failed + failed
    )
    if not frame.wants_answer():
        return effects
    if state.first is not None:
        return effects + state.first.take_tokens(answer)
    state.edge.tell(state.now_s)
    return [*effects, SendTokens(frame=answer)]


def _proceed(state: StageState) -> list[Effect]:
    """Send what may be sent, then begin work until a step runs or nothing is left to do."""
    effects: list[Effect] = []
    while state.running is None:
        effects += _close(state)
        effects += _flush(state)
        if state.edge.outbox:
            break
        work = _next_work(state)
        if work is None:
            break
        if state.first is not None:
            effects += state.first.asks()  # before the step: the draft model is to run beside it
        effects += _begin(state, *work)
    return effects


def _close(state: StageState) -> list[Effect]:
    """Free the slots of answers that ended, here and (with a frame of its own, at once) on the other stages."""
    frame = state.first.closing_frame() if state.first else None
    if frame is None:
        return []
    if state.last is None:
        state.edge.outbox.append((frame, {}))
    return _release(state, frame)


def _flush(state: StageState) -> list[Effect]:
    return [SendFrame(frame=frame, tensors=tensors) for frame, tensors in state.edge.flush(state.now_s)]


def _next_work(state: StageState) -> Work | None:
    if state.first is not None:
        return state.first.next_frame()
    return state.inbox.popleft() if state.inbox else None


def _begin(state: StageState, frame: BatchFrame, tensors: Tensors) -> list[Effect]:
    effects = _release(state, frame)
    for opened in frame.opened:
        here = state.slots.open(opened)
        if here and opened.source != opened.slot:
            effects.append(CopySlot(source=opened.source, target=opened.slot, count=opened.reuse))
        if state.last is not None:
            state.last.open(opened)
    frame, tensors = without_gaps(state.slots, frame, tensors)
    if state.first is None:
        sent, (frame, tensors) = frame, without_garbage(frame, tensors, state.settings.index)
        state.garbage.saw(sent, frame)
    for rows in frame.sequences:
        state.slots.extend(rows.slot, rows.start + rows.count)
    if not (frame.sequences or frame.infer):
        return effects + _complete(state, frame, {}, {})
    state.running = (frame, tensors)
    return [*effects, RunStep(sequences=frame.sequences, tensors=tensors)]


def _release(state: StageState, frame: BatchFrame) -> list[Effect]:
    released: list[Effect] = []
    for closed in frame.closed:
        # The first stage has given the slot up already; on the others, whoever does not hold it cannot.
        if not state.slots.close(closed) and state.first is None:
            continue
        if not closed.keep:
            released.append(ReleaseSlot(slot=closed.slot))
        if state.last is not None:
            state.last.close(closed.request)
    return released
