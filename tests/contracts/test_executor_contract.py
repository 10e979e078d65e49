"""What every Executor keeps: run on the scripted one and on the staged one over a two-stage pipeline in this process."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from shoal.clock import SystemClock
from shoal.errors import ContextLengthError, InvalidRequestError, OverloadedError, ShardLostError
from shoal.ids import DeploymentId, RequestId
from shoal.node.routed import RoutedExecutor
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.effects import Abandon, InferArrived
from shoal.runtime.executor.scripted import ScriptedExecutor
from shoal.runtime.executor.staged import Answer, InferAnswer, StagedExecutor
from shoal.runtime.frames import SubmitInfer
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.ports import Executor
from shoal.runtime.request import FinishReason, GenerateRequest, InferRequest, OutputDelta
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import StageSettings

pytestmark = pytest.mark.anyio
SLOTS = 2


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def request(name: str, max_tokens: int = 6, **more: object) -> GenerateRequest:
    return GenerateRequest(
        request=RequestId(name), deployment=DeploymentId("m"), prompt=(1, 2, 3), max_tokens=max_tokens, **more
    )


def two_stages() -> LocalPipeline:
    def settings(index: int) -> StageSettings:
        return StageSettings(
            plan_epoch=1,
            index=index,
            stages=2,
            slots=SLOTS,
            context_tokens=128,
            scheduler=SchedulerSettings(queue_limit=0),
        )

    backend = NullBackend()
    front = backend.load(null_shard(0, 1, vocabulary=0, context_tokens=128))
    back = backend.load(null_shard(1, 2, embeds=False, context_tokens=128))
    return LocalPipeline([LocalStage(settings(0), front), LocalStage(settings(1), back)])


@dataclass
class LocalClient:
    """The pipeline beside the event loop; `pump` moves it one event per turn of the loop while it is `awake`."""

    pipeline: LocalPipeline
    ears: dict[RequestId, Callable[[Answer], None]] = field(default_factory=dict)
    told: dict[RequestId, int] = field(default_factory=dict)
    cancelled: list[RequestId] = field(default_factory=list)
    awake: bool = True

    def listen(self, request: RequestId, deliver: Callable[[Answer], None]) -> "Ear":
        self.ears[request] = deliver
        return Ear(self, request)

    async def submit(self, request: GenerateRequest | InferRequest) -> None:
        match request:
            case GenerateRequest():
                self.pipeline.submit(request)
            case InferRequest():
                submit = SubmitInfer(request=request.request, deployment=request.deployment)
                self.pipeline.give(0, InferArrived(submit=submit, tensors=request.tensors))

    async def cancel(self, request: RequestId) -> None:
        await anyio.lowlevel.checkpoint()
        self.cancelled.append(request)
        self.pipeline.cancel(request)

    async def pump(self) -> None:
        while True:
            if self.awake and self.pipeline.turn():
                self.deliver()
                await anyio.lowlevel.checkpoint()
            else:
                await anyio.sleep(0.001)

    def deliver(self) -> None:
        for name, deliver in list(self.ears.items()):
            deltas = self.pipeline.deltas.get(name, [])
            for delta in deltas[self.told.get(name, 0) :]:
                deliver(delta)
            self.told[name] = len(deltas)
            if (result := self.pipeline.results.pop(name, None)) is not None:
                deliver(InferAnswer(done=result.done, tensors=result.tensors))


@dataclass
class Ear:
    client: LocalClient
    request: RequestId

    def close(self) -> None:
        self.client.ears.pop(self.request, None)


@dataclass
class Rig:
    executor: Executor
    tokens: Callable[[GenerateRequest], list[int]]
    live: Callable[[], int]
    cancelled: list[RequestId]


@pytest.fixture
async def client() -> AsyncIterator[LocalClient]:
    client = LocalClient(two_stages())
    async with anyio.create_task_group() as group:
        group.start_soon(client.pump)
        yield client
        group.cancel_scope.cancel()


@pytest.fixture(params=["scripted", "staged", "routed"])
async def rig(request: pytest.FixtureRequest, client: LocalClient) -> Rig:
    if request.param == "scripted":
        executor = ScriptedExecutor(script=lambda r: [(7 * i + 3) % 50 for i in range(1000)], slots=SLOTS)
        return Rig(
            executor, lambda r: list(executor.script(r))[: r.max_tokens], lambda: len(executor.live), executor.cancelled
        )

    def live() -> int:
        return sum(len(machine.slots.held) for machine in client.pipeline.machines)

    async def way(_patience_s: float | None) -> StagedExecutor:
        return StagedExecutor(client)

    executor = RoutedExecutor(way, SystemClock()) if request.param == "routed" else StagedExecutor(client)
    return Rig(executor, lambda r: two_stages().generate(r), live, client.cancelled)


async def collect(executor: Executor, wanted: GenerateRequest) -> list[OutputDelta]:
    return [delta async for delta in executor.generate(wanted)]


async def settled(rig: Rig) -> None:
    with anyio.fail_after(5):
        while rig.live():  # noqa: ASYNC110 - slots have no event to wait for
            await anyio.sleep(0.001)


def ids_of(deltas: list[OutputDelta]) -> list[int]:
    return [token.token for delta in deltas for token in delta.tokens]


async def test_an_answer_comes_in_order_and_says_why_it_ended(rig: Rig) -> None:
    wanted = request("a")

    deltas = await collect(rig.executor, wanted)

    assert ids_of(deltas) == rig.tokens(wanted)
    assert [t.position for d in deltas for t in d.tokens] == list(range(3, 9))
    assert [d.finish for d in deltas][-1] is FinishReason.LENGTH
    assert all(d.finish is None for d in deltas[:-1])


async def test_a_finished_answer_is_not_cancelled_and_holds_nothing(rig: Rig) -> None:
    await collect(rig.executor, request("a"))

    await settled(rig)
    assert rig.cancelled == []


async def test_a_stop_token_ends_the_answer_unseen(rig: Rig) -> None:
    ids = rig.tokens(request("a"))

    deltas = await collect(rig.executor, request("a", stop_token_ids=(ids[3],)))

    assert ids_of(deltas) == ids[: ids.index(ids[3])]
    assert deltas[-1].finish is FinishReason.STOP


async def test_closing_the_iterator_cancels_the_request_and_frees_its_slot(rig: Rig) -> None:
    async with aclosing(rig.executor.generate(request("a", max_tokens=100))) as deltas:
        async for _ in deltas:
            break

    assert rig.cancelled == [RequestId("a")]
    await settled(rig)


async def test_a_cancelled_task_cancels_its_request(rig: Rig) -> None:
    async def read() -> None:
        async with aclosing(rig.executor.generate(request("a", max_tokens=100))) as deltas:
            async for _ in deltas:
                started.set()

    started = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await started.wait()
        group.cancel_scope.cancel()

    assert rig.cancelled == [RequestId("a")]
    await settled(rig)


async def test_several_answers_at_once_do_not_mix(rig: Rig) -> None:
    answers: dict[str, list[int]] = {}

    async def read(name: str) -> None:
        answers[name] = ids_of(await collect(rig.executor, request(name, max_tokens=20)))

    async with anyio.create_task_group() as group:
        for name in ("a", "b"):
            group.start_soon(read, name)

    assert answers == {name: rig.tokens(request(name, max_tokens=20)) for name in ("a", "b")}


async def test_one_too_many_is_refused_before_its_first_token(rig: Rig) -> None:
    async with (
        aclosing(rig.executor.generate(request("a", 100))) as a,
        aclosing(rig.executor.generate(request("b", 100))) as b,
    ):
        await anext(a)
        await anext(b)

        with pytest.raises(OverloadedError):
            await collect(rig.executor, request("c"))


async def test_the_staged_executor_restores_the_error_of_the_first_stage(client: LocalClient) -> None:
    executor = StagedExecutor(client)

    with pytest.raises(ContextLengthError, match="128") as caught:
        await collect(
            executor,
            GenerateRequest(request=RequestId("a"), deployment=DeploymentId("m"), prompt=(1,) * 200, max_tokens=1),
        )

    assert "shorten the prompt" in caught.value.hint
    assert client.cancelled == []


async def test_a_pipeline_that_breaks_in_the_middle_raises_shard_lost(client: LocalClient) -> None:
    async with aclosing(StagedExecutor(client).generate(request("a", max_tokens=100))) as deltas:
        await anext(deltas)
        client.pipeline.give(0, Abandon(code="shard_lost", text="stage 1 died"))

        with pytest.raises(ShardLostError, match="stage 1 died"):
            async for _ in deltas:
                pass


async def test_silence_raises_shard_lost_and_still_cancels(client: LocalClient) -> None:
    client.awake = False

    with pytest.raises(ShardLostError, match="no sign of life"):
        await collect(StagedExecutor(client, silence_s=0.02), request("a"))

    assert client.cancelled == [RequestId("a")]


async def test_signs_of_life_keep_a_waiting_request_alive_and_are_not_passed_on(client: LocalClient) -> None:
    client.awake = False
    deltas: list[OutputDelta] = []

    async def read() -> None:
        deltas.extend(await collect(StagedExecutor(client, silence_s=2.0), request("a", max_tokens=2)))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for _ in range(4):  # longer in all than the silence that would end it
            await anyio.sleep(0.6)
            client.ears[RequestId("a")](OutputDelta(request=RequestId("a")))
        client.awake = True

    assert [len(d.tokens) for d in deltas] == [1, 1]


async def test_an_inference_returns_its_tensors_or_its_error(client: LocalClient) -> None:
    executor = StagedExecutor(client)
    wrong = InferRequest(
        request=RequestId("i"), deployment=DeploymentId("m"), tensors={"input_ids": np.ones((1, 3), np.int64)}
    )

    with pytest.raises(InvalidRequestError, match="rows came"):
        await executor.infer(wrong)


async def test_the_scripted_executor_fails_where_it_is_told_to() -> None:
    executor = ScriptedExecutor(script=lambda _: range(10), failure=ShardLostError("gone"), fails_after=2)
    async with aclosing(executor.generate(request("a"))) as deltas:
        assert [ids_of([await anext(deltas)]) for _ in range(2)] == [[0], [1]]

        with pytest.raises(ShardLostError, match="gone"):
            await anext(deltas)
