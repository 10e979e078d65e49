"""Every call of the admin API as a value: what to send, and how to read the answer.  The two clients only carry it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypedDict, TypeVar, cast
from urllib.parse import quote, urlsplit

import msgspec

from shoal.errors import MalformedFrameError, NodeUnreachableError, SettingsError, ShoalError
from shoal.fleet.faults import Fault, FaultBody, restore
from shoal.fleet.spec import KEEP_ALIVE_S
from shoal.fleet.views import (
    DeploymentView,
    DeployRequest,
    EventView,
    HealthView,
    JoinView,
    NodeView,
    PlanRequest,
    ProfileRequest,
)
from shoal.ids import NodeId
from shoal.plan.problem import (
    Answer,
    Choose,
    Cloud,
    Infeasible,
    Limits,
    Objective,
    Pin,
    Plan,
    Problem,
    Relays,
    RequestShape,
    Residency,
)
from shoal.profile.fleet import FleetProfile
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import ADAPTIVE, Speculation
from shoal.transport.codec import Codec

T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8400"


class PlanOptions(TypedDict, total=False):
    """What one may say about a plan besides the model; see `PlanRequest`."""

    objective: Objective
    shape: RequestShape
    stages: int
    pins: tuple[Pin, ...]
    exclude: tuple[NodeId, ...]
    limits: Limits
    residency: Residency
    choose: Choose
    cloud: Cloud | None
    relays: Relays
    activations: Codec
    activations_per_cut: bool
    draft: str


class ServeOptions(PlanOptions, total=False):
    """What one may say about a deployment besides the model and its name; see `DeployRequest`."""

    speculation: Speculation
    recovery: Recovery
    on_demand: bool
    keep_alive_s: float | None


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One request.  `answer` is the type of its JSON body, None where there is none."""

    method: str
    path: str
    answer: Any
    query: dict[str, int] = {}
    body: msgspec.Struct | None = None
    accepted: tuple[int, ...] = (200, 202, 204)
    slow: bool = False
    """May take minutes: no read timeout."""

    def content(self) -> bytes:
        """The body to send; empty where there is none."""
        return b"" if self.body is None else msgspec.json.encode(self.body)


def list_nodes() -> Call[tuple[NodeView, ...]]:
    return Call(method="GET", path="/shoal/v1/nodes", answer=tuple[NodeView, ...])


def plan(model: str, options: PlanOptions) -> Call[Answer]:
    wanted = PlanRequest(model=model, **options)
    return Call(method="POST", path="/shoal/v1/plan", body=wanted, answer=Plan | Infeasible, slow=True)


def problem(model: str, options: PlanOptions) -> Call[Problem]:
    wanted = PlanRequest(model=model, **options)
    return Call(method="POST", path="/shoal/v1/problem", body=wanted, answer=Problem, slow=True)


def deploy(model: str, name: str, options: ServeOptions) -> Call[DeploymentView]:
    planned = cast("PlanOptions", {k: value for k, value in options.items() if k in PlanOptions.__annotations__})
    wanted = DeployRequest(
        plan=PlanRequest(model=model, **planned),
        name=name,
        speculation=options.get("speculation", ADAPTIVE),
        recovery=options.get("recovery", Recovery.EXACT),
        on_demand=options.get("on_demand", False),
        keep_alive_s=options.get("keep_alive_s", KEEP_ALIVE_S),
    )
    return Call(method="POST", path="/shoal/v1/deployments", body=wanted, answer=DeploymentView, slow=True)


def deployments() -> Call[tuple[DeploymentView, ...]]:
    return Call(method="GET", path="/shoal/v1/deployments", answer=tuple[DeploymentView, ...])


def stop(name: str) -> Call[None]:
    return Call(method="DELETE", path=f"/shoal/v1/deployments/{quote(name)}", answer=None)


def events(after: int, limit: int) -> Call[tuple[EventView, ...]]:
    query = {"after": after, "limit": limit}
    return Call(method="GET", path="/shoal/v1/events", query=query, answer=tuple[EventView, ...])


