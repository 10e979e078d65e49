"""The way from a gateway to the first stage of a deployment, and back: a `PipelineClient` over the bus."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock
from shoal.errors import ShardLostError, UntrustedError
from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, NodeId, RequestId
from shoal.node.foretold import Foretold, Watched
from shoal.node.stage_keys import submit_topic
from shoal.runtime import frames
from shoal.runtime.executor.staged import Answer, InferAnswer
from shoal.runtime.request import FinishReason, GenerateRequest, InferRequest, OutputDelta
from shoal.transport.bus import Bus, Closable, Lane, Sample
from shoal.transport.frame import pack, unpack
from shoal.transport.keys import EventTopic, key_of

_ANSWERS = "answers"


@dataclass(slots=True)
class AnswerDesk:
    """Receives every answer for this gateway and hands it to whoever listens; belongs to the event loop."""

    bus: Bus
    fleet: str
    me: NodeId
    clock: Clock
    log: FilteringBoundLogger
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _ears: dict[RequestId, Callable[[Answer], None]] = field(default_factory=dict)
    _subscription: Closable | None = None

    @property
    def reply_key(self) -> str:
        """Where first and last stages send answers."""
        return key_of(EventTopic(fleet=self.fleet, node=self.me, kind=_ANSWERS))

    def open(self) -> None:
        """Begin to receive."""
        self._subscription = self.bus.subscribe(self.reply_key, self._deliver)

    def close(self) -> None:
        """Stop; harmless when repeated."""
        if self._subscription is not None:
            self._subscription.close()

    def listen(self, request: RequestId, deliver: Callable[[Answer], None]) -> "Ear":
        """Hand answers to *request* to *deliver* until the ear is closed."""
        self._ears[request] = deliver
        return Ear(lambda: self._ears.pop(request, None))

    def lose(self, requests: list[RequestId], reason: str) -> None:
        """End *requests* as lost: their pipeline is gone."""
        for request in requests:
            delta = OutputDelta(
                request=request, finish=FinishReason.ERROR, error_code=ShardLostError.code, error=reason
            )
            self._hand(delta)

    def _deliver(self, sample: Sample) -> None:
        """On a thread of the bus."""
        try:
            header, tensors = unpack(sample.payload)
            message = frames.decode_gateway_message(header)
        except UntrustedError as error:
            self.log.warning("answer.dropped", bytes=len(sample.payload), error=error.message)
            return
        answer: Answer
        match message:
            case frames.Delta(delta=delta):
                answer = delta
            case frames.InferDone():
                # The bus owns the payload only during this call on some carriers: tensors outlive it.
                answer = InferAnswer(done=message, tensors={n: a.copy() for n, a in tensors.items()})
            case frames.Submit() | frames.SubmitInfer() | frames.Cancel():
                self.log.warning("answer.dropped", bytes=len(sample.payload), error="a request where an answer belongs")
                return
            case _:
                assert_never(message)
        try:
            self._loop.call_soon_threadsafe(self._hand, answer)
        except RuntimeError:  # the loop is closed: nobody is left to hear
            return

    def _hand(self, answer: Answer) -> None:
        request = answer.done.request if isinstance(answer, InferAnswer) else answer.request
        ear = self._ears.get(request)
        if ear is not None:
            ear(answer)


@dataclass(frozen=True, slots=True)
class Ear:
    """An open ear."""

    forget: Callable[[], object]

    def close(self) -> None:
        """Stop listening; harmless when repeated."""
        self.forget()


@dataclass(slots=True)
class Pipeline:
    """One deployment at one plan epoch, from this gateway: its requests, and how long ago a token or a sign of life came out."""

    desk: AnswerDesk
    deployment: DeploymentId
    first: NodeId
    shard: ShardId
    last_token_s: float | None = None
    last_sign_s: float | None = None
    running: set[RequestId] = field(default_factory=set)
    foretold: Foretold | None = None
    """Compares what the plan says with what requests take; None where nothing was said."""
    _watched: dict[RequestId, Watched] = field(default_factory=dict)

    def listen(self, request: RequestId, deliver: Callable[[Answer], None]) -> Ear:
        """See `PipelineClient.listen`; notes the age of the last token on the way."""

        def note(answer: Answer) -> None:
            self.last_sign_s = self.desk.clock.now_s()
            if isinstance(answer, InferAnswer) or answer.tokens:
                self.last_token_s = self.last_sign_s
            if request in self._watched and not isinstance(answer, InferAnswer):
                self._watched[request].take(
                    len(answer.tokens), self.last_sign_s, guessed=answer.drafted > 0, cached=answer.cached > 0
                )
            deliver(answer)

        self.running.add(request)
        ear = self.desk.listen(request, note)

        def forget() -> None:
            self.running.discard(request)
            watched = self._watched.pop(request, None)
            if watched is not None and self.foretold is not None:
                self.foretold.end(watched)
            ear.close()

        return Ear(forget)

    async def submit(self, request: GenerateRequest | InferRequest) -> None:
        """Send a request to the first stage."""
        reply_to = self.desk.reply_key
        match request:
            case GenerateRequest():
                if self.foretold is not None:
                    self._watched[request.request] = self.foretold.begin(len(request.prompt))
                payload = pack(frames.encode(frames.Submit(request=request, reply_to=reply_to)), {})
            case InferRequest(tensors=tensors):
                message = frames.SubmitInfer(request=request.request, deployment=request.deployment, reply_to=reply_to)
                payload = pack(frames.encode(message), tensors)
            case _:
                assert_never(request)
        await self._put(payload)

    async def cancel(self, request: RequestId) -> None:
        """Tell the first stage that nobody listens."""
        await self._put(pack(frames.encode(frames.Cancel(request=request)), {}))

    def break_off(self, reason: str) -> None:
        """End every running request: this pipeline is no more."""
        self.desk.lose(list(self.running), reason)

    async def _put(self, payload: bytes) -> None:
        key = key_of(submit_topic(self.desk.fleet, self.first, self.shard))
        await anyio.to_thread.run_sync(partial(self.desk.bus.put, key, payload, lane=Lane.DECODE))
