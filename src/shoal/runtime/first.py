"""What only the first stage does: admit, schedule, and decide when an answer ends.

Admission is in the order of the line (`waiting`) into free slots, of which batch requests leave a quarter to those that somebody
waits for; where the cache is smaller than its slots would fill, also into what is left of it (`room`).  A finished or
cancelled request gives up its slot immediately; `closing` holds what the other stages still have to be told.  A request whose
time has passed ends, in line or in the middle of its answer.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MalformedFrameError,
    OverloadedError,
    ShardLostError,
)
from shoal.ids import RequestId
from shoal.runtime.compose import Load, compose
from shoal.runtime.effects import DraftDone, Effect, Emit, Tensors
from shoal.runtime.flights import Flight, Flights
from shoal.runtime.frames import (
    BatchFrame,
    ClosedSequence,
    Failure,
    InferStep,
    RequestTokens,
    Submit,
    SubmitInfer,
    TokensFrame,
)
from shoal.runtime.judge import judge
from shoal.runtime.ports import SequenceStep
from shoal.runtime.prefix import LEAST, Cached, KeptSlots, Reuse, best
from shoal.runtime.refusal import check_request, error_delta, failed, infer_failed, refusal
from shoal.runtime.request import FinishReason, OutputDelta, Priority
from shoal.runtime.room import CacheRoom
from shoal.runtime.scheduler import Pace, chunk_rows, is_prefill, next_batch, next_chunk
from shoal.runtime.sequence import LiveSequence
from shoal.runtime.settings import StageSettings
from shoal.runtime.slots import SlotTable
from shoal.runtime.speculate.ahead import Ahead
from shoal.runtime.speculate.draft import Drafter
from shoal.runtime.speculate.speculator import Speculator, agreed
from shoal.runtime.waiting import Waiter, WaitingLine


@dataclass(slots=True)
class FirstStage:
    """Everything alive at the head of a pipeline.  Owned by one stage machine."""

    settings: StageSettings
    slots: SlotTable
    drafter: Drafter
    infers: deque[tuple[SubmitInfer, Tensors]] = field(default_factory=deque)
    live: dict[RequestId, LiveSequence] = field(default_factory=dict)
    closing: list[ClosedSequence] = field(default_factory=list)
    next_step: int = 0
    last_was_prefill: bool = False
    waiting: WaitingLine = field(init=False)
    flights: Flights = field(init=False)
    speculator: Speculator = field(init=False)
    kept: KeptSlots = field(default_factory=KeptSlots)
    pace: Pace = field(default_factory=Pace)
    room: CacheRoom = field(init=False)

    def __post_init__(self) -> None:
        rules = self.settings.scheduler
        self.waiting = WaitingLine(rules.queue_limit, rules.batch_patience_s, rules.queue_s)
        self.flights = Flights(lost_s=self.settings.lost_s, probe_s=self.settings.probe_s)
        given = self.settings
        total = given.cache_tokens or given.slots * given.context_tokens
        self.room = CacheRoom(given.slots, given.context_tokens, total)
        ahead = Ahead(given.draft_tokens, given.slots, given.vocabulary)
        self.speculator = Speculator(given.speculation, self.drafter, given.context_tokens, ahead)

    def submit(self, submit: Submit) -> list[Effect]:
        """Queue a request; refuse it with an error delta when it can never run, too many wait, or its time would pass in line."""
        request = submit.request.request
        if request in self.live or request in self.waiting:
            return []
        try:
            check_request(submit.request, self.settings)
        except InvalidRequestError as error:
            return [refusal(submit, error)]
        self.waiting.join(submit, self.flights.now_s)
        self._admit()
        overflow = self.waiting.overflow(request, len(self.live))
        return [refusal(*overflow)] if overflow else []

    def submit_infer(self, submit: SubmitInfer, tensors: Tensors) -> list[Effect]:
        """Queue an inference."""
        limit = self.settings.scheduler.queue_limit
        if len(self.infers) >= max(1, limit):
            step = InferStep(request=submit.request, reply_to=submit.reply_to)
            return [infer_failed(step, OverloadedError.code, f"{limit} inferences wait already: try again in a moment")]
        self.infers.append((submit, tensors))
        return []

    def refuse(self, submit: Submit | SubmitInfer, code: str, text: str) -> list[Effect]:
        """Say at once that the pipeline does not work."""
        match submit:
            case Submit(request=request, reply_to=reply_to):
                return [failed(reply_to, Failure(request=request.request, code=code, text=text))]
            case SubmitInfer(request=name, reply_to=reply_to):
                return [infer_failed(InferStep(request=name, reply_to=reply_to), code, text)]

    def cancel(self, request: RequestId) -> list[Effect]:
        """Forget a request wherever it is; unknown ones are fine (it may just have ended)."""
        submit = self.waiting.leave(request)
        if submit is not None:
            return [Emit(reply_to=submit.reply_to, delta=OutputDelta(request=request, finish=FinishReason.CANCELLED))]
        self.infers = deque(item for item in self.infers if item[0].request != request)
        sequence = self.live.get(request)
        if sequence is None:
            return []
        return [self._finish(sequence, OutputDelta(request=request, finish=FinishReason.CANCELLED))]

    def overdue(self) -> list[Effect]:
        """End what has had its time, waiting or running."""
        now_s = self.flights.now_s
        effects: list[Effect] = [refusal(*late) for late in self.waiting.overdue(now_s, len(self.live))]
        for gone in self.kept.expired(now_s):
            self._forget(gone)
        for sequence in [s for s in self.live.values() if s.deadline_s <= now_s]:
            error = DeadlineExceededError(
                f"the answer was not complete after the {sequence.request.deadline_s:g} s that were given: "
                f"{len(sequence.output)} of at most {sequence.request.max_tokens} tokens",
                hint="give it more time, or ask for fewer tokens",
            )
            effects.append(self._finish(sequence, error_delta(sequence.request.request, error)))
        return effects

    def abandon(self, code: str, text: str) -> list[Effect]:
        """Fail every request, waiting or running."""
        queued = self.waiting.clear()
        steps = [InferStep(request=s.request, reply_to=s.reply_to) for s, _ in self.infers]
        steps += self.flights.infers()
        self.infers.clear()
        self.flights.out.clear()
        effects = [e for r in list(self.live) for e in self._fail(Failure(request=r, code=code, text=text))]
        effects += [failed(s.reply_to, Failure(request=s.request.request, code=code, text=text)) for s in queued]
        return effects + [infer_failed(step, code, text) for step in steps]

    def begin_again(self, code: str, text: str) -> list[Effect]:
        """Fail every request and begin another run: nothing that any stage holds counts from now on."""
        effects = self.abandon(code, text)
        self.closing.clear()
        self.kept.held.clear()
        self.room.clear()
        # Runs are drawn at random: the next number is as good as any.
        self.settings = msgspec.structs.replace(self.settings, run=(self.settings.run + 1) % 2**32)
        return effects

    def empty_frame(self) -> BatchFrame:
        """A frame that only says which run it is."""
        return BatchFrame(plan_epoch=self.settings.plan_epoch, run=self.settings.run, step=self._take_step())

    def signs_of_life(self) -> list[Effect]:
        """An empty delta for every request, waiting or running."""
        return [Emit(reply_to=reply_to, delta=OutputDelta(request=request)) for reply_to, request in self.audience()]

    def audience(self) -> list[tuple[str, RequestId]]:
        """Who waits for what, and where."""
        waiting = [(s.reply_to, s.request.request) for s in self.waiting]
        running = [(s.reply_to, request) for request, s in self.live.items()]
        infers = [(s.reply_to, s.request) for s, _ in self.infers]
        infers += [(infer.reply_to, infer.request) for infer in self.flights.infers()]
        return waiting + running + infers

    def probe(self, unacked: Container[int]) -> BatchFrame | None:
        """A frame that only wants to be answered, when it is time for one (`Flights.probe_due`)."""
        if not self.flights.probe_due(unacked):
            return None
        step = self._take_step()
        self.flights.begin(step, Flight((), self.flights.now_s, probe=True))
        return BatchFrame(plan_epoch=self.settings.plan_epoch, run=self.settings.run, step=step, probe=True)

    def take_tokens(self, frame: TokensFrame) -> list[Effect]:
        """Apply what became of a step.  Frames come in order, so that a skipped step means a lost frame."""
        flight, lost = self.flights.answer(frame.step)
        if flight is None:
            return []
        effects = [effect for gone in lost for effect in self._lose(gone)]
        for failure in frame.failed:
            if flight.infer and failure.request == flight.infer.request:
                effects.append(infer_failed(flight.infer, failure.code, failure.text))
            effects += self._fail_step(failure, frame.step)
        right = 0
        for entry in frame.tokens:
            draft = flight.drafts.get(entry.request, ())
            right += agreed(entry.tokens, draft)
            effects += self._apply(entry, draft)
        if flight.prefill and flight.rows:
            self.pace.passed(flight.rows, (self.flights.now_s - flight.begun_s) / self.settings.stages)
        if frame.tokens and not flight.prefill:
            guessed = sum(len(draft) for draft in flight.drafts.values())
            took_s, assisted = self.flights.now_s - flight.begun_s, flight.assisted or self._assisted()
            self.speculator.ledger.lapped(took_s, len(flight.requests), guessed, right, assisted=assisted)
        told = {f.request for f in frame.failed} | {e.request for e in frame.tokens if e.tokens}
        text = "the last stage answered a step without the token that was wanted"
        for request in flight.wants:
            if request not in told:
                effects += self._fail(Failure(request=request, code=MalformedFrameError.code, text=text))
        return effects

    def foretold(self, done: DraftDone) -> list[Effect]:
        """The draft model says how a text may go on."""
        self.speculator.ahead.answered(done)
        return []

    def asks(self) -> Sequence[Effect]:
        """What the draft model is to be asked since the last time."""
        return self.speculator.ahead.take()

    def next_frame(self) -> tuple[BatchFrame, Tensors] | None:
        """The next thing to run, counted as in flight from now on; None when nothing can or may run."""
        rules = self.settings.scheduler
        pressure = self.flights.pressure(last_was_prefill=self.last_was_prefill, chunk_rows=self.pace.rows(rules))
        if self.infers and pressure.frames < rules.in_flight:
            return self._infer_frame()
        batch = next_batch(self.live.values(), pressure, rules)
        if not batch:
            return None
        first = self.live[batch[0].request]
        if first.opened:
            return self._rows_frame(batch, None)
        reuse = self._reuse(first)
        first.begin(reuse)
        rows = chunk_rows(self.live.values(), pressure, rules)
        return self._rows_frame((next_chunk(first, rows, exactly=rules.replays_exactly),), reuse)

    def closing_frame(self) -> BatchFrame | None:
        """Tell the other stages who has ended since the last time; None when nobody has."""
        if not self.closing:
            return None
        closed, self.closing = tuple(self.closing), []
        return BatchFrame(
            plan_epoch=self.settings.plan_epoch, run=self.settings.run, step=self._take_step(), closed=closed
        )

    def _infer_frame(self) -> tuple[BatchFrame, Tensors]:
        submit, tensors = self.infers.popleft()
        infer = InferStep(request=submit.request, reply_to=submit.reply_to)
        step = self._take_step()
        self.flights.begin(step, Flight((), self.flights.now_s, infer=infer))
        return BatchFrame(plan_epoch=self.settings.plan_epoch, run=self.settings.run, step=step, infer=infer), tensors

    def _reuse(self, sequence: LiveSequence) -> Reuse | None:
        """What a sequence that nobody has heard of begins behind; one that begins again has had its try."""
        if sequence.began_step >= 0:
            return None
        request = sequence.request
        running = [s.held() for s in self.live.values() if s.opened]
        others = [*running, *self.kept.held.values()]
        ids = sequence.ids(0, sequence.known) if not request.reproducible else request.prompt
        return best(ids, sequence.own, others, reproducible=request.reproducible)

    def _rows_frame(self, batch: tuple[SequenceStep, ...], reuse: Reuse | None) -> tuple[BatchFrame, Tensors]:
        step = self._take_step()
        self.last_was_prefill = is_prefill(batch, self.live)
        batch, drafts = self.speculator.extend(batch, self.live, self.flights.now_s)
        wants = tuple([s.request for s in batch if s.logits])
        requests = tuple([s.request for s in batch])
        count = sum(s.count for s in batch)
        flight = Flight(
            requests, self.flights.now_s, prefill=self.last_was_prefill, wants=wants, drafts=drafts, rows=count,
            assisted=self._assisted(),
        )  # fmt: skip
        self.flights.begin(step, flight)
        return compose(self.settings, Load(step, batch, drafts, reuse), self.live)

    def _assisted(self) -> bool:
        return self.speculator.ahead.busy(self.flights.now_s)

    def _take_step(self) -> int:
        step, self.next_step = self.next_step, self.next_step + 1
        return step

    def _admit(self) -> None:
        while free := self.slots.free():
            waiter = self.waiting.first(batch=self._room_for_batch())
            if waiter is None:
                return
            request = waiter.submit.request
            slot = self.kept.choose(free, request.prompt, reproducible=request.reproducible)
            if not self._make_room(slot, len(request.prompt) + request.max_tokens):
                return  # whoever comes later and needs less does not overtake: nobody would starve for being long
            self.waiting.take(waiter)
            self._open(waiter, slot)

    def _make_room(self, slot: int, length: int) -> bool:
        """Whether a request that may come to *length* positions can begin in *slot*, once others' old caches are forgotten."""
        if not self.room.scarce or self.room.fits(slot, length):
            return True
        if not self.room.ever_fits(slot, length):
            return False
        oldest = sorted(
            self.kept.held.values(), key=lambda held: (held.slot == slot, held.since_s)
        )  # its own goes last
        for held in oldest:
            self.kept.take(held.slot)
            self._forget(held)
            if self.room.fits(slot, length):
                return True
        return False

    def _forget(self, held: Cached) -> None:
        """What a slot holds that nobody uses is no more, here and on the other stages."""
        self.room.release(held.slot)
        self.closing.append(ClosedSequence(request=held.request, slot=held.slot))

    def _room_for_batch(self) -> bool:
        """Batch work leaves a quarter of the slots to those that somebody waits for."""
        batch = [s for s in self.live.values() if s.request.priority is Priority.BATCH]
        return len(batch) < max(1, self.slots.size - self.slots.size // 4)

    def _open(self, waiter: Waiter, slot: int) -> None:
        request = waiter.submit.request
        stops = () if request.ignore_eos else (*request.stop_token_ids, *self.settings.eos_token_ids)
        self.slots.reserve(slot, request.request)
        self.room.promise(slot, len(request.prompt) + request.max_tokens)
        # Newcomers wait for whoever was served before they came.
        self.live[request.request] = LiveSequence(
            request,
            waiter.submit.reply_to,
            slot,
            frozenset(stops),
            last_step=self.next_step - 1,
            began_s=self.flights.now_s,
            deadline_s=waiter.deadline_s,
            own=self.kept.take(slot),
            output=list(request.resume),
        )

    def _apply(self, entry: RequestTokens, draft: tuple[int, ...]) -> list[Effect]:
        sequence = self.live.get(entry.request)
        if sequence is None:
            return []
        judged = judge(sequence, entry, draft, self.settings)
        self.speculator.judged(entry.request, agreed(entry.tokens, draft), len(draft))
        if isinstance(judged, Failure):
            return self._fail(judged)
        if judged.finish is not None:
            return [self._finish(sequence, judged)]
        return [Emit(reply_to=sequence.reply_to, delta=judged)] if judged.tokens else []

    def _finish(self, sequence: LiveSequence, delta: OutputDelta) -> Effect:
        request = sequence.request.request
        del self.live[request]
        if delta.finish is not FinishReason.ERROR:
            self.waiting.turnover.ended(self.flights.now_s - sequence.began_s)
        self.speculator.close(request)
        self._close(sequence, failed=delta.finish is FinishReason.ERROR)
        self._admit()
        return Emit(reply_to=sequence.reply_to, delta=delta)

    def _close(self, sequence: LiveSequence, *, failed: bool) -> None:
        """Its slot is free; what is in it may serve others, unless something went wrong with it."""
        if not (sequence.opened or sequence.began_step >= 0):  # no stage has heard of it: the slot is as it was
            self.slots.give_up(sequence.slot)
            self.room.withdraw(sequence.slot)
            if sequence.own is not None:
                self.kept.keep(sequence.own)
            return
        sequence.settle()
        held = sequence.held(self.flights.now_s)
        keep = 0 if failed or len(held.ids) < LEAST or not sequence.opened else len(held.ids)
        closed = ClosedSequence(request=held.request, slot=held.slot, keep=keep)
        self.slots.close(closed)
        if keep:
            self.kept.keep(held)
            self.room.end(held.slot, keep)
        else:
            self.room.release(held.slot)
        self.closing.append(closed)

    def _fail_step(self, failure: Failure, step: int) -> list[Effect]:
        """A request failed in *step*: one that began behind what some stage does not hold begins again."""
        sequence = self.live.get(failure.request)
        if sequence is None or step < sequence.began_step:
            return []
        if (
            failure.code == ShardLostError.code
            and sequence.reused
            and len(sequence.output) == len(sequence.request.resume)
        ):
            sequence.again(self.next_step)
            return []
        return self._fail(failure)

    def _fail(self, failure: Failure) -> list[Effect]:
        sequence = self.live.get(failure.request)
        if sequence is None:
            return []
        return [self._finish(sequence, failed(sequence.reply_to, failure).delta)]

    def _lose(self, flight: Flight) -> list[Effect]:
        text = "a frame of the pipeline was lost on its way"
        effects: list[Effect] = []
        if flight.infer:
            effects.append(infer_failed(flight.infer, ShardLostError.code, text))
        for request in flight.requests:
            effects += self._fail(Failure(request=request, code=ShardLostError.code, text=text))
        return effects
