"""An executor that asks the pipeline that serves when the request is sent, and waits while a deployment moves between two.

Who has a model in hand may keep it for as long as its prompt takes to be read; meanwhile the deployment may have moved.  So the
pipeline is chosen at the last moment, and a request that comes between two pipelines waits rather than fails.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from shoal.runtime.executor.staged import StagedExecutor
from shoal.runtime.request import GenerateRequest, InferRequest, InferResult, OutputDelta


@dataclass(frozen=True, slots=True)
class RoutedExecutor:
    """See `Executor`.  *way* gives the pipeline to ask; raises UnavailableError when there is none in time."""

    way: Callable[[], Awaitable[StagedExecutor]]

    async def generate(self, request: GenerateRequest) -> AsyncIterator[OutputDelta]:
        """See `Executor.generate`."""
        executor = await self.way()
        async with aclosing(executor.generate(request)) as deltas:  # whoever leaves us cancels the request there
            async for delta in deltas:
                yield delta

    async def infer(self, request: InferRequest) -> InferResult:
        """See `Executor.infer`."""
        executor = await self.way()
        return await executor.infer(request)
