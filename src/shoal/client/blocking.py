"""The SDK for plain code: each method carries one call."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from shoal.client import calls
from shoal.client.calls import DEFAULT_URL, Call, PlanOptions, ServeOptions
from shoal.fleet.views import DeploymentView, EventView, HealthView, JoinView, NodeView
from shoal.plan.problem import Answer, Problem
from shoal.profile.fleet import FleetProfile

T = TypeVar("T")


class Shoal:
    """A Shoal gateway's own API; answers are values of `shoal.fleet.views`, failures the errors of `shoal.errors`.

    with Shoal("http://127.0.0.1:8000") as shoal: print(shoal.nodes())
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=calls.gateway_url(url), headers=calls.auth_headers(api_key), timeout=timeout_s, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def nodes(self) -> tuple[NodeView, ...]:
        """Every machine that the fleet knows."""
        return self._do(calls.list_nodes())

    def plan(self, model: str, **options: Unpack[PlanOptions]) -> Answer:
        """Where *model* would go, or why it cannot; nothing is loaded."""
        return self._do(calls.plan(model, options))

    def problem(self, model: str, **options: Unpack[PlanOptions]) -> Problem:
        """What `plan` would answer, as a value to solve offline; measures what is not known yet."""
        return self._do(calls.problem(model, options))

    def deploy(self, model: str, *, name: str = "", **options: Unpack[ServeOptions]) -> DeploymentView:
        """Begin to serve *model*; raises InfeasibleError when no plan fits."""
        return self._do(calls.deploy(model, name, options))

    def deployments(self) -> tuple[DeploymentView, ...]:
        """What is served or will be."""
        return self._do(calls.deployments())

    def stop(self, name: str) -> None:
        """Stop serving *name*; raises UnknownModelError."""
        self._do(calls.stop(name))

    def profile(self, model: str = "", *, nodes: Sequence[str] = (), refresh: bool = False) -> FleetProfile:
        """Measured devices and links; *refresh* measures again."""
        return self._do(calls.profile(model, nodes, refresh=refresh))

    def join_info(self) -> JoinView:
        """What to type on a machine that is to join."""
        return self._do(calls.join_info())

    def leave(self, node: str) -> None:
        """Drain a machine and let it go."""
        self._do(calls.leave(node))

    def health(self) -> HealthView:
        """Every component, ready or not."""
        return self._do(calls.health())

    def events(self, *, after: int = 0, limit: int = 100) -> tuple[EventView, ...]:
        """What happened after event *after*, oldest first."""
        return self._do(calls.events(after, limit))

    def follow(self, *, after: int = 0) -> Iterator[EventView]:
        """What happens, as it happens, until the gateway ends the stream."""
        call = calls.follow(after)
        try:
            with self._http.stream(call.method, call.path, params=call.query, timeout=self._timeout(call)) as response:
                if response.status_code != httpx.codes.OK:
                    raise calls.failure(call.path, response.status_code, response.headers, response.read())
                yield from calls.read_events(response.iter_lines())
        except httpx.RequestError as error:
            raise calls.unreachable(str(self._http.base_url), error) from error

    def _do(self, call: Call[T]) -> T:
        try:
            response = self._http.request(
                call.method, call.path, params=call.query, content=call.content(), timeout=self._timeout(call)
            )
        except httpx.RequestError as error:
            raise calls.unreachable(str(self._http.base_url), error) from error
        return calls.read(call, response.status_code, response.headers, response.content)

    def _timeout(self, call: Call[T]) -> httpx.Timeout:
        return httpx.Timeout(self._timeout_s, read=None if call.slow else self._timeout_s)
