"""The loop around one stage machine: a plain thread that takes inputs from a queue and carries out effects (ADR 6).

The same loop serves a worker process on the real fabric and a thread of a rehearsal on the in-memory one: everything that it
touches is given.  Frames of one edge travel on one lane, because a stage relies on their order: credits and closings count
on it.

An engine call may take longer than anybody should be silent.  So a second thread, the pulse, says the last credit again every
second, to the stage before, and has signs of life sent to those who wait for an answer while a step runs.  It touches nothing
that the loop owns: the loop leaves values for it.  A step that takes longer than `lost_s` is taken for a hanging engine: those
who wait get no more signs of life, so that their gateways give up; the credits go on, and carry the trouble up the pipeline.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple, assert_never

import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.errors import MalformedFrameError, ShoalError, UntrustedError
from shoal.fleet.report import ShardId
from shoal.ids import RequestId
from shoal.node.live_times import LiveTimes
from shoal.node.replies import Replies
from shoal.node.stage_inputs import from_gateway, from_stage
from shoal.node.stage_keys import StageKeys, stage_keys
from shoal.runtime import frames
from shoal.runtime.effects import (
    Abandon,
    AskDraft,
    BatchArrived,
    CopySlot,
    CreditArrived,
    Effect,
    Emit,
    EmitResult,
    FollowerMet,
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
    Suspect,
    Tick,
    TokensArrived,
)
from shoal.runtime.first import FirstStage
from shoal.runtime.grammar import Grammars
from shoal.runtime.ports import Session
from shoal.runtime.request import Array, OutputDelta
from shoal.runtime.settings import StageSettings
from shoal.runtime.stage import advance
from shoal.runtime.stage_state import StageState, start
from shoal.threads import Threads
from shoal.transport.bus import Bus, Closable, Lane, Sample
from shoal.transport.frame import pack
from shoal.transport.pieces import Joiner, split

_TICK_S = 0.25
_PULSE_S = 1.0


class Wired:
    """Told to the loop when its way out is there; *switched* is called when it goes that way and no other.

    *birth* tells which worker is at its end: another one than before knows nothing of what the one before it was sent.
    """

    def __init__(self, outbound: Bus, switched: Callable[[], None] = lambda: None, *, birth: int = 0) -> None:
        self.outbound = outbound
        self.switched = switched
        self.birth = birth


class Greeting(NamedTuple):
    """The next stage's answer to hello *number*, by the worker of that *birth*."""

    number: int
    birth: int


class Stopped:
    """Told to the loop when it is to end."""


Item = StageInput | Wired | Stopped


