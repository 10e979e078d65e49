"""An executor that answers from a script: the fake for protocol tests."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from shoal.errors import OverloadedError, ShoalError
from shoal.ids import RequestId
from shoal.runtime.request import (
    Array,
    FinishReason,
    GenerateRequest,
    InferRequest,
    InferResult,
    OutputDelta,
    SampledToken,
)

Script = Callable[[GenerateRequest], Sequence[int]]


@dataclass(slots=True, kw_only=True)
class ScriptedExecutor:
    """Answers with the ids of *script*, up to `max_tokens` and the stop tokens, *pace_s* apart.

    A script that ends earlier ends the answer.  *slots* answers run at once; the next is refused.  *failure* is raised after
    *fails_after* tokens.  `cancelled` names the requests that nobody waited for; `live` those that hold a slot.
    """

    script: Script
    outputs: Callable[[InferRequest], dict[str, Array]] | None = None
    pace_s: float = 0.0
    slots: int = 16
    failure: ShoalError | None = None
    fails_after: int = 0
    live: set[RequestId] = field(default_factory=set)
    cancelled: list[RequestId] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[OutputDelta]:
        """See `Executor.generate`."""
        if len(self.live) >= self.slots:
            raise OverloadedError(f"{self.slots} answers are being made already")
        self.live.add(request.request)
        finished = False
        try:
            for delta in self._deltas(request):
                await self._pause()
                finished = delta.finish is not None
                if finished:
                    self.live.discard(request.request)
                yield delta
        finally:
            self.live.discard(request.request)
            if not finished:
                self.cancelled.append(request.request)

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Executor.infer`; without *outputs* the inputs come back."""
        await self._pause()
        if self.failure is not None:
            raise self.failure
        return InferResult(request=request.request, tensors=self.outputs(request) if self.outputs else request.tensors)

    async def _pause(self) -> None:
        if self.pace_s:
            await anyio.sleep(self.pace_s)
        else:
            await anyio.lowlevel.checkpoint()

    def _deltas(self, request: GenerateRequest) -> Iterator[OutputDelta]:
        stops = () if request.ignore_eos else request.stop_token_ids
        ids = list(self.script(request))[: request.max_tokens]
        for count, token in enumerate(ids):
            if self.failure is not None and count == self.fails_after:
                raise self.failure
            if token in stops:
                yield OutputDelta(request=request.request, finish=FinishReason.STOP)
                return
            sampled = SampledToken(token=token, position=len(request.prompt) + count)
            finish = FinishReason.LENGTH if count == request.max_tokens - 1 else None
            yield OutputDelta(request=request.request, tokens=(sampled,), finish=finish)
        if len(ids) < request.max_tokens:
            yield OutputDelta(request=request.request, finish=FinishReason.STOP)
