"""How a gateway knows whether it answers: it looks at the last token, and asks for one after five idle seconds."""

from collections.abc import Awaitable, Callable

import anyio
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import ManualClock
from shoal.fleet.deployment import Deployment
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import ShardId
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import LEASE_S, CoordinatorView, DeploymentStatus, Lease
from shoal.fleet.views import DeploymentHealth, HealthView
from shoal.ids import DeploymentId, Digest, NodeId, RequestId
from shoal.node.artifacts import Artifacts
from shoal.node.gateway import Models
from shoal.node.pipeline import AnswerDesk
from shoal.node.stage_keys import submit_topic
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage
from shoal.runtime import frames
from shoal.runtime.request import FinishReason, OutputDelta, SampledToken
from shoal.store.home import Store
from shoal.transport.bus import Sample
from shoal.transport.frame import pack, unpack
from shoal.transport.keys import key_of
from shoal.transport.memory import MemoryBus

ME, CHAT = NodeId("m" * 32), DeploymentId("chat")
PLAN = Plan(
    stages=(
        Stage(
            node=ME, start=0, stop=1, weights_bytes=1, kv_bytes=1, memory_bytes=2, prefill_s=1, decode_s=1,
            send_prefill_s=0, send_decode_s=0,
        ),
    ),
    objective=Objective.LATENCY, shape=RequestShape(context_tokens=48), lower_bound=1, gap=0, solver="test",
    estimate=Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1),
)  # fmt: skip