@dataclass(slots=True)
class StageLoop:
    """One stage at work.  `inbox` may be fed from any thread; `run` belongs to one."""

    fleet: str
    shard: ShardId
    settings: StageSettings
    session: Session
    control: Bus
    inbound: Bus
    threads: Threads
    told: Callable[[], None]
    """Called about four times a second and whenever nothing waits to be done: a place to send reports from."""
    log: FilteringBoundLogger
    grammars: Grammars | None = None
    foretell: Callable[[AskDraft], None] = lambda _: None
    """Has the draft model answer; nobody is told where there is none, and nobody asks (`StageSettings.draft_tokens`)."""
    inbox: SimpleQueue[Item] = field(default_factory=SimpleQueue)
    greeted: SimpleQueue[Greeting] = field(default_factory=SimpleQueue)
    steps: int = 0
    busy_s: float = 0.0
    live: LiveTimes = field(default_factory=LiveTimes)
    live_requests: int = 0
    waiting_requests: int = 0
    malformed: int = 0
    """Pieces of answers that could not be said to whoever asked."""
    trouble: str = ""
    """Why the pipeline does not work as seen from here; empty while it does."""
    spoiled_by: int | None = None
    """The birth of the worker before this stage whose frames nobody can read (0: it did not say); None while they can be read."""
    _behind: str = ""
    _before_birth: int = 0
    """Of the worker of the stage before, as it said in its last hello."""
    _heard_s: float | None = None
    _credit: tuple[int, int] = (0, -1)
    """Run and step of the last one."""
    _renewals: int = 0
    _step_began_s: float | None = None
    _audience: tuple[tuple[str, RequestId], ...] = ()
    _ended: threading.Event = field(default_factory=threading.Event)
    _outbound: Bus | None = None
    _early: int = 0
    """Frames that were lost because there was no way out yet."""
    _open: list[Closable] = field(default_factory=list)
    _messages: int = 0
    _hellos: int = 0
    _last_greeted: int = 0
    _joiner: Joiner = field(default_factory=Joiner)
    _keys: StageKeys = field(init=False)
    _replies: Replies = field(init=False)

    def __post_init__(self) -> None:
        self._replies = Replies(self.control, self.log, self.threads)
        self._keys = stage_keys(self.fleet, self.shard, self.settings.stages)

    @property
    def unsaid(self) -> int:
        """Answers that could not be said."""
        return self._replies.lost

    @property
    def worked_s(self) -> float:
        """Seconds that the engine has worked so far, those of a step under way included.  For any thread."""
        began_s = self._step_began_s
        return self.busy_s + (self.threads.now_s() - began_s if began_s is not None else 0.0)

    def listen(self, submit_key: str) -> None:
        """Subscribe to everything that this stage is told; *submit_key* is where gateways send requests."""
        if self.settings.is_first:
            self._open.append(self.control.subscribe(submit_key, self._from_gateway))
            self._open.append(self.inbound.subscribe(self._keys.tokens, self._from_stage))
        else:
            self._open.append(self.inbound.subscribe(self._keys.frames_in, self._from_stage))

    def hear_next(self, way: Bus) -> Closable:
        """Listen to what the next stage says on the way to it: ends with the way."""
        return way.subscribe(self._keys.credits_in, self._from_stage)

    def greet(self, way: Bus, *, load: Array | None = None) -> int:
        """Say hello to the next stage; the number comes back in `greeted` when it answers.  For one thread.

        *load* goes with it and is ignored there: a hello as heavy as a frame.
        """
        self._hellos += 1
        hello = frames.HelloFrame(plan_epoch=self.shard.plan_epoch, number=self._hellos, birth=self.settings.birth)
        way.put(
            self._keys.forward, pack(frames.encode(hello), {} if load is None else {"load": load}), lane=Lane.DECODE
        )
        return self._hellos

    def run(self) -> None:
        """Work until told to stop; closes nothing that it was given."""
        state = start(self.settings, self.grammars)
        pulse = self.threads.start(f"pulse-{self.shard}", self._pulse)
        self._replies.start(f"replies-{self.shard}")
        shown_s = self.threads.now_s()
        try:
            while True:
                try:
                    item = self.threads.take(self.inbox, _TICK_S)
                except Empty:
                    item = self._tick()
                now_s = self.threads.now_s()
                match item:
                    case Stopped():
                        return
                    case Wired(outbound=outbound, switched=switched, birth=birth):
                        self._outbound, self._early = outbound, 0
                        switched()
                        state = self._advance(state, FollowerMet(birth=birth))
                    case _:
                        state = self._advance(state, item)
                due = now_s - shown_s >= _TICK_S
                if due:
                    state = self._advance(state, self._tick())
                    shown_s = now_s
                # What others may read can wait while the next stage, or our own engine, waits for us.
                if due or self.inbox.empty():
                    self._show(state)
                    self.told()
        finally:
            self._ended.set()
            pulse.join()
            with contextlib.suppress(ShoalError):
                self._advance(state, Abandon(code="shard_lost", text="the stage is stopping"))
            self._replies.close()
            for subscription in self._open:
                subscription.close()

    def _tick(self) -> Tick:
        return Tick(now_s=self.threads.now_s(), heard_s=self._heard_s)

    def _show(self, state: StageState) -> None:
        """Leave what others may read of the machine."""
        self.trouble, self._behind = state.trouble, state.behind
        if not state.garbage.proven:
            self.spoiled_by = None
        elif self.spoiled_by is None:  # of that worker, whoever sends by the time that this is read
            self.spoiled_by = self._before_birth
        if state.first is not None:
            self.live_requests, self.waiting_requests = _requests(state.first)

    def _pulse(self) -> None:
        """Signs of life, on a thread of their own until the loop ends."""
        while not self.threads.wait(self._ended, _PULSE_S):
            began_s = self._step_began_s
            busy_s = self.threads.now_s() - began_s if began_s is not None else 0.0
            if busy_s > self.settings.lost_s:
                self.trouble = f"a step of stage {self.shard.stage} has not ended for {self.settings.lost_s:g} s"
            with contextlib.suppress(ShoalError):  # a session that is being closed
                if self.settings.stages > 1:
                    self._say_credit(*self._credit)
                if self.settings.heartbeat_s < busy_s <= self.settings.lost_s:
                    for reply_to, request in self._audience:
                        self._replies.say(reply_to, OutputDelta(request=request))

    def _say_credit(self, run: int, step: int) -> None:
        # Trouble travels up the pipeline and ends at the first stage: round the ring it would never end.
        trouble = "" if self.settings.is_first else self.trouble or self._unwired() or self._behind
        frame = frames.CreditFrame(
            plan_epoch=self.shard.plan_epoch, step=step, run=run, trouble=trouble, renewals=self._renewals
        )
        self.inbound.put(self._keys.credits_out, pack(frames.encode(frame), {}))

    def _unwired(self) -> str:
        """Trouble only where a frame was lost by it: every stage begins without a way, before anybody is told to ask."""
        return f"stage {self.shard.stage} is not wired yet" if self._early else ""

    def _advance(self, state: StageState, given: StageInput) -> StageState:
        state, effects = advance(state, given, self.threads.now_s())
        for effect in effects:
            self._carry_out(state, effect)
        return state

    def _run_step(self, state: StageState, effect: RunStep) -> None:
        """Call the engine; its result waits behind what came meanwhile.

        A stage alone would never come to it otherwise: each of its steps asks for the next, and cancelled or new requests
        wait for the last token of those that run.  After a long call the machine must know how late it is before it goes on.
        """
        if state.first is not None:
            self._audience = tuple(state.first.audience())
        self._show(state)  # a node that leaves counts what runs, and the first step may be a long one
        began_s = self._step_began_s = self.threads.now_s()
        try:
            done = self._step(effect)
        finally:
            self._step_began_s = None
        if self.threads.now_s() - began_s > _TICK_S:
            self.inbox.put(self._tick())
        self.inbox.put(done)

    def _carry_out(self, state: StageState, effect: Effect) -> None:
        match effect:
            case RunStep():
                self._run_step(state, effect)
            case SendFrame(frame=frame, tensors=tensors):
                codec = self.settings.activations
                self._send(self._keys.frames_out, pack(frames.encode(frame), tensors, codec=codec))
            case SendTokens(frame=tokens):
                self._send(self._keys.tokens, pack(frames.encode(tokens), {}))
            case SendCredit(frame=credit):
                if credit.step >= 0:
                    self._credit = (credit.run, credit.step)
                self._renewals = credit.renewals
                self._say_credit(*self._credit)
            case SendSent(frame=sent):
                self._send(self._keys.frames_out, pack(frames.encode(sent), {}))
            case Emit(reply_to=reply_to, delta=delta):
                self._replies.say(reply_to, delta)
            case EmitResult(reply_to=reply_to, done=done, tensors=tensors):
                self._replies.put(reply_to, pack(frames.encode(done), tensors))
            case CopySlot() | ReleaseSlot():
                self._change_slot(effect)
            case AskDraft():
                self.foretell(effect)
            case Suspect(trouble=trouble):
                self.log.warning("stage.trouble", shard=str(self.shard), trouble=trouble)
            case _:
                assert_never(effect)

    def _change_slot(self, effect: CopySlot | ReleaseSlot) -> None:
        match effect:
            case CopySlot(source=source, target=target, count=count):
                self.session.copy(source, target, count)
            case ReleaseSlot(slot=slot):
                self.session.release(slot)
            case _:
                assert_never(effect)

    def _step(self, effect: RunStep) -> StageInput:
        began_s = self.threads.now_s()
        try:
            outputs = self.session.step(effect.sequences, effect.tensors)
            self.live.stepped(effect.sequences, self.threads.now_s() - began_s)
        except ShoalError as error:
            return StepFailed(code=error.code, text=str(error))
        except Exception as error:  # noqa: BLE001 whatever an engine makes of a step, it ends that step and not the worker
            self.log.warning("step.failed", shard=str(self.shard), error=f"{type(error).__name__}: {error}")
            return StepFailed(code=ShoalError.code, text=f"the engine failed: {type(error).__name__}: {error}")
        finally:
            self.busy_s += self.threads.now_s() - began_s
            self.steps += 1
        return StepDone(outputs=outputs)

    def _send(self, key: str, payload: bytes) -> None:
        """Send to the next stage; what comes before there is a way to it is lost as on any link."""
        if self._outbound is None:
            self._early += 1
            if self._early == 1:
                self.log.warning("frame.lost", shard=str(self.shard), key=key, reason=self._unwired())
            return
        self._messages += 1
        for piece in split(payload, message_id=self._messages):
            self._outbound.put(key, piece, lane=Lane.DECODE)

    def _from_stage(self, sample: Sample) -> None:
        try:
            whole = self._joiner.add(sample.payload)
            heard = from_stage(whole) if whole is not None else None
        except UntrustedError as error:
            self._drop(sample, error)
            return
        match heard:
            case None:
                return  # pieces of it are still on their way
            case frames.HelloFrame(number=number, back=True, birth=birth):
                self._greeted(sample, number, birth)
            case frames.HelloFrame():
                self._before_birth = heard.birth
                answer = msgspec.structs.replace(heard, back=True, birth=self.settings.birth)
                self.inbound.put(self._keys.credits_out, pack(frames.encode(answer), {}))
            case CreditArrived():
                self._heard_s = self.threads.now_s()
                self.inbox.put(heard)
            case BatchArrived() | TokensArrived() | SentArrived():
                self.inbox.put(heard)
            case _:
                assert_never(heard)

    def _greeted(self, sample: Sample, number: int, birth: int) -> None:
        """Each hello is answered once, whoever repeats it: nobody empties the queue of a stage that is wired."""
        if not 0 < number <= self._hellos:
            self._drop(sample, MalformedFrameError(f"an answer to hello {number}, and {self._hellos} were said"))
        elif number > self._last_greeted:  # over an old and a new way to the same stage, it comes twice
            self._last_greeted = number
            self.greeted.put(Greeting(number, birth))

    def _from_gateway(self, sample: Sample) -> None:
        try:
            self.inbox.put(from_gateway(sample.payload))
        except UntrustedError as error:
            self._drop(sample, error)

    def _drop(self, sample: Sample, error: ShoalError) -> None:
        self.malformed += 1
        if self.malformed == 1 or self.malformed % 1000 == 0:
            self.log.warning(
                "frame.dropped", key=sample.key, bytes=len(sample.payload), error=error.message, dropped=self.malformed
            )


def _requests(first: FirstStage) -> tuple[int, int]:
    """How many are being answered, and how many wait; inferences are requests too."""
    flying = len(first.flights.infers())
    return len(first.live) + flying, len(first.waiting) + len(first.infers)
