"""A gateway and models that are loaded on demand: whoever asks has them woken, and waits for that, for so long and no longer."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import msgspec
import pytest
from structlog.typing import FilteringBoundLogger
from tests.node.test_gateway_models import CHAT, ME, OTHER, Tiny, plan, view

from shoal.clock import ManualClock
from shoal.errors import InfeasibleError, NodeUnreachableError, ShoalError, UnavailableError, UnknownModelError
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import Use
from shoal.fleet.view import LEASE_S, CoordinatorView
from shoal.ids import DeploymentId, Digest, NodeId, RequestId
from shoal.node import gateway
from shoal.node.artifacts import Artifacts
from shoal.node.gateway import LOADING_AGAIN_S, Models
from shoal.node.pipeline import AnswerDesk
from shoal.plan.problem import Infeasible
from shoal.runtime.executor.staged import StagedExecutor
from shoal.transport.memory import MemoryBus


@dataclass
class Coordinator:
    """Hears who is to be woken; what it then says is up to the test."""

    woken: list[tuple[NodeId, DeploymentId]] = field(default_factory=list)
    trouble: ShoalError | None = None
    then: Callable[[], None] = lambda: None

    async def wake(self, holder: NodeId, name: DeploymentId) -> None:
        self.woken.append((holder, name))
        await anyio.lowlevel.checkpoint()
        if self.trouble is not None:
            raise self.trouble
        self.then()


@dataclass
class Site:
    """A gateway, the coordinator that it asks, and the news that come of it."""

    models: Models
    coordinator: Coordinator
    manifest: Digest
    sequence: int = 0

    def hear(self, phase: Phase, *, on_demand: bool = True, **more: object) -> CoordinatorView:
        self.sequence += 1
        told = view(self.sequence, self.manifest, phase, **more)  # type: ignore[arg-type]
        status = told.deployments[0]
        spec = msgspec.structs.replace(status.deployment.spec, on_demand=on_demand)
        asleep = phase in {Phase.ASLEEP, Phase.PLANNING}
        changed = msgspec.structs.replace(
            status.deployment, spec=spec, asleep=phase is Phase.ASLEEP, **({"answer": None} if asleep else {})
        )
        told = msgspec.structs.replace(told, deployments=(msgspec.structs.replace(status, deployment=changed),))
        self.models.hear(told)
        return told

    async def asleep(self) -> None:
        """Its tokenizer is known, nothing of it is loaded."""
        self.hear(Phase.ASLEEP)
        while not self.models.served():  # noqa: ASYNC110 - read in a task of its own
            await anyio.sleep(0.005)

    async def ask(self, patience_s: float | None = None) -> StagedExecutor:
        """As a request does that is ready to be sent."""
        executor = self.models.get("chat").executor
        return await executor.way(patience_s)  # type: ignore[attr-defined,no-any-return]


Run = Callable[[Callable[[Site], Awaitable[None]]], None]


@pytest.fixture
def run(tiny_store: Tiny, bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger) -> Run:
    def with_site(use: Callable[[Site], Awaitable[None]]) -> None:
        async def scenario() -> None:
            clock, office, store = ManualClock(100), Coordinator(), tiny_store[0]
            desk = AnswerDesk(bus_of("gateway"), "f", ME, clock, log)
            models = Models(ME, store, Artifacts(store), desk, clock, lambda: 1.0, lambda: "id", log, office.wake)
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    group.start_soon(models.run)
                    await use(Site(models, office, tiny_store[1]))
                    group.cancel_scope.cancel()

        anyio.run(scenario)

    return with_site


def test_a_model_that_is_asleep_is_listed_and_known_and_whoever_asks_has_it_loaded(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        assert [m.name for m in site.models.served()] == [CHAT]
        assert site.models.get("chat").spec.context_tokens == 48
        assert site.coordinator.woken == []

        def load() -> None:
            for phase in (Phase.PLANNING, Phase.LOADING, Phase.SERVING):
                site.hear(phase)

        site.coordinator.then = load
        pipeline = await site.ask()

        assert site.coordinator.woken == [(OTHER, CHAT)]
        assert pipeline is site.models._open[CHAT].executor

    run(use)


def test_a_crowd_asks_once(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        site.coordinator.then = lambda: site.hear(Phase.LOADING) and None

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(site.ask)
            await anyio.sleep(0.05)
            site.hear(Phase.SERVING)

        assert site.coordinator.woken == [(OTHER, CHAT)]

    run(use)


def test_a_question_that_was_lost_is_asked_again_of_whoever_coordinates_by_then(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        site.coordinator.trouble = NodeUnreachableError("no answer")

        async with anyio.create_task_group() as group:
            group.start_soon(site.ask)
            await anyio.sleep(0.05)
            assert len(site.coordinator.woken) == 1
            site.coordinator.trouble = None
            site.coordinator.then = lambda: site.hear(Phase.SERVING) and None
            site.hear(Phase.ASLEEP)

        assert len(site.coordinator.woken) == 2

    run(use)


def test_what_is_about_to_fall_asleep_ends_its_answers_and_is_woken_by_who_comes(run: Run) -> None:
    async def use(site: Site) -> None:
        site.hear(Phase.SERVING)
        while not site.models.answers(CHAT):  # noqa: ASYNC110 - opened in a task of its own
            await anyio.sleep(0.005)
        heard: list[object] = []
        site.models._open[CHAT].pipeline.listen(RequestId("r"), heard.append)

        site.hear(Phase.DROWSY)
        site.coordinator.then = lambda: site.hear(Phase.SERVING) and None
        await site.ask()

        assert site.coordinator.woken == [(OTHER, CHAT)]
        assert heard == [], "what runs is not cut off"

    run(use)


@pytest.mark.parametrize("patience_s", [0.05, None])
def test_who_has_waited_long_enough_is_told_why_and_when_to_come_again(
    patience_s: float | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if patience_s is None:
        monkeypatch.setattr(gateway, "LOAD_S", 0.05)

    async def use(site: Site) -> None:
        await site.asleep()
        site.coordinator.then = lambda: (
            site.hear(Phase.PLANNING, reason="7 GB needed, 4 GB free; in use: code") and None
        )

        with pytest.raises(UnavailableError) as refused:
            await site.ask(patience_s)

        said = "chat is planning (7 GB needed, 4 GB free; in use: code); 0.05 s were not enough to wait for it"
        assert refused.value.message == said
        assert refused.value.retry_after_s == LOADING_AGAIN_S

    run(use)


def test_who_waits_for_what_has_no_place_is_refused_with_the_numbers_at_once(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        no = Infeasible(reason="too big", needed_bytes=2, available_bytes=1)
        site.coordinator.then = lambda: site.hear(Phase.REFUSED, answer=no, reason="20 GB needed, 4 GB free") and None

        with pytest.raises(InfeasibleError, match="20 GB needed, 4 GB free"):
            await site.ask()

    run(use)


def test_who_waits_for_what_is_dropped_meanwhile_is_told_so(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        site.coordinator.trouble = UnknownModelError("no deployment is named 'chat'")

        with pytest.raises(UnknownModelError):
            await site.ask()

    run(use)


def test_nobody_waits_where_no_coordinator_is_heard_that_could_load_it(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        assert isinstance(site.models.clock, ManualClock)
        site.models.clock.advance(2 * LEASE_S + 1)

        with pytest.raises(UnavailableError, match=r"chat is asleep \(no coordinator is heard that could load it\)"):
            site.models.get("chat")

    run(use)


def test_health_neither_wakes_what_is_asleep_nor_calls_it_ill(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()

        for phase, asleep in ((Phase.ASLEEP, True), (Phase.PLANNING, False), (Phase.LOADING, False)):
            site.hear(phase)
            health = await site.models.report()
            assert health.ready
            assert [(d.ready, d.asleep) for d in health.deployments] == [(True, asleep)]
        assert site.coordinator.woken == []

        site.hear(Phase.RECOVERING)
        assert not (await site.models.report()).ready

    run(use)


def test_requests_are_counted_while_they_wait_and_while_they_run_and_for_how_long_nobody_has_asked(run: Run) -> None:
    async def use(site: Site) -> None:
        await site.asleep()
        clock = site.models.clock
        assert isinstance(clock, ManualClock)
        assert site.models.uses() == (Use(deployment=CHAT),)

        with site.models._uses.using(CHAT), site.models._uses.using(CHAT):
            clock.advance(3)
            assert site.models.uses() == (Use(deployment=CHAT, in_flight=2, idle_s=0.0),)
        clock.advance(5)
        assert site.models.uses() == (Use(deployment=CHAT, in_flight=0, idle_s=5.0),)

        site.hear(Phase.SERVING, on_demand=False, answer=plan(ME))
        assert site.models.uses() == (), "of what is always loaded nobody needs to know"

    run(use)