class FirstStage:
    """Answers every request with one token, or with an error when it *ails*."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.asked: list[RequestId] = []
        self.ails = False
        shard = ShardId(deployment=CHAT, plan_epoch=1, stage=0)
        bus.subscribe(key_of(submit_topic("f", ME, shard)), self.take)

    def take(self, sample: Sample) -> None:
        message = frames.decode_gateway_message(unpack(sample.payload)[0])
        if not isinstance(message, frames.Submit):
            return
        self.asked.append(message.request.request)
        token = SampledToken(token=1, position=1)
        delta = OutputDelta(request=message.request.request, tokens=(token,), finish=FinishReason.LENGTH)
        if self.ails:
            delta = OutputDelta(
                request=message.request.request, finish=FinishReason.ERROR, error_code="shard_lost", error="it died"
            )
        self.bus.put(message.reply_to, pack(frames.encode(frames.Delta(delta=delta)), {}))


class Gateway:
    """Models with one open deployment, its first stage, and time in hand."""

    def __init__(self, models: Models, stage: FirstStage, clock: ManualClock, manifest: Digest) -> None:
        self.models, self.stage, self.clock = models, stage, clock
        self.manifest = manifest
        self.sequence = 0

    def hear(self, phase: Phase = Phase.SERVING) -> None:
        self.sequence += 1
        spec = DeploymentSpec(
            deployment=CHAT, model="tiny", manifest=self.manifest, source=ME, shape=RequestShape(context_tokens=48)
        )
        status = DeploymentStatus(deployment=Deployment(spec=spec, plan_epoch=1, answer=PLAN), phase=phase)
        lease = Lease(holder=ME, fencing_epoch=1)
        self.models.hear(CoordinatorView(lease=lease, sequence=self.sequence, deployments=(status,)))

    async def report(self, after_s: float = 0.0) -> HealthView:
        """Health once *after_s* have gone by; a coordinator is heard all the time."""
        self.clock.advance(after_s)
        self.hear()
        return await self.models.report()


@pytest.fixture
def run(
    tiny_store: tuple[Store, Digest], bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger
) -> Callable[[Callable[[Gateway], Awaitable[None]]], None]:
    """Run a scenario with a gateway whose deployment was opened."""

    def with_gateway(use: Callable[[Gateway], Awaitable[None]]) -> None:
        async def scenario() -> None:
            clock, bus = ManualClock(100), bus_of("gateway")
            desk = AnswerDesk(bus, "f", ME, clock, log)
            desk.open()
            store, manifest = tiny_store
            models = Models(ME, store, Artifacts(store), desk, clock, lambda: 1.0, lambda: "id", log)
            gateway = Gateway(models, FirstStage(bus_of("stage")), clock, manifest)
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    group.start_soon(models.run)
                    gateway.hear()
                    while not models.answers(CHAT):  # noqa: ASYNC110 - opening happens in a task of its own
                        await anyio.sleep(0.005)
                    await use(gateway)
                    group.cancel_scope.cancel()

        anyio.run(scenario)

    return with_gateway


Run = Callable[[Callable[[Gateway], Awaitable[None]]], None]


def test_a_model_that_was_never_asked_is_asked_for_one_token_and_is_ready_when_it_comes(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        health = await gateway.report()

        assert gateway.stage.asked == ["probe-id"]
        assert health.deployments == (DeploymentHealth(name=CHAT, ready=True, last_token_age_s=0.0),)
        assert health.ready

    run(use)


def test_a_model_is_asked_again_only_after_an_idle_second(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        await gateway.report()

        health = await gateway.report(after_s=0.9)
        assert len(gateway.stage.asked) == 1
        assert health.deployments[0].last_token_age_s == pytest.approx(0.9)
        assert health.ready

        health = await gateway.report(after_s=0.2)
        assert len(gateway.stage.asked) == 2
        assert health.deployments[0].last_token_age_s == 0.0

    run(use)


def test_questions_at_once_share_one_probe(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(gateway.report)

        assert len(gateway.stage.asked) == 1

    run(use)


def test_a_model_that_answers_is_not_asked_and_a_sign_of_life_is_enough_while_it_reads_a_long_prompt(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        await gateway.report()
        client = gateway.models._open[CHAT].pipeline
        heard: list[object] = []
        client.listen(RequestId("long"), heard.append)

        health = await gateway.report(after_s=4.1)
        assert len(gateway.stage.asked) == 1
        assert not health.ready, "neither a token nor a sign of life for two signs' time"

        alive = frames.Delta(delta=OutputDelta(request=RequestId("long")))
        gateway.stage.bus.put(gateway.models.desk.reply_key, pack(frames.encode(alive), {}))
        while not heard:  # noqa: ASYNC110 - it comes over the bus
            await anyio.sleep(0.005)
        health = await gateway.report()
        assert len(gateway.stage.asked) == 1
        assert health.ready
        assert health.deployments[0].last_token_age_s == pytest.approx(4.1)

    run(use)


def test_a_model_whose_probe_fails_is_not_ready_until_one_succeeds(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        await gateway.report()
        gateway.stage.ails = True

        health = await gateway.report(after_s=2.6)
        assert len(gateway.stage.asked) == 2
        assert not health.ready
        assert not health.deployments[0].ready

        gateway.stage.ails = False
        assert (await gateway.report()).ready

    run(use)


def test_a_model_that_drains_is_not_ready(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        await gateway.report()
        gateway.hear(Phase.DRAINING)

        assert not (await gateway.models.report()).ready

    run(use)


def test_a_coordinator_that_fell_silent_is_named_though_what_it_planned_still_answers(run: Run) -> None:
    async def use(gateway: Gateway) -> None:
        assert (await gateway.report()).components[0].ready

        gateway.clock.advance(LEASE_S + 0.5)
        health = await gateway.models.report()
        assert not health.components[0].ready
        assert health.components[0].reason.startswith("not heard for 3.5 s: the last plans are served")
        assert health.ready

        assert (await gateway.report()).components[0].ready

    run(use)


def test_a_gateway_that_has_heard_nobody_is_not_ready(
    tiny_store: tuple[Store, Digest], bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger
) -> None:
    async def scenario() -> HealthView:
        clock = ManualClock()
        desk = AnswerDesk(bus_of("gateway"), "f", ME, clock, log)
        models = Models(ME, tiny_store[0], Artifacts(tiny_store[0]), desk, clock, lambda: 1.0, lambda: "id", log)
        return await models.report()

    health = anyio.run(scenario)

    assert not health.ready
    assert health.components[0].reason == "not heard yet"
