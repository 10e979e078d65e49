"""The models that a gateway answers for: it follows the coordinator's view, and ends what a lost pipeline cannot."""

from collections.abc import Awaitable, Callable

import anyio
import msgspec
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import ManualClock
from shoal.errors import InfeasibleError, UnavailableError, UnknownModelError
from shoal.fleet.deployment import Deployment, Former
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import LEASE_S, CoordinatorView, DeploymentStatus, Lease
from shoal.ids import DeploymentId, Digest, NodeId, RequestId
from shoal.node.artifacts import Artifacts
from shoal.node.gateway import Models
from shoal.node.journal import Journal
from shoal.node.last_plan import alone, recall, remember, says_the_same
from shoal.node.pipeline import AnswerDesk
from shoal.plan.problem import Estimate, Infeasible, Objective, Plan, RequestShape, Stage
from shoal.runtime.request import FinishReason
from shoal.store.home import Store
from shoal.transport.memory import MemoryBus

ME, OTHER, CHAT = NodeId("m" * 32), NodeId("o" * 32), DeploymentId("chat")
SHAPE = RequestShape(context_tokens=48)
Tiny = tuple[Store, Digest]


def plan(*nodes: NodeId) -> Plan:
    stages = [
        Stage(
            node=node, start=i, stop=i + 1, weights_bytes=1, kv_bytes=1, memory_bytes=2,
            prefill_s=1, decode_s=1, send_prefill_s=0, send_decode_s=0,
        )
        for i, node in enumerate(nodes)
    ]  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    return Plan(
        stages=tuple(stages), objective=Objective.LATENCY, shape=SHAPE, estimate=figures, lower_bound=1, gap=0,
        solver="test",
    )  # fmt: skip


def view(
    sequence: int,
    manifest: Digest,
    phase: Phase,
    *,
    plan_epoch: int = 1,
    answer: Plan | Infeasible | None = None,
    reason: str = "",
) -> CoordinatorView:
    """One deployment, this node its gateway."""
    spec = DeploymentSpec(deployment=CHAT, model="tiny", manifest=manifest, source=ME, shape=SHAPE)
    deployment = Deployment(spec=spec, plan_epoch=plan_epoch, answer=answer or plan(ME, OTHER))
    status = DeploymentStatus(deployment=deployment, phase=phase, reason=reason)
    return CoordinatorView(lease=Lease(holder=OTHER, fencing_epoch=1), sequence=sequence, deployments=(status,))


@pytest.fixture
def run(
    tiny_store: Tiny, bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger
) -> Callable[[Callable[[Models], Awaitable[None]]], None]:
    """Run a scenario with models at work."""

    def with_models(use: Callable[[Models], Awaitable[None]]) -> None:
        async def scenario() -> None:
            clock = ManualClock()
            desk = AnswerDesk(bus_of("gateway"), "f", ME, clock, log)
            models = Models(ME, tiny_store[0], Artifacts(tiny_store[0]), desk, clock, lambda: 1.0, lambda: "id", log)
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    group.start_soon(models.run)
                    await use(models)
                    group.cancel_scope.cancel()

        anyio.run(scenario)

    return with_models


async def opened(models: Models, told: CoordinatorView) -> None:
    models.hear(told)
    while not models.answers(CHAT):  # noqa: ASYNC110 - opening happens in a task of its own
        await anyio.sleep(0.005)


