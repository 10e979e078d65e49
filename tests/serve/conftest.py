"""A gateway with a byte-level codec and scripted answers: the same application as in production, without models."""

import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
import pytest
from anyio.from_thread import start_blocking_portal
from litestar import Litestar
from litestar.testing import TestClient

from shoal.clock import ManualClock
from shoal.errors import InfeasibleError, UnknownModelError
from shoal.fleet.state import Standing
from shoal.fleet.views import (
    ComponentHealth,
    DeploymentState,
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
from shoal.model.spec import ModelKind, ModelSpec
from shoal.model.tool_format import HERMES
from shoal.plan.problem import BlockSpec, DeviceSpec, Infeasible, Plan, Problem
from shoal.profile.fleet import FleetProfile
from shoal.runtime.executor.scripted import ScriptedExecutor
from shoal.runtime.request import (
    Array,
    GenerateRequest,
    InferRequest,
    InferResult,
    OutputDelta,
    SampledToken,
    TokenLogprob,
)
from shoal.serve.access import Access
from shoal.serve.app import build_app
from shoal.serve.ports import EncoderIO, Limits, Node, ServedModel
from shoal.serve.run import bind, serve

EOS = 256
VOCABULARY = 257
CONTEXT = 512


class ByteDetokenizer:
    """Takes a text that starts anew to begin with a space that nobody wrote, as SentencePiece vocabularies do."""

    def __init__(self, *, continues: bool) -> None:
        self.pending = b""
        self.strip_space = not continues

    def push(self, token: int) -> str:
        self.pending += bytes([token])
        try:
            text = self.pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text = self.pending.decode(errors="replace")
        self.pending = b""
        if self.strip_space:
            self.strip_space, text = False, text.removeprefix(" ")
        return text

    def flush(self) -> str:
        text, self.pending = self.pending.decode(errors="replace"), b""
        return text


class ByteCodec:
    """One token per byte; a conversation is `role:content` lines."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode_answer(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
    ) -> tuple[int, ...]:
        lines = [f"{m['role']}:{m['content']}" for m in messages] + (["tools"] if tools else [])
        return self.encode("\n".join(lines) + "\nassistant:")

    tool_format = HERMES

    def detokenizer(self, *, continues: bool = False, marks: bool = False) -> ByteDetokenizer:
        return ByteDetokenizer(continues=continues)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@dataclass
class Script:
    """The shipped scripted executor, with what a gateway must cope with besides: deltas of several tokens (`chunk`),
    log-probabilities, an end without a reason or by a failed delta (`last_words` after `fails_after` tokens).
    """

    reply: str = "Hello, world"
    chunk: int = 1
    pace_s: float = 0.0
    tick: Callable[[], None] = lambda: None
    failure: Exception | None = None
    fails_after: int = 0
    last_words: tuple[OutputDelta, ...] | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    most_running: int = 0
    executor: ScriptedExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.executor = ScriptedExecutor(script=lambda _: tuple(self.reply.encode()), outputs=hidden_states, slots=1000)

    @property
    def running(self) -> int:
        return len(self.executor.live)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        self.requests.append(request)
        e = self.executor
        e.pace_s, e.failure, e.fails_after = self.pace_s, self.failure, self.fails_after
        held: tuple[SampledToken, ...] = ()
        try:
            async with aclosing(e.generate(request)) as deltas:
                async for delta in deltas:
                    self.most_running = max(self.running, self.most_running)
                    held += tuple(with_logprobs(t, request.sampling.logprobs) for t in delta.tokens)
                    if len(held) >= self.chunk or delta.finish:
                        self.tick()
                        yield msgspec.structs.replace(delta, tokens=held)
                        held = ()
                    if (
                        self.last_words is not None
                        and delta.tokens[0].position - len(request.prompt) + 1 >= self.fails_after
                    ):
                        for words in self.last_words:
                            yield words
                        return
        finally:
            self.closed.append(request.request)

    async def infer(self, request: InferRequest) -> InferResult:
        self.executor.pace_s, self.executor.failure = self.pace_s, self.failure
        return await self.executor.infer(request)


def with_logprobs(token: SampledToken, wanted: int | None) -> SampledToken:
    if wanted is None:
        return token
    top = tuple(TokenLogprob(token=(token.token + i) % 256, logprob=-0.5 - i) for i in range(wanted))
    return msgspec.structs.replace(token, logprob=-0.5, top=top)


def hidden_states(request: InferRequest) -> dict[str, Array]:
    ids = request.tensors["input_ids"]
    return {"last_hidden_state": np.stack([ids, np.ones_like(ids), -ids, ids * ids], axis=-1).astype(np.float32)}


@dataclass
class FakeFleet:
    """Everything that the gateway asks of its node, in memory."""

    models: dict[str, ServedModel]
    views: dict[str, DeploymentView] = field(default_factory=dict)
    log: list[EventView] = field(default_factory=list)
    left: list[NodeId] = field(default_factory=list)
    health: HealthView = field(
        default_factory=lambda: HealthView(components=(ComponentHealth(name="fabric", ready=True),))
    )
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    outcomes: list[tuple[str, str, int, int]] = field(default_factory=list)
    guesses: list[tuple[str, int, int]] = field(default_factory=list)
    cached: list[tuple[str, int]] = field(default_factory=list)

    def served(self) -> Sequence[ServedModel]:
        return list(self.models.values())

    def get(self, name: str) -> ServedModel:
        if name not in self.models:
            raise UnknownModelError(
                f"no model {name!r} is served", hint=f"served: {', '.join(self.models)}", param="model"
            )
        return self.models[name]

    async def report(self) -> HealthView:
        return self.health

    async def nodes(self) -> Sequence[NodeView]:
        return [NodeView(id=NodeId("a" * 32), name="pi", standing=Standing.ALIVE, cores=4)]

    async def profile(self, wanted: ProfileRequest) -> FleetProfile:
        return FleetProfile(profile_epoch=7 if wanted.refresh else 6, devices=(), links=())

    async def join_info(self) -> JoinView:
        return JoinView(address="tcp/127.0.0.1:7447", command="shoal join tcp/127.0.0.1:7447")

    async def leave(self, node: NodeId) -> None:
        self.left.append(node)

    async def plan(self, wanted: PlanRequest) -> Plan | Infeasible:
        return Infeasible(reason=f"{wanted.model} is too big", needed_bytes=10, available_bytes=4, hint="add a node")

    async def problem(self, wanted: PlanRequest) -> Problem:
        device = DeviceSpec(node=NodeId("a"), memory_budget_bytes=9, decode_s=(1.0,), prefill_s=(1.0,))
        return Problem(
            blocks=(BlockSpec(name=wanted.model, weights_bytes=1),),
            devices=(device,),
            links=(),
            source=NodeId("a"),
            limits=wanted.limits,
            choose=wanted.choose,
            cloud=wanted.cloud,
            residency=wanted.residency,
        )

    async def deploy(self, wanted: DeployRequest) -> DeploymentView:
        if wanted.plan.model == "huge":
            raise InfeasibleError("6 bytes are missing", hint="add a node", param="model")
        name = DeploymentId(wanted.name or wanted.plan.model)
        self.views[name] = DeploymentView(name=name, model=wanted.plan.model, state=DeploymentState.PLANNED)
        return self.views[name]

    async def deployments(self) -> Sequence[DeploymentView]:
        return list(self.views.values())

    async def stop(self, name: DeploymentId) -> None:
        if self.views.pop(name, None) is None:
            raise UnknownModelError(f"no deployment {name!r}", param="name")

    async def events(self, after: int, limit: int) -> Sequence[EventView]:
        return [e for e in self.log if e.sequence > after][:limit]

    async def follow(self, after: int) -> AsyncGenerator[EventView, None]:
        for event in await self.events(after, 1000):
            yield event

    def first_token(self, deployment: str, time_s: float) -> None:
        self.first.append(time_s)

    def output_token(self, deployment: str, time_s: float) -> None:
        self.later.append(time_s)

    def answered(self, deployment: str, outcome: str, prompt_tokens: int, output_tokens: int) -> None:
        self.outcomes.append((deployment, outcome, prompt_tokens, output_tokens))

    def guessed(self, deployment: str, accepted: int, rejected: int) -> None:
        self.guesses.append((deployment, accepted, rejected))

    def reused(self, deployment: str, tokens: int) -> None:
        self.cached.append((deployment, tokens))

    def render(self) -> bytes:
        return b"# HELP shoal_tokens_total x\nshoal_tokens_total 1\n"


@dataclass
class Gateway:
    """One assembled gateway with the knobs that tests turn."""

    script: Script
    fleet: FakeFleet
    clock: ManualClock
    access: Access
    limits: Limits

    def node(self) -> Node:
        numbers = itertools.count(1)
        f = self.fleet
        return Node(
            deployments=f, health=f, machines=f, placement=f, events=f, metrics=f,
            clock=self.clock, unix_s=lambda: 1_700_000_000.0, draw=lambda: next(numbers),
        )  # fmt: skip

    def app(self) -> Litestar:
        return build_app(self.node(), self.access, self.limits)

    def client(self) -> TestClient[Litestar]:
        return TestClient(self.app(), base_url="http://127.0.0.1")


def served_models(script: Script) -> dict[str, ServedModel]:
    lm = ModelSpec(
        name="bytes", kind=ModelKind.CAUSAL_LM, architecture="bytes", vocabulary=VOCABULARY, context_tokens=CONTEXT,
        eos_token_ids=(EOS,),
    )  # fmt: skip
    encoder = ModelSpec(
        name="minilm", kind=ModelKind.ENCODER, architecture="bert", vocabulary=VOCABULARY, context_tokens=64,
        pooling="mean", normalise=True,
    )  # fmt: skip
    io = EncoderIO(inputs=("input_ids", "attention_mask", "token_type_ids"), output="last_hidden_state")
    return {
        "bytes": ServedModel(name=DeploymentId("bytes"), spec=lm, executor=script, codec=ByteCodec(), created_unix_s=5),
        "org/minilm": ServedModel(
            name=DeploymentId("org/minilm"), spec=encoder, executor=script, codec=ByteCodec(), encoder=io
        ),
    }


@pytest.fixture
def gateway() -> Gateway:
    script = Script()
    return Gateway(
        script=script, fleet=FakeFleet(served_models(script)), clock=ManualClock(), access=Access(), limits=Limits()
    )


@pytest.fixture
def client(gateway: Gateway) -> TestClient[Litestar]:
    return gateway.client()


@pytest.fixture
def url(gateway: Gateway) -> Iterator[str]:
    """The gateway on a real socket of this machine."""
    with start_blocking_portal() as portal:
        running, address = portal.start_task(partial(serve, gateway.app(), bind("127.0.0.1", 0), grace_s=1.0))
        yield address
        running.cancel()
