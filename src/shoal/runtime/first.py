"""What only the first stage does: admit, schedule, and decide when an answer ends.

Admission is first come, first served into free slots; whoever finds the queue full is told so at once.  A finished or cancelled
request gives up its slot immediately; `closing` holds what the other stages still have to be told.
"""

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np

from shoal.errors import (
    ContextLengthError,
    InvalidRequestError,
    MalformedFrameError,
    OverloadedError,
    ShardLostError,
    ShoalError,
    UnsupportedVersionError,
)
from shoal.ids import RequestId
from shoal.model.spec import INPUT_IDS
from shoal.runtime.effects import Effect, Emit, EmitResult, Tensors
from shoal.runtime.flights import Flight, Flights
from shoal.runtime.frames import (
    BatchFrame,
    ClosedSequence,
    Failure,
    InferDone,
    InferStep,
    OpenedSequence,
    RequestTokens,
    Submit,
    SubmitInfer,
    TokensFrame,
)
from shoal.runtime.grammar import Bound, check_grammar
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import FinishReason, GenerateRequest, OutputDelta, SampledToken
from shoal.runtime.sampling import check_sampling
from shoal.runtime.scheduler import is_prefill, next_batch
from shoal.runtime.sequence import LiveSequence
from shoal.runtime.settings import StageSettings
from shoal.runtime.slots import SlotTable
from shoal.runtime.waiting import WaitingLine

_UNBOUND = (
    "the last stage runs an older version of Shoal, which knows no grammars: update its node, or ask for free text"
)


@dataclass(slots=True)
class FirstStage:
    """Everything alive at the head of a pipeline.  Owned by one stage machine."""

    settings: StageSettings
    slots: SlotTable
    infers: deque[tuple[SubmitInfer, Tensors]] = field(default_factory=deque)
    live: dict[RequestId, LiveSequence] = field(default_factory=dict)
    closing: list[ClosedSequence] = field(default_factory=list)
    next_step: int = 0
    last_was_prefill: bool = False
    waiting: WaitingLine = field(init=False)
    flights: Flights = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = WaitingLine(self.settings.scheduler.queue_limit)
        self.flights = Flights(lost_s=self.settings.lost_s, probe_s=self.settings.probe_s)

    def submit(self, submit: Submit) -> list[Effect]:
        """Queue a request; refuse it with an error delta when it can never run or too many wait."""
        request = submit.request.request
        if request in self.live or request in self.waiting:
            return []
        try:
            check_request(submit.request, self.settings)
        except InvalidRequestError as error:
            return [_refusal(submit, error)]
        self.waiting.join(submit)
        self._admit()
        overflow = self.waiting.overflow(len(self.live))
        return [_refusal(*overflow)] if overflow else []

    def submit_infer(self, submit: SubmitInfer, tensors: Tensors) -> list[Effect]:
        """Queue an inference."""
        limit = self.settings.scheduler.queue_limit
        if len(self.infers) >= max(1, limit):
            step = InferStep(request=submit.request, reply_to=submit.reply_to)
            return [
                _infer_failed(step, OverloadedError.code, f"{limit} inferences wait already: try again in a moment")
            ]
        self.infers.append((submit, tensors))
        return []

    def refuse(self, submit: Submit | SubmitInfer, code: str, text: str) -> list[Effect]:
        """Say at once that the pipeline does not work."""
        match submit:
            case Submit(request=request, reply_to=reply_to):
                return [_error(reply_to, Failure(request=request.request, code=code, text=text))]
            case SubmitInfer(request=name, reply_to=reply_to):
                return [_infer_failed(InferStep(request=name, reply_to=reply_to), code, text)]

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

    def abandon(self, code: str, text: str) -> list[Effect]:
        """Fail every request, waiting or running."""
        queued = self.waiting.clear()
        steps = [InferStep(request=s.request, reply_to=s.reply_to) for s, _ in self.infers]
        steps += self.flights.infers()
        self.infers.clear()
        self.flights.out.clear()
        effects = [e for r in list(self.live) for e in self._fail(Failure(request=r, code=code, text=text))]
        effects += [_error(s.reply_to, Failure(request=s.request.request, code=code, text=text)) for s in queued]
        return effects + [_infer_failed(step, code, text) for step in steps]

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
                effects.append(_infer_failed(flight.infer, failure.code, failure.text))
            effects += self._fail(failure)
        for entry in frame.tokens:
            effects += self._apply(entry)
        told = {f.request for f in frame.failed} | {e.request for e in frame.tokens if e.tokens}
        text = "the last stage answered a step without the token that was wanted"
        for request in flight.wants:
            if request not in told:
                effects += self._fail(Failure(request=request, code=MalformedFrameError.code, text=text))
        return effects

    def next_frame(self) -> tuple[BatchFrame, Tensors] | None:
        """The next thing to run, counted as in flight from now on; None when nothing can or may run."""
        pressure = self.flights.pressure(last_was_prefill=self.last_was_prefill)
        if self.infers and pressure.frames < self.settings.scheduler.in_flight:
            return self._infer_frame()
        batch = next_batch(self.live.values(), pressure, self.settings.scheduler)
        return self._rows_frame(batch) if batch else None

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

    def _rows_frame(self, batch: tuple[SequenceStep, ...]) -> tuple[BatchFrame, Tensors]:
        step = self._take_step()
        self.last_was_prefill = is_prefill(batch, self.live)
        wants = tuple([s.request for s in batch if s.logits])
        requests = tuple([s.request for s in batch])
        flight = Flight(requests, self.flights.now_s, prefill=self.last_was_prefill, wants=wants)
        self.flights.begin(step, flight)
        ids: list[int] = []
        opened: list[OpenedSequence] = []
        for rows in batch:
            sequence = self.live[rows.request]
            ids += sequence.ids(rows.start, rows.count)
            if not sequence.opened:
                opened.append(_opened(sequence))
            sequence.opened, sequence.scheduled, sequence.last_step = True, rows.start + rows.count, step
        frame = BatchFrame(
            plan_epoch=self.settings.plan_epoch, run=self.settings.run, step=step, sequences=batch, opened=tuple(opened)
        )
        return frame, {INPUT_IDS: np.array([ids], np.int64)}

    def _take_step(self) -> int:
        step, self.next_step = self.next_step, self.next_step + 1
        return step

    def _admit(self) -> None:
        while self.waiting and (slot := self.slots.free()) is not None:
            submit = self.waiting.next()
            request = submit.request
            stops = () if request.ignore_eos else (*request.stop_token_ids, *self.settings.eos_token_ids)
            self.slots.open(slot, request.request)
            # Newcomers wait for whoever was served before they came.
            self.live[request.request] = LiveSequence(
                request, submit.reply_to, slot, frozenset(stops), last_step=self.next_step - 1
            )

    def _apply(self, entry: RequestTokens) -> list[Effect]:
        sequence = self.live.get(entry.request)
        if sequence is None:
            return []
        kept: list[SampledToken] = []
        finish = None
        for token in entry.tokens:
            vocabulary = self.settings.vocabulary
            if token.position != sequence.known or token.token < 0 or 0 < vocabulary <= token.token:
                text = (
                    f"the last stage answered token {token.token} at position {token.position} where {sequence.known} "
                    f"is next, of a vocabulary of {vocabulary}"
                )
                return self._fail(Failure(request=entry.request, code=MalformedFrameError.code, text=text))
            finish = sequence.accept(token.token, self.settings.context_tokens)
            if finish is not FinishReason.STOP:
                kept.append(token)
            if finish is not None:
                break
        if entry.bound is Bound.COMPLETE and len(kept) == len(entry.tokens):
            finish = FinishReason.STOP  # the whole answer is there, even if max_tokens are as well
        constrained = entry.bound is not Bound.FREE
        if sequence.request.grammar is not None and not constrained:
            return self._fail(Failure(request=entry.request, code=UnsupportedVersionError.code, text=_UNBOUND))
        delta = OutputDelta(request=entry.request, tokens=tuple(kept), finish=finish, constrained=constrained)
        if finish is not None:
            return [self._finish(sequence, delta)]
        return [Emit(reply_to=sequence.reply_to, delta=delta)] if kept else []

    def _finish(self, sequence: LiveSequence, delta: OutputDelta) -> Effect:
        request = sequence.request.request
        del self.live[request]
        self.slots.close(sequence.slot, request)
        self.closing.append(ClosedSequence(request=request, slot=sequence.slot))
        self._admit()
        return Emit(reply_to=sequence.reply_to, delta=delta)

    def _fail(self, failure: Failure) -> list[Effect]:
        sequence = self.live.get(failure.request)
        if sequence is None:
            return []
        return [self._finish(sequence, _error(sequence.reply_to, failure).delta)]

    def _lose(self, flight: Flight) -> list[Effect]:
        text = "a frame of the pipeline was lost on its way"
        effects: list[Effect] = []
        if flight.infer:
            effects.append(_infer_failed(flight.infer, ShardLostError.code, text))
        for request in flight.requests:
            effects += self._fail(Failure(request=request, code=ShardLostError.code, text=text))
        return effects


