"""A gateway goes on with an answer on the next pipeline when the one that made it is lost."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial

import anyio
import numpy as np
import pytest

from shoal.clock import ManualClock
from shoal.errors import ContextLengthError, ShardLostError, ShoalError, UnavailableError
from shoal.ids import DeploymentId, RequestId
from shoal.node import routed
from shoal.node.routed import MOST_TRIES, RESUME_S, RoutedExecutor
from shoal.runtime.request import (
    FinishReason,
    GenerateRequest,
    InferRequest,
    InferResult,
    OutputDelta,
    SampledToken,
)


@dataclass
class Pipe:
    """A pipeline that counts: the token at position p is p.  It is lost after `lives` tokens; `old` knows of no resumption."""

    lives: int = 1000
    error: ShoalError = field(default_factory=lambda: ShardLostError("a worker died"))
    old: bool = False
    asked: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        self.asked.append(request)
        done = 0 if self.old else len(request.resume)
        for n in range(done, request.max_tokens):
            if n - done >= self.lives:
                raise self.error
            last = n == request.max_tokens - 1
            position = len(request.prompt) + n
            yield OutputDelta(
                request=request.request,
                tokens=(SampledToken(token=position, position=position),),
                finish=FinishReason.LENGTH if last else None,
            )

    async def infer(self, request: InferRequest) -> InferResult:
        if not self.lives:
            raise self.error
        return InferResult(request=request.request, tensors=request.tensors)


@dataclass
class Road:
    """Pipelines one after another; None: there is none at that moment, which takes `pause_s`."""

    pipes: list[Pipe | None]
    clock: ManualClock = field(default_factory=ManualClock)
    pause_s: float = 1.0
    wanted: bool = True
    heard: list[tuple[str, int]] = field(default_factory=list)

    async def way(self, _patience_s: float | None) -> Pipe:
        pipe = self.pipes.pop(0) if len(self.pipes) > 1 else self.pipes[0]
        if pipe is None:
            self.clock.advance(self.pause_s)
            raise UnavailableError("it recovers")
        return pipe

    def executor(self) -> RoutedExecutor:
        return RoutedExecutor(
            self.way, self.clock, lambda: self.wanted, lambda request, tokens: self.heard.append((request, tokens))
        )


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "AGAIN_S", 0.0)


REQUEST = GenerateRequest(request=RequestId("a"), deployment=DeploymentId("m"), prompt=(0, 0, 0), max_tokens=10)


def run(road: Road) -> list[OutputDelta]:
    async def ask() -> list[OutputDelta]:
        return [delta async for delta in road.executor().generate(REQUEST)]

    return anyio.run(ask)


def tokens(deltas: list[OutputDelta]) -> list[int]:
    return [t.token for delta in deltas for t in delta.tokens]


@pytest.mark.parametrize("lives", [[0], [4], [9], [4, 0, 3], [1] * (MOST_TRIES - 1)], ids=str)
def test_the_stream_goes_on_where_it_was_lost(lives: list[int]) -> None:
    last = Pipe()
    road = Road([*(Pipe(n) for n in lives), None, None, last])
    deltas = run(road)

    assert tokens(deltas) == list(range(3, 13))
    assert deltas[-1].finish is FinishReason.LENGTH
    assert {delta.request for delta in deltas} == {"a"}
    assert road.heard[-1] == ("a", sum(lives))
    assert last.asked[0].resume == tuple(range(3, 3 + sum(lives)))
    assert last.asked[0].request != "a"
    assert last.asked[0].admitted


def test_an_answer_that_nobody_takes_up_ends_with_what_was_wrong() -> None:
    road = Road([Pipe(4), None])
    with pytest.raises(ShardLostError, match="a worker died"):
        run(road)

    assert road.clock.now_s() >= RESUME_S


def test_a_deployment_that_is_gone_is_not_waited_for() -> None:
    road = Road([Pipe(4), Pipe()], wanted=False)
    with pytest.raises(ShardLostError):
        run(road)


def test_an_answer_that_is_lost_again_and_again_ends() -> None:
    with pytest.raises(ShardLostError):
        run(Road([Pipe(1)] * 20))


def test_what_is_the_requests_fault_is_not_tried_again() -> None:
    pipe = Pipe(0, ContextLengthError("too long"))
    with pytest.raises(ContextLengthError):
        run(Road([pipe]))

    assert len(pipe.asked) == 1


def test_a_first_stage_that_begins_anew_is_found_out() -> None:
    with pytest.raises(UnavailableError, match="older version"):
        run(Road([Pipe(4), Pipe(old=True)]))


def test_an_inference_is_run_again() -> None:
    request = InferRequest(request=RequestId("i"), deployment=DeploymentId("m"), tensors={"x": np.ones(2)})
    road = Road([Pipe(0), None, Pipe()])

    assert anyio.run(partial(road.executor().infer, request)).request == "i"


def test_whoever_leaves_cancels_there() -> None:
    closed: list[str] = []

    class Open(Pipe):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
            try:
                async for delta in super().generate(request):
                    yield delta
            finally:
                closed.append(request.request)

    async def leave() -> None:
        deltas = Road([Open()]).executor().generate(REQUEST)
        await anext(deltas)
        await deltas.aclose()  # type: ignore[attr-defined]

    check: Callable[[], object] = partial(anyio.run, leave)
    check()
    assert closed == ["a"]
