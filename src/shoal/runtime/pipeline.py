"""A whole pipeline in one process and in virtual time: the second shell of the stage machine (ADR 6).

Inputs wait in one queue ordered by virtual time; each stage's engine is called when its turn comes, and its result arrives
`step_s` later; a frame arrives `hop_s` after it was sent.  Stages therefore overlap as they would on separate devices, and nothing
sleeps.  Used by tests and rehearsals; with real sessions it is also the reference for what a fleet must answer.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.clock import ManualClock
from shoal.errors import ShoalError
from shoal.ids import RequestId
from shoal.runtime.effects import (
    AskDraft,
    BatchArrived,
    CancelArrived,
    CopySlot,
    CreditArrived,
    DraftDone,
    Effect,
    Emit,
    EmitResult,
    ReleaseSlot,
    RunStep,
    SendCredit,
    SendFrame,
    SendSent,
    SendTokens,
    SentArrived,
    StageInput,
    StepDone,
    StepFailed,
    SubmitArrived,
    Suspect,
    Tensors,
    Tick,
    TokensArrived,
)
from shoal.runtime.frames import BatchFrame, CreditFrame, SentFrame, Submit, TokensFrame
from shoal.runtime.grammar import Grammars
from shoal.runtime.ports import SequenceStep, Session
from shoal.runtime.request import GenerateRequest, OutputDelta
from shoal.runtime.settings import StageSettings
from shoal.runtime.speculate.draft import Drafter
from shoal.runtime.stage import advance
from shoal.runtime.stage_state import StageState, start

MAX_EVENTS = 1_000_000

StepTime = Callable[[int, Sequence[SequenceStep]], float]
"""Seconds that stage *index* takes for a step."""

Message = BatchFrame | TokensFrame | CreditFrame | SentFrame

HopTime = Callable[[int, int, Message, Tensors], float]
"""Seconds that a frame takes from stage to stage."""

TICK_S = 0.25
TICKS_PER_SIGN = 4


@dataclass(frozen=True, slots=True)
class LocalStage:
    """What one stage is, and what it runs on."""

    settings: StageSettings
    session: Session
    grammars: Grammars | None = None


@dataclass(slots=True)
class LocalPipeline:
    """Stages in order.  `deltas` collects answers; `suspects` the stages that saw trouble."""

    stages: Sequence[LocalStage]
    clock: ManualClock = field(default_factory=ManualClock)
    step_s: StepTime = lambda _stage, _sequences: 0.0
    hop_s: HopTime = lambda _source, _target, _frame, _tensors: 0.0
    passes: Callable[[int, int], bool] = lambda _source, _target: True
    """Whether the link from stage to stage works; what is sent while it does not is lost without a word."""
    drafter: Drafter | None = None
    """Who guesses at the first stage; None: as in a worker."""
    foretell: Callable[[AskDraft], DraftDone | None] = lambda _ask: None
    """The draft model; None is no answer, ever."""
    foretell_s: Callable[[AskDraft], float] = lambda _ask: 0.0
    """Seconds until it answers."""
    machines: list[StageState] = field(init=False)
    deltas: dict[RequestId, list[OutputDelta]] = field(default_factory=dict)
    results: dict[RequestId, EmitResult] = field(default_factory=dict)
    arrivals_s: dict[RequestId, list[float]] = field(default_factory=dict)
    suspects: list[int] = field(default_factory=list)
    sent: list[BatchFrame] = field(default_factory=list)
    _queue: list[tuple[float, int, int, StageInput]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.machines = [start(stage.settings, stage.grammars, self.drafter) for stage in self.stages]

    def submit(self, request: GenerateRequest) -> None:
        """Hand a request to the first stage, now."""
        self.give(0, SubmitArrived(submit=Submit(request=request)))

    def cancel(self, request: RequestId) -> None:
        """Tell the first stage that nobody wants the answer, now."""
        self.give(0, CancelArrived(request=request))

    def give(self, stage: int, given: StageInput, *, after_s: float = 0.0) -> None:
        """Queue an input for a stage."""
        self._count += 1
        heapq.heappush(self._queue, (self.clock.now_s() + after_s, self._count, stage, given))

    def turn(self) -> bool:
        """Process the earliest input; False when nothing is left."""
        if not self._queue:
            return False
        at_s, _, stage, given = heapq.heappop(self._queue)
        self.clock.advance(max(0.0, at_s - self.clock.now_s()))
        self._take(stage, given)
        return True

    def wait(self, seconds: float) -> None:
        """Let time pass as it does for workers: clocks tick, and each stage shows the one before it signs of life."""
        for tick in range(1, round(seconds / TICK_S) + 1):
            until_s = self.clock.now_s() + TICK_S
            while self._queue and self._queue[0][0] <= until_s:
                self.turn()
            self.clock.advance(until_s - self.clock.now_s())
            for stage, machine in enumerate(self.machines):
                self._take(stage, Tick(now_s=until_s))
                if tick % TICKS_PER_SIGN == 0 and len(self.machines) > 1:
                    self._show_life(stage, machine)

    def run(self) -> None:
        """Process inputs until nothing is left."""
        for _ in range(MAX_EVENTS):
            if not self.turn():
                return
        raise ShoalError(f"the pipeline is still busy after {MAX_EVENTS} events")

    def generate(self, request: GenerateRequest) -> list[int]:
        """Submit, run until idle, and return the answer's token ids."""
        self.submit(request)
        self.run()
        return self.tokens(request.request)

    def tokens(self, request: RequestId) -> list[int]:
        """Token ids of the answer so far."""
        return [t.token for delta in self.deltas.get(request, []) for t in delta.tokens]

    def close(self) -> None:
        """Close every session."""
        for stage in self.stages:
            stage.session.close()

    def _take(self, stage: int, given: StageInput) -> None:
        _, effects = advance(self.machines[stage], given, self.clock.now_s())
        for effect in effects:
            self._carry_out(stage, effect)

    def _show_life(self, stage: int, machine: StageState) -> None:
        trouble = "" if machine.first else machine.trouble or machine.behind
        sign = msgspec.structs.replace(machine.credit(-1), trouble=trouble)
        self._travel(stage, (stage - 1) % len(self.machines), sign, CreditArrived(frame=sign))

    def _travel(
        self, source: int, target: int, message: Message, given: StageInput, tensors: Tensors | None = None
    ) -> None:
        if self.passes(source, target):
            self.give(target, given, after_s=self.hop_s(source, target, message, tensors or {}))

    def _carry_out(self, stage: int, effect: Effect) -> None:
        match effect:
            case RunStep(sequences=sequences, tensors=tensors):
                self.give(stage, self._step(stage, effect), after_s=self.step_s(stage, sequences))
            case SendFrame(frame=frame, tensors=tensors):
                self.sent.append(frame)
                self._travel(stage, stage + 1, frame, BatchArrived(frame=frame, tensors=tensors), tensors)
            case SendTokens(frame=answer):
                self._travel(stage, 0, answer, TokensArrived(frame=answer))
            case SendCredit(frame=credit):
                self._travel(stage, stage - 1, credit, CreditArrived(frame=credit))
            case SendSent(frame=said):
                self._travel(stage, stage + 1, said, SentArrived(frame=said))
            case Emit(delta=delta):
                self.deltas.setdefault(delta.request, []).append(delta)
                self.arrivals_s.setdefault(delta.request, []).append(self.clock.now_s())
            case EmitResult(done=done):
                self.results[done.request] = effect
            case CopySlot(source=source, target=target, count=count):
                self.stages[stage].session.copy(source, target, count)
            case AskDraft():
                self._ask(stage, effect)
            case ReleaseSlot(slot=slot):
                self.stages[stage].session.release(slot)
            case Suspect():
                self.suspects.append(stage)

    def _ask(self, stage: int, ask: AskDraft) -> None:
        done = self.foretell(ask)
        if done is not None:
            self.give(stage, done, after_s=self.foretell_s(ask))

    def _step(self, stage: int, step: RunStep) -> StepDone | StepFailed:
        try:
            return StepDone(outputs=self.stages[stage].session.step(step.sequences, step.tensors))
        except ShoalError as error:
            return StepFailed(code=error.code, text=str(error))
        except Exception as error:  # noqa: BLE001 as in a worker: it ends that step and nothing else
            return StepFailed(code=ShoalError.code, text=f"the engine failed: {type(error).__name__}: {error}")