def check_request(request: GenerateRequest, settings: StageSettings) -> None:
    """Raise InvalidRequestError or ContextLengthError, naming the field, unless the pipeline can answer *request*."""
    if not settings.slots:
        raise InvalidRequestError(
            "this model does not generate text", hint="ask for embeddings or infer instead", param="model"
        )
    length, limit = len(request.prompt), settings.context_tokens
    if not length:
        raise InvalidRequestError("the prompt is empty", hint="send at least one token", param="prompt")
    if request.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {request.max_tokens}; at least 1 is needed", param="max_tokens")
    if length >= limit:
        raise ContextLengthError(
            f"the prompt has {length} tokens and the context {limit}", hint="shorten the prompt by at least "
            f"{length - limit + 1} tokens, or serve the model with a longer context", param="prompt"
        )  # fmt: skip
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or (settings.vocabulary and high >= settings.vocabulary):
        raise InvalidRequestError(f"the prompt holds token ids outside [0, {settings.vocabulary})", param="prompt")
    check_sampling(request.sampling, settings.vocabulary)
    check_grammar(request.grammar, ignore_eos=request.ignore_eos)


def _opened(sequence: LiveSequence) -> OpenedSequence:
    request = sequence.request
    return OpenedSequence(
        request=request.request,
        slot=sequence.slot,
        prompt=request.prompt,
        sampling=request.sampling,
        grammar=request.grammar,
    )


def _refusal(submit: Submit, error: ShoalError) -> Emit:
    return _error(submit.reply_to, Failure(request=submit.request.request, code=error.code, text=str(error)))


def _error(reply_to: str, failure: Failure) -> Emit:
    delta = OutputDelta(request=failure.request, finish=FinishReason.ERROR, error_code=failure.code, error=failure.text)
    return Emit(reply_to=reply_to, delta=delta)


def _infer_failed(step: InferStep, code: str, text: str) -> EmitResult:
    done = InferDone(request=step.request, error_code=code, error=text)
    return EmitResult(reply_to=step.reply_to, done=done, tensors={})
