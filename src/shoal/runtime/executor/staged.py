"""Answers from a staged pipeline, wherever its first stage runs.

The first stage sends a sign of life for every request every few seconds (`StageSettings.heartbeat_s`), tokens or not; a much
longer silence means that it is gone.  Leaving the iterator, by closing it or by being cancelled, cancels the request: the
message goes out under a shield, for nobody else would free the slot.
"""

import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol, Self

import anyio

from shoal.errors import ShardLostError, UnsupportedVersionError
from shoal.ids import RequestId
from shoal.runtime.effects import Tensors
from shoal.runtime.executor.failure import failure_of
from shoal.runtime.frames import InferDone
from shoal.runtime.request import FinishReason, GenerateRequest, InferRequest, InferResult, OutputDelta

CANCEL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferAnswer:
    """The end of an inference as it came from the last stage."""

    done: InferDone
    tensors: Tensors


Answer = OutputDelta | InferAnswer


class Listening(Protocol):
    """An open ear; `close` ends it, harmless when repeated."""

    def close(self) -> None: ...


class PipelineClient(Protocol):
    """The way to the first stage of one deployment, and back."""

    def listen(self, request: RequestId, deliver: Callable[[Answer], None]) -> Listening:
        """Call *deliver* on the event loop's thread for every answer to *request*."""
        ...

    async def submit(self, request: GenerateRequest | InferRequest) -> None:
        """Send a request; raises UnavailableError when nobody would receive it."""
        ...

    async def cancel(self, request: RequestId) -> None:
        """Say that nobody wants the answer any more."""
        ...


@dataclass(frozen=True, slots=True)
class StagedExecutor:
    """See `Executor`.  *silence_s* without a sign of life ends a request as ShardLostError."""

    client: PipelineClient
    silence_s: float = 15.0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        """See `Executor.generate`."""
        async with _Ear(self, request.request) as ear:
            await self.client.submit(request)
            while not ear.finished:
                answer = await ear.next()
                if isinstance(answer, InferAnswer):
                    continue
                ear.finished = answer.finish is not None
                if answer.finish is FinishReason.ERROR:
                    raise failure_of(answer.error_code, answer.error, answer.retry_after_s)
                if request.grammar is not None and answer.tokens and not answer.constrained:
                    raise UnsupportedVersionError(
                        "the pipeline's nodes run an older version of Shoal, which knows no grammars",
                        hint="update them, or ask for free text",
                    )
                if answer.tokens or ear.finished:
                    yield answer

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Executor.infer`."""
        async with _Ear(self, request.request) as ear:
            await self.client.submit(request)
            while True:
                answer = await ear.next()
                if isinstance(answer, InferAnswer):
                    ear.finished = True
                    if answer.done.error_code:
                        raise failure_of(answer.done.error_code, answer.done.error)
                    return InferResult(request=request.request, tensors=dict(answer.tensors))


class _Ear:
    """Listens for one request; cancels it on the way out unless it has `finished`."""

    def __init__(self, executor: StagedExecutor, request: RequestId) -> None:
        self._executor = executor
        self._request = request
        self._send, self._receive = anyio.create_memory_object_stream[Answer](math.inf)
        self._listening: Listening | None = None
        self.finished = False

    async def __aenter__(self) -> Self:
        self._listening = self._executor.client.listen(self._request, self._deliver)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listening is not None:
            self._listening.close()
        self._send.close()
        self._receive.close()
        if not self.finished:
            with anyio.move_on_after(CANCEL_TIMEOUT_S, shield=True):
                await self._executor.client.cancel(self._request)

    async def next(self) -> Answer:
        """The next answer; raises ShardLostError when none comes in time."""
        silence_s = self._executor.silence_s
        try:
            with anyio.fail_after(silence_s):
                return await self._receive.receive()
        except TimeoutError:
            raise ShardLostError(
                f"request {self._request}: no sign of life from the pipeline for {silence_s:g} s", hint="send it again"
            ) from None

    def _deliver(self, answer: Answer) -> None:
        try:
            self._send.send_nowait(answer)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return
