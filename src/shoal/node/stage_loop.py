"""The loop around one stage machine: a plain thread that takes inputs from a queue and carries out effects (ADR 6).

The same loop serves a worker process on the real fabric and a thread of a rehearsal on the in-memory one: everything that it
touches is given.  Frames of one edge travel on one lane, because a stage relies on their order: credits and closings count
on it.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import assert_never

from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock
from shoal.errors import MalformedFrameError, ShoalError, UntrustedError
from shoal.fleet.report import ShardId
from shoal.ids import NodeId
from shoal.runtime import frames, stage
from shoal.runtime.effects import (
    Abandon,
    BatchArrived,
    CancelArrived,
    CreditArrived,
    Effect,
    Emit,
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
    Tick,
    TokensArrived,
)
from shoal.runtime.ports import Session
from shoal.runtime.settings import StageSettings
from shoal.transport.bus import Bus, Closable, Lane, Sample
from shoal.transport.frame import pack, unpack
from shoal.transport.keys import CreditTopic, FrameTopic, TokensTopic, WorkerTopic, key_of
from shoal.transport.pieces import Joiner, split

_TICK_S = 0.25


class Wired:
    """Told to the loop when its way out is there."""

    def __init__(self, outbound: Bus) -> None:
        self.outbound = outbound


class Stopped:
    """Told to the loop when it is to end."""


Item = StageInput | Wired | Stopped


@dataclass(frozen=True, slots=True)
class _Keys:
    """Where a stage sends and listens: built once, for escaping names at every frame costs as much as sending it."""

    frames_in: str
    frames_out: str
    tokens: str
    credits_in: str
    credits_out: str


def _keys(fleet: str, shard: ShardId) -> _Keys:
    name, epoch, index = shard.deployment, shard.plan_epoch, shard.stage
    before = max(0, index - 1)
    return _Keys(
        frames_in=key_of(FrameTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=index)),
        frames_out=key_of(FrameTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=index + 1)),
        tokens=key_of(TokensTopic(fleet=fleet, deployment=name, plan_epoch=epoch)),
        credits_in=key_of(CreditTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=index)),
        credits_out=key_of(CreditTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=before)),
    )


@dataclass(slots=True)
class StageLoop:
    """One stage at work.  `inbox` may be fed from any thread; `run` belongs to one."""

    fleet: str
    shard: ShardId
    settings: StageSettings
    session: Session
    control: Bus
    inbound: Bus
    clock: Clock
    told: Callable[[], None]
    """Called about four times a second and after each step: a place to send reports from."""
    log: FilteringBoundLogger
    inbox: SimpleQueue[Item] = field(default_factory=SimpleQueue)
    steps: int = 0
    busy_s: float = 0.0
    live_requests: int = 0
    waiting_requests: int = 0
    malformed: int = 0
    _outbound: Bus | None = None
    _open: list[Closable] = field(default_factory=list)
    _messages: int = 0
    _joiner: Joiner = field(default_factory=Joiner)
    _keys: _Keys = field(init=False)

    def __post_init__(self) -> None:
        self._keys = _keys(self.fleet, self.shard)

    def listen(self, submit_key: str) -> None:
        """Subscribe to everything that this stage is told; *submit_key* is where gateways send requests."""
        if self.settings.is_first:
            self._open.append(self.control.subscribe(submit_key, self._from_gateway))
            self._open.append(self.inbound.subscribe(self._keys.tokens, self._from_stage))
        else:
            self._open.append(self.inbound.subscribe(self._keys.frames_in, self._from_stage))

    def run(self) -> None:
        """Work until told to stop; closes nothing that it was given."""
        state = stage.start(self.settings)
        ticked_s = self.clock.now_s()
        try:
            while True:
                try:
                    item = self.inbox.get(timeout=_TICK_S)
                except Empty:
                    item = Tick(now_s=self.clock.now_s())
                now_s = self.clock.now_s()
                match item:
                    case Stopped():
                        return
                    case Wired(outbound=outbound):
                        self._connect(outbound)
                    case _:
                        state = self._advance(state, item)
                        if state.first is not None:
                            self.live_requests, self.waiting_requests = len(state.first.live), len(state.first.waiting)
                        if now_s - ticked_s >= _TICK_S:
                            state = self._advance(state, Tick(now_s=now_s))
                            ticked_s = now_s
                self.told()
        finally:
            with contextlib.suppress(ShoalError):
                self._advance(state, Abandon(code="shard_lost", text="the stage is stopping"))
            for subscription in self._open:
                subscription.close()

    def _advance(self, state: stage.StageState, given: StageInput) -> stage.StageState:
        pending: list[StageInput] = [given]
        while pending:
            state, effects = stage.advance(state, pending.pop(0))
            for effect in effects:
                followed = self._carry_out(effect)
                if followed is not None:
                    pending.append(followed)
        return state

    def _carry_out(self, effect: Effect) -> StageInput | None:
        match effect:
            case RunStep():
                return self._step(effect)
            case SendFrame(frame=frame, tensors=tensors):
                self._send(self._keys.frames_out, pack(frames.encode(frame), tensors))
            case SendTokens(frame=tokens):
                self._send(self._keys.tokens, pack(frames.encode(tokens), {}))
            case SendCredit(frame=credit):
                self.inbound.put(self._keys.credits_out, pack(frames.encode(credit), {}))
            case Emit(reply_to=reply_to, delta=delta):
                self.control.put(reply_to, pack(frames.encode(frames.Delta(delta=delta)), {}), lane=Lane.DECODE)
            case EmitResult(reply_to=reply_to, done=done, tensors=tensors):
                self.control.put(reply_to, pack(frames.encode(done), tensors), lane=Lane.DECODE)
            case ReleaseSlot(slot=slot):
                self.session.release(slot)
            case Suspect(overdue_s=overdue_s):
                self.log.warning("stage.next_is_silent", shard=str(self.shard), overdue_s=overdue_s)
            case _:
                assert_never(effect)
        return None

    def _step(self, effect: RunStep) -> StageInput:
        began_s = time.perf_counter()
        try:
            outputs = self.session.step(effect.sequences, effect.tensors)
        except ShoalError as error:
            return StepFailed(code=error.code, text=str(error))
        finally:
            self.busy_s += time.perf_counter() - began_s
            self.steps += 1
        return StepDone(outputs=outputs)

    def _send(self, key: str, payload: bytes) -> None:
        if self._outbound is None:
            raise ShoalError(f"stage {self.shard} sends before it is wired")
        self._messages += 1
        for piece in split(payload, message_id=self._messages):
            self._outbound.put(key, piece, lane=Lane.DECODE)

    def _connect(self, outbound: Bus) -> None:
        self._outbound = outbound
        if not self.settings.is_last:
            self._open.append(outbound.subscribe(self._keys.credits_in, self._from_stage))

    def _from_stage(self, sample: Sample) -> None:
        try:
            whole = self._joiner.add(sample.payload)
            if whole is None:
                return
            header, tensors = unpack(whole)
            frame = frames.decode_stage_frame(header)
        except UntrustedError as error:
            self._drop(sample, error)
            return
        match frame:
            case frames.BatchFrame():
                self.inbox.put(BatchArrived(frame=frame, tensors=tensors))
            case frames.TokensFrame():
                self.inbox.put(TokensArrived(frame=frame))
            case frames.CreditFrame():
                self.inbox.put(CreditArrived(frame=frame))
            case _:
                assert_never(frame)

    def _from_gateway(self, sample: Sample) -> None:
        try:
            header, tensors = unpack(sample.payload)
            message = frames.decode_gateway_message(header)
        except UntrustedError as error:
            self._drop(sample, error)
            return
        match message:
            case frames.Submit():
                self.inbox.put(SubmitArrived(submit=message))
            case frames.SubmitInfer():
                self.inbox.put(InferArrived(submit=message, tensors=tensors))
            case frames.Cancel(request=request):
                self.inbox.put(CancelArrived(request=request))
            case frames.Delta() | frames.InferDone():
                self._drop(sample, MalformedFrameError("an answer where a request belongs"))
            case _:
                assert_never(message)

    def _drop(self, sample: Sample, error: ShoalError) -> None:
        self.malformed += 1
        if self.malformed == 1 or self.malformed % 1000 == 0:
            self.log.warning(
                "frame.dropped", key=sample.key, bytes=len(sample.payload), error=error.message, dropped=self.malformed
            )


def submit_topic(fleet: str, node: NodeId, shard: ShardId) -> WorkerTopic:
    """Where gateways send requests for the pipeline whose first stage is *shard* on *node*."""
    return WorkerTopic(
        fleet=fleet,
        node=node,
        deployment=shard.deployment,
        plan_epoch=shard.plan_epoch,
        stage=shard.stage,
        verb="submit",
    )