def test_a_model_is_made_ready_while_its_engine_loads_and_answers_when_that_is_there(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        for sequence in (1, 2):
            models.hear(view(sequence, tiny_store[1], Phase.LOADING))
            await anyio.wait_all_tasks_blocked()
            assert not models._opening.codecs or sequence == 2
        while not models._opening.codecs:  # noqa: ASYNC110 - made ready in a task of its own
            await anyio.sleep(0.005)
        assert not models.answers(CHAT)

        await opened(models, view(3, tiny_store[1], Phase.SERVING))

    run(use)


@pytest.mark.parametrize(
    ("phase", "served"),
    [(phase, phase in {Phase.SERVING, Phase.DRAINING, Phase.MOVING, Phase.DROWSY}) for phase in Phase],
)
def test_a_node_knows_whether_any_model_of_the_fleet_answers(
    run: Callable[..., None], tiny_store: Tiny, phase: Phase, *, served: bool
) -> None:
    async def use(models: Models) -> None:
        assert not models.any_served(), "no view, no models"

        models.hear(view(1, tiny_store[1], phase))

        assert models.any_served() is served

    run(use)


def test_a_model_is_answered_for_once_it_serves_with_the_context_of_its_plan(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        with pytest.raises(UnknownModelError, match="none yet"):
            models.get("chat")
        models.hear(view(1, tiny_store[1], Phase.LOADING))
        with pytest.raises(UnavailableError, match="loading"):
            models.get("chat")

        await opened(models, view(2, tiny_store[1], Phase.SERVING))

        assert [m.name for m in models.served()] == [CHAT]
        assert models.get("chat").spec.context_tokens == 48
        with pytest.raises(UnknownModelError, match="deployed are: chat"):
            models.get("chart")

    run(use)


@pytest.mark.parametrize(("phase", "plan_epoch"), [(Phase.RECOVERING, 1), (Phase.SERVING, 2), (None, 1)])
def test_requests_are_broken_off_when_their_pipeline_is_no_more(
    run: Callable[..., None], tiny_store: Tiny, phase: Phase | None, plan_epoch: int
) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(1, tiny_store[1], Phase.SERVING))
        heard: list[object] = []
        client = models._open[CHAT].pipeline
        client.listen(RequestId("r"), heard.append)

        later = view(2, tiny_store[1], phase or Phase.SERVING, plan_epoch=plan_epoch, reason="stage 1 died")
        models.hear(later if phase else msgspec.structs.replace(later, deployments=()))

        assert [(d.finish, d.error_code) for d in heard] == [(FinishReason.ERROR, "shard_lost")]
        assert not models.answers(CHAT)

    run(use)


def test_a_pipeline_that_drains_ends_what_runs_and_takes_nothing_new(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(1, tiny_store[1], Phase.SERVING))
        heard: list[object] = []
        models._open[CHAT].pipeline.listen(RequestId("r"), heard.append)

        models.hear(view(2, tiny_store[1], Phase.DRAINING))

        assert heard == []
        with pytest.raises(UnavailableError, match="draining"):
            models.get("chat")

    run(use)


def moving(told: CoordinatorView, **changes: object) -> CoordinatorView:
    """*told*, its deployment changed."""
    status = told.deployments[0]
    deployment = msgspec.structs.replace(status.deployment, **changes)
    return msgspec.structs.replace(told, deployments=(msgspec.structs.replace(status, deployment=deployment),))


def executor_of(models: Models, plan_epoch: int) -> object:
    opened = models._open.get(CHAT)
    return opened.executor if opened is not None and opened.status.deployment.plan_epoch == plan_epoch else None


def test_when_a_deployment_has_moved_what_runs_goes_on_and_what_comes_goes_to_the_new_pipeline(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(1, tiny_store[1], Phase.SERVING))
        heard: list[object] = []
        models._open[CHAT].pipeline.listen(RequestId("r"), heard.append)
        model, first = models.get("chat"), await models._way(CHAT)

        former = Former(plan_epoch=1, plan=plan(ME, OTHER))
        models.hear(moving(view(2, tiny_store[1], Phase.SERVING, plan_epoch=2), former=former))

        assert models.get("chat") is model, "it waits for a moment, and is not refused"
        with anyio.fail_after(10):
            second = await models._way(CHAT)
        assert second is executor_of(models, 2)
        assert second is not first
        assert heard == []

        models.hear(view(3, tiny_store[1], Phase.SERVING, plan_epoch=2))
        assert [d.error_code for d in heard] == ["shard_lost"], "the old pipeline is no more"
        assert await models._way(CHAT) is second

    run(use)


def test_while_neither_pipeline_takes_requests_they_wait_for_the_next(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(1, tiny_store[1], Phase.SERVING))
        got: list[object] = []

        async def ask() -> None:
            got.append(await models.get("chat").executor.way(None))  # type: ignore[attr-defined]

        models.hear(view(2, tiny_store[1], Phase.MOVING))
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.sleep(0.05)
            models.hear(moving(view(3, tiny_store[1], Phase.MOVING, plan_epoch=2), held=True))
            group.start_soon(ask)
            await anyio.sleep(0.05)
            assert got == []
            models.hear(view(4, tiny_store[1], Phase.SERVING, plan_epoch=2))

        assert got == [executor_of(models, 2)] * 2

    run(use)


def test_who_waits_for_a_pipeline_that_never_comes_is_told_to_come_again(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(1, tiny_store[1], Phase.SERVING))
        models.hear(moving(view(2, tiny_store[1], Phase.MOVING, plan_epoch=2), held=True))
        model = models.get("chat")
        models.hear(view(3, tiny_store[1], Phase.RECOVERING, plan_epoch=2))

        with pytest.raises(UnavailableError, match="recovering"):
            await model.executor.way(None)  # type: ignore[attr-defined]

    run(use)


def test_where_the_coordinator_is_gone_in_the_middle_of_a_move_the_old_pipeline_takes_requests_again(
    run: Callable[..., None], tiny_store: Tiny
) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(1, tiny_store[1], Phase.SERVING))
        models.hear(view(2, tiny_store[1], Phase.MOVING))
        assert isinstance(models.clock, ManualClock)

        models.clock.advance(LEASE_S + 1)

        assert await models._way(CHAT) is executor_of(models, 1)

    run(use)


def test_what_is_older_than_the_newest_view_is_ignored(run: Callable[..., None], tiny_store: Tiny) -> None:
    async def use(models: Models) -> None:
        await opened(models, view(5, tiny_store[1], Phase.SERVING))

        models.hear(view(4, tiny_store[1], Phase.RECOVERING))

        assert models.answers(CHAT)

    run(use)


