"""The SDK for async code: each method carries one call."""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from shoal.client import calls
from shoal.client.calls import DEFAULT_URL, Call, PlanOptions, ServeOptions
from shoal.fleet.views import DeploymentView, EventView, HealthView, JoinView, NodeView
from shoal.plan.problem import Answer, Problem
from shoal.profile.fleet import FleetProfile

T = TypeVar("T")


class AsyncShoal:
    """A Shoal gateway's own API; answers are values of `shoal.fleet.views`, failures the errors of `shoal.errors`.

    async with AsyncShoal("http://127.0.0.1:8000") as shoal: print(await shoal.nodes())
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=calls.gateway_url(url), headers=calls.auth_headers(api_key), timeout=timeout_s, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def nodes(self) -> tuple[NodeView, ...]:
        """Every machine that the fleet knows."""
        return await self._do(calls.list_nodes())

    async def plan(self, model: str, **options: Unpack[PlanOptions]) -> Answer:
        """Where *model* would go, or why it cannot; nothing is loaded."""
        return await self._do(calls.plan(model, options))

    async def problem(self, model: str, **options: Unpack[PlanOptions]) -> Problem:
        """What `plan` would answer, as a value to solve offline; measures what is not known yet."""
        return await self._do(calls.problem(model, options))

    async def deploy(self, model: str, *, name: str = "", **options: Unpack[ServeOptions]) -> DeploymentView:
        """Begin to serve *model*; raises InfeasibleError when no plan fits."""
        return await self._do(calls.deploy(model, name, options))

    async def deployments(self) -> tuple[DeploymentView, ...]:
        """What is served or will be."""
        return await self._do(calls.deployments())

    async def stop(self, name: str) -> None:
        """Stop serving *name*; raises UnknownModelError."""
        await self._do(calls.stop(name))

    async def profile(self, model: str = "", *, nodes: Sequence[str] = (), refresh: bool = False) -> FleetProfile:
        """Measured devices and links; *refresh* measures again."""
        return await self._do(calls.profile(model, nodes, refresh=refresh))

    async def join_info(self) -> JoinView:
        """What to type on a machine that is to join."""
        return await self._do(calls.join_info())

    async def leave(self, node: str) -> None:
        """Drain a machine and let it go."""
        await self._do(calls.leave(node))

    async def health(self) -> HealthView:
        """Every component, ready or not."""
        return await self._do(calls.health())

    async def events(self, *, after: int = 0, limit: int = 100) -> tuple[EventView, ...]:
        """What happened after event *after*, oldest first."""
        return await self._do(calls.events(after, limit))

    async def follow(self, *, after: int = 0) -> AsyncIterator[EventView]:
        """What happens, as it happens, until the gateway ends the stream."""
        call = calls.follow(after)
        try:
            async with self._http.stream(
                call.method, call.path, params=call.query, timeout=self._timeout(call)
            ) as response:
                if response.status_code != httpx.codes.OK:
                    raise calls.failure(call.path, response.status_code, response.headers, await response.aread())
                async for line in response.aiter_lines():
                    event = calls.read_event(line)
                    if event is not None:
                        yield event
        except httpx.RequestError as error:
            raise calls.unreachable(str(self._http.base_url), error) from error

    async def _do(self, call: Call[T]) -> T:
        try:
            response = await self._http.request(
                call.method, call.path, params=call.query, content=call.content(), timeout=self._timeout(call)
            )
        except httpx.RequestError as error:
            raise calls.unreachable(str(self._http.base_url), error) from error
        return calls.read(call, response.status_code, response.headers, response.content)

    def _timeout(self, call: Call[T]) -> httpx.Timeout:
        return httpx.Timeout(self._timeout_s, read=None if call.slow else self._timeout_s)