def follow(after: int) -> Call[EventView]:
    query = {"after": after}
    return Call(method="GET", path="/shoal/v1/events/stream", query=query, answer=EventView, slow=True)


def profile(model: str, nodes: Sequence[str], *, refresh: bool) -> Call[FleetProfile]:
    wanted = ProfileRequest(model=model, nodes=tuple(NodeId(n) for n in nodes), refresh=refresh)
    return Call(method="POST", path="/shoal/v1/profile", body=wanted, answer=FleetProfile, slow=True)


def join_info() -> Call[JoinView]:
    return Call(method="GET", path="/shoal/v1/join", answer=JoinView)


def leave(node: str) -> Call[None]:
    return Call(method="POST", path=f"/shoal/v1/nodes/{quote(node, safe='')}/leave", answer=None, slow=True)


def health() -> Call[HealthView]:
    # A gateway that is not ready says so with 503 and the same body.
    return Call(method="GET", path="/healthz", answer=HealthView, accepted=(200, 503))


def read(call: Call[T], status: int, headers: Mapping[str, str], content: bytes) -> T:
    """The answer to *call*; raises the error that the gateway describes."""
    if status in call.accepted:
        if call.answer is None:
            return None  # type: ignore[return-value]  # T is None here
        try:
            return cast("T", msgspec.json.decode(content, type=call.answer))
        except msgspec.MsgspecError:
            if status == 200:
                raise _foreign(call.path, status) from None
    raise failure(call.path, status, headers, content)


def failure(path: str, status: int, headers: Mapping[str, str], content: bytes) -> ShoalError:
    """The error in an answer that is not what was asked for."""
    try:
        fault = msgspec.json.decode(content, type=FaultBody).error
    except msgspec.MsgspecError:
        return _foreign(path, status)
    delay = headers.get("retry-after", "")
    if fault.retry_after_s is None and delay.isdigit():
        fault = msgspec.structs.replace(fault, retry_after_s=float(delay))
    return restore(fault)


def read_event(line: str) -> EventView | None:
    """The event in one line of a stream; None for comments and blanks; raises the error that ends a stream."""
    if not line.startswith("data: "):
        return None
    data = line.removeprefix("data: ").encode()
    try:
        return msgspec.json.decode(data, type=EventView)
    except msgspec.MsgspecError:
        raise failure("the event stream", 200, {}, data) from None


def read_events(lines: Iterable[str]) -> Iterator[EventView]:
    """The events in the lines of a stream."""
    for line in lines:
        event = read_event(line)
        if event is not None:
            yield event


def auth_headers(api_key: str | None) -> dict[str, str]:
    """What every request carries."""
    json = {"Content-Type": "application/json"}
    return json if not api_key else json | {"Authorization": f"Bearer {api_key}"}


def gateway_url(text: str) -> str:
    """A gateway's address as its clients use it, without the path that OpenAI's clients want; raises SettingsError."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0 or parts.scheme not in {"http", "https"} or not text.isprintable() or " " in text:
        raise SettingsError(
            f"{text!r} is no address of a gateway",
            hint="write http://HOST:PORT, for example http://127.0.0.1:8400",
            param="url",
        )
    return text.rstrip("/").removesuffix("/v1")


def unreachable(url: str, error: Exception) -> NodeUnreachableError:
    """What a broken connection means to the caller."""
    hint = "is it up? start one with: shoal up"
    if url.startswith("https:") and "SSL" in str(error):
        hint = "gateways speak plain HTTP unless a proxy stands before them: write http://HOST:PORT"
    return NodeUnreachableError(f"no gateway answers at {url} ({type(error).__name__})", hint=hint)


def _foreign(path: str, status: int) -> ShoalError:
    if status >= 500:
        return restore(Fault(message=f"{path} answered {status}", code="unavailable", hint="see the gateway's log"))
    return MalformedFrameError(
        f"{path} answered {status} with something that is no answer of Shoal's",
        hint="is this the address of a Shoal gateway?",
    )