def test_a_model_without_a_place_says_what_is_missing(run: Callable[..., None], tiny_store: Tiny) -> None:
    async def use(models: Models) -> None:
        refused = Infeasible(reason="too big", needed_bytes=2, available_bytes=1)
        models.hear(view(1, tiny_store[1], Phase.REFUSED, answer=refused, reason="3 MB are missing"))
        with pytest.raises(InfeasibleError, match="3 MB are missing"):
            models.get("chat")

    run(use)


def report(*states: ShardState) -> NodeReport:
    facts = NodeFacts(name="box", version="1", locators=(), cores=1, memory_total_bytes=1, memory_budget_bytes=1)
    shards = [
        ShardReport(shard=ShardId(deployment=CHAT, plan_epoch=1, stage=i), state=state, start=i, stop=i + 1)
        for i, state in enumerate(states)
    ]
    return NodeReport(node=ME, incarnation=1, sequence=1, facts=facts, shards=tuple(shards))


@pytest.mark.parametrize(
    ("state", "phase"),
    [(ShardState.LOADING, Phase.LOADING), (ShardState.WIRED, Phase.SERVING), (ShardState.FAILED, Phase.RECOVERING)],
)
def test_without_a_coordinator_a_plan_on_this_node_alone_stands_where_its_shards_stand(
    state: ShardState, phase: Phase
) -> None:
    last = view(7, Digest("d"), Phase.SERVING, answer=plan(ME))

    derived = alone(last, report(state), {})

    assert [s.phase for s in derived.deployments] == [phase]
    assert view(1, Digest("d"), Phase.SERVING).newer_than(derived), "whatever the coordinator says is newer"


OTHER = NodeId("o" * 32)


def phase_alone(mine: NodeReport, others: dict[NodeId, NodeReport], *nodes: NodeId) -> tuple[Phase, str]:
    derived = alone(view(7, Digest("d"), Phase.SERVING, answer=plan(*nodes)), mine, others)
    return derived.deployments[0].phase, derived.deployments[0].reason


def test_without_a_coordinator_a_node_that_is_not_heard_is_believed_to_hold_its_stage() -> None:
    mine = report(ShardState.WIRED)

    assert phase_alone(mine, {}, ME, OTHER) == (Phase.SERVING, "")
    assert phase_alone(report(ShardState.LOADING), {}, ME, OTHER)[0] is Phase.LOADING

    said = "stage 1 has shown no sign of life for 10 s"
    ails = msgspec.structs.replace(mine.shards[0], error_code="shard_lost", error=said)
    phase, reason = phase_alone(msgspec.structs.replace(mine, shards=(ails,)), {}, ME, OTHER)
    assert phase is Phase.RECOVERING
    assert said in reason


def test_without_a_coordinator_a_node_that_is_heard_is_believed_in_what_it_says() -> None:
    shard = ShardReport(
        shard=ShardId(deployment=CHAT, plan_epoch=1, stage=1), state=ShardState.FETCHING, start=1, stop=2
    )
    other = msgspec.structs.replace(report(), node=OTHER, shards=(shard,))
    sends = msgspec.structs.replace(report(ShardState.WIRED).shards[0], wired_to=("tcp/other:1",))

    phase, _ = phase_alone(msgspec.structs.replace(report(), shards=(sends,)), {OTHER: other}, ME, OTHER)

    assert phase is Phase.LOADING


def test_without_a_coordinator_a_plan_whose_first_stage_cannot_be_asked_waits_for_one() -> None:
    phase, reason = phase_alone(report(), {}, OTHER, ME)

    assert phase is Phase.RECOVERING
    assert "no coordinator" in reason


def test_the_last_view_is_kept_and_only_plans_make_it_another_one(journal: Journal) -> None:
    first = view(1, Digest("d"), Phase.SERVING)
    assert recall(journal) is None

    remember(journal, first)

    assert recall(journal) == first
    assert says_the_same(view(2, Digest("d"), Phase.RECOVERING), first)
    assert not says_the_same(view(2, Digest("d"), Phase.SERVING, plan_epoch=2), first)
    assert not says_the_same(first, None)


def test_only_what_could_be_served_here_is_called_deployable(run: Callable[..., None], tiny_store: Tiny) -> None:
    async def use(models: Models) -> None:
        def hint(name: str) -> str:
            with pytest.raises(UnknownModelError) as unknown:
                models.get(name)
            return unknown.value.hint

        own = tiny_store[0].library.names()[0]
        assert "`shoal models` lists" in hint("gpt-4")
        await opened(models, view(1, tiny_store[1], Phase.SERVING))

        assert hint("gpt-4") == "use one of chat"
        assert hint(own) == f"`shoal serve {own}` deploys it"
        assert hint("smollm2-135m") == "`shoal serve smollm2-135m` deploys it"

    run(use)
