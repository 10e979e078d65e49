"""What the gateway asks of the node that it runs in, and of a model's text handling."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.clock import Clock
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
from shoal.ids import DeploymentId, NodeId
from shoal.model.spec import ModelSpec
from shoal.model.tool_format import ToolFormat
from shoal.plan.problem import Answer, Problem
from shoal.profile.fleet import FleetProfile
from shoal.runtime.ports import Executor


class Detokenizer(Protocol):
    """Token ids of one answer to text, never showing half a character."""

    def push(self, token: int) -> str:
        """Text that is certain now."""
        ...

    def flush(self) -> str:
        """What is left at the end; incomplete bytes become U+FFFD."""
        ...


class TextCodec(Protocol):
    """A model's tokenizer and chat template."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of plain text, with the special tokens that the model expects around it."""
        ...

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of a text as a model would write it: without special tokens around it."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
    ) -> tuple[int, ...]:
        """Ids of the rendered conversation with its generation prompt; special tokens in messages and tools stay text.

        Raises InvalidRequestError when the template refuses.
        """
        ...

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools."""
        ...

    def detokenizer(self, *, continues: bool = False, marks: bool = False) -> Detokenizer:
        """A fresh one, for one answer; `continues` says that the text is appended to the prompt's, leading space included.

        `marks` gives the special tokens around calls of tools their text.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """What this token stands for by itself (half a character is possible)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderIO:
    """How an encoder is fed and where its token vectors `[1, T, H]` come out."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A deployment that can answer now.  `encoder` is None where embeddings are not to be had."""

    name: DeploymentId
    spec: ModelSpec
    executor: Executor
    codec: TextCodec | None = None
    encoder: EncoderIO | None = None
    created_unix_s: int = 0


class Deployments(Protocol):
    """The models that this gateway answers for."""

    def served(self) -> Sequence[ServedModel]:
        """All of them, in a stable order."""
        ...

    def get(self, name: str) -> ServedModel:
        """One of them; raises UnknownModelError, or UnavailableError while it still loads."""
        ...


class Health(Protocol):
    """How the node feels."""

    async def report(self) -> HealthView:
        """Every component and deployment now; cheap, called by probes."""
        ...


class Machines(Protocol):
    """The fleet's machines."""

    async def nodes(self) -> Sequence[NodeView]:
        """Every node that is known, gone ones included until forgotten."""
        ...

    async def profile(self, wanted: ProfileRequest) -> FleetProfile:
        """Measure, or answer from the cache."""
        ...

    async def join_info(self) -> JoinView:
        """What to type on a machine that is to join."""
        ...

    async def leave(self, node: NodeId) -> None:
        """Drain the node and let it go."""
        ...


class Placement(Protocol):
    """Plans and deployments."""

    async def plan(self, wanted: PlanRequest) -> Answer:
        """What would be done; nothing is loaded."""
        ...

    async def problem(self, wanted: PlanRequest) -> Problem:
        """The question that `plan` would answer; raises InfeasibleError when it cannot even be asked."""
        ...

    async def deploy(self, wanted: DeployRequest) -> DeploymentView:
        """Begin to serve; raises InfeasibleError when no plan fits."""
        ...

    async def deployments(self) -> Sequence[DeploymentView]:
        """All that are wanted."""
        ...

    async def stop(self, name: DeploymentId) -> None:
        """Stop serving; raises UnknownModelError."""
        ...


class EventLog(Protocol):
    """What happened, oldest first."""

    async def events(self, after: int, limit: int) -> Sequence[EventView]:
        """At most *limit* events with a sequence above *after* that are still kept."""
        ...

    def follow(self, after: int) -> AsyncIterator[EventView]:
        """The same without end; closing the iterator ends it."""
        ...


class Metrics(Protocol):
    """Where the gateway's measurements go."""

    def first_token(self, deployment: str, time_s: float) -> None:
        """A request's first token came *time_s* after the request."""
        ...

    def output_token(self, deployment: str, time_s: float) -> None:
        """A further token came *time_s* after the one before."""
        ...

    def answered(self, deployment: str, outcome: str, prompt_tokens: int, output_tokens: int) -> None:
        """An answer ended; *outcome* is a finish reason or an error's code."""
        ...

    def guessed(self, deployment: str, accepted: int, rejected: int) -> None:
        """Of the tokens that were guessed for an answer, so many were right, and so many wrong."""
        ...

    def reused(self, deployment: str, tokens: int) -> None:
        """So many tokens of the prompts of a request were found in the cache."""
        ...

    def render(self) -> bytes:
        """Everything that is measured, in Prometheus' text format."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """All that the gateway needs from the node around it.

    `unix_s` is the wall clock, for `created` fields only; `draw` gives a fresh number in [0, 2^63), for seeds and ids.
    """

    deployments: Deployments
    health: Health
    machines: Machines
    placement: Placement
    events: EventLog
    metrics: Metrics
    clock: Clock
    unix_s: Callable[[], float]
    draw: Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one caller may ask; sizes in bytes, times in seconds."""

    body_bytes: int = 8 * 1024 * 1024
    answer_s: float = 600.0
    """From a request's arrival to its last token."""
    in_flight: int = 256
    """Requests that are being answered at once."""
    choices: int = 32
    """Answers of one request: prompts x n."""
    parallel_choices: int = 4
    """Of those, how many are generated at once."""
    embedding_inputs: int = 256
