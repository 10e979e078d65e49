"""An executor that asks the pipeline that serves when the request is sent, and goes on with the next one when that is lost.

Who has a model in hand may keep it for as long as its prompt takes to be read; meanwhile the deployment may have moved.  So the
pipeline is chosen at the last moment, and a request that comes between two pipelines waits rather than fails.

When a pipeline is lost in the middle of an answer, the gateway knows all that matters: the prompt and the tokens so far.  It
waits for the next pipeline and sends the request there under another name, with the tokens as `resume`: their rows are computed
again, none is drawn again, and the stream goes on with the next position.  The draw at a position depends on logits, seed and
position alone (ADR 8), so the answer is the one that would have come.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field

import anyio
import msgspec

from shoal.clock import Clock
from shoal.errors import InfeasibleError, ShardLostError, UnavailableError
from shoal.ids import RequestId
from shoal.runtime.executor.staged import StagedExecutor
from shoal.runtime.request import GenerateRequest, InferRequest, InferResult, OutputDelta, SampledToken

RESUME_S = 60.0
"""So long an answer waits to go on: time to notice, to load what was lost elsewhere, and to link."""
MOST_TRIES = 8
"""An answer that takes its pipeline down with it must not take down many."""
AGAIN_S = 0.25
"""Until the next try; a pipeline that is lost may still be the newest that is known."""


@dataclass(frozen=True, slots=True)
class RoutedExecutor:
    """See `Executor`.  *way* gives the pipeline to ask, within so many seconds; raises UnavailableError when there is none in time.

    *stands* says whether the deployment is still wanted; *resumed* is told when an answer goes on elsewhere, *using* of each
    request for as long as it lasts.
    """

    way: Callable[[float | None], Awaitable[StagedExecutor]]
    clock: Clock
    stands: Callable[[], bool] = lambda: True
    resumed: Callable[[RequestId, int], None] = lambda _request, _tokens: None
    using: Callable[[], AbstractContextManager[None]] = nullcontext

    async def generate(self, request: GenerateRequest) -> AsyncIterator[OutputDelta]:
        """See `Executor.generate`."""
        with self.using():
            async with aclosing(self._generate(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Executor.infer`.  It has no state: it is run again where it was lost."""
        with self.using():
            return await self._infer(request)

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta]:
        answer = _Answer(request)
        executor = await self.way(request.deadline_s)
        while True:
            try:
                async with aclosing(executor.generate(answer.next_try())) as deltas:
                    async for delta in deltas:  # whoever leaves us cancels the request there
                        yield answer.take(delta)
            except ShardLostError as error:
                if answer.tries >= MOST_TRIES:
                    raise
                executor = await self._next(error, answer.lost(self.clock.now_s()))
                self.resumed(request.request, len(answer.tokens))
            else:
                return

    async def _infer(self, request: InferRequest) -> InferResult:
        lost_s: float | None = None
        executor = await self.way(None)
        while True:
            try:
                return await executor.infer(request)
            except ShardLostError as error:
                lost_s = self.clock.now_s() if lost_s is None else lost_s
                executor = await self._next(error, lost_s)

    async def _next(self, error: ShardLostError, lost_s: float) -> StagedExecutor:
        """The pipeline to go on with; raises *error* when the deployment is gone, or none comes in time."""
        while self.stands() and self.clock.now_s() - lost_s < RESUME_S:
            await anyio.sleep(AGAIN_S)
            try:
                return await self.way(None)
            except (UnavailableError, InfeasibleError):  # nodes that were cut off may come back
                continue
        raise error


@dataclass(slots=True)
class _Answer:
    """What is known of an answer, across pipelines."""

    request: GenerateRequest
    tokens: list[int] = field(default_factory=list)
    tries: int = 0
    lost_s: float | None = None
    """Since when nothing has come."""

    def next_try(self) -> GenerateRequest:
        """The request under a name of its own: whatever still comes of an earlier one is nobody's."""
        self.tries += 1
        if self.tries == 1:
            return self.request
        name = RequestId(f"{self.request.request}~{self.tries}")
        resume = (*self.request.resume, *self.tokens)
        return msgspec.structs.replace(self.request, request=name, resume=resume, admitted=True)

    def take(self, delta: OutputDelta) -> OutputDelta:
        """Note what came; raises ShardLostError where it is not what follows."""
        if delta.tokens:
            self._check(delta.tokens[0])
            self.tokens += [token.token for token in delta.tokens]
            self.lost_s = None
        return delta if self.tries == 1 else msgspec.structs.replace(delta, request=self.request.request)

    def lost(self, now_s: float) -> float:
        """Since when the answer has been waiting."""
        self.lost_s = now_s if self.lost_s is None else self.lost_s
        return self.lost_s

    def _check(self, token: SampledToken) -> None:
        expected = len(self.request.prompt) + len(self.request.resume) + len(self.tokens)
        if self.tries > 1 and token.position != expected:
            raise UnavailableError(
                f"the answer was lost with its pipeline after {len(self.tokens)} tokens, and the next one cannot go on with it: "
                "its first stage runs an older version of Shoal",
                hint="send it again, and update the nodes",
            )
