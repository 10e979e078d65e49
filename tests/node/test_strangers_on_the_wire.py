"""A stranger speaks on every key of a live node: garbage, damaged messages, messages in order that say impossible things.

Nothing that anybody says ends a worker or an agent, and who asks honestly afterwards is answered.
"""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Decoder
from structlog.typing import FilteringBoundLogger
from tests.node.test_full_disk import FACTS, ME, OTHER, NoPlanner, fetch, launch, obey, running, until
from tests.node.test_stage_loop import FLEET, NODE, M, asked, stages_of, tokens, use
from tests.transport.test_parse import damaged
from tests.transport.wire_values import values_of

from shoal.clock import SystemClock
from shoal.errors import InvalidRequestError, MalformedFrameError, ShoalError
from shoal.fleet.order import Order
from shoal.fleet.report import NodeReport, ShardReport
from shoal.fleet.view import CoordinatorView
from shoal.ids import DeploymentId, Digest
from shoal.node.agent import Agent
from shoal.node.calls import Call, Caller
from shoal.node.coordinator import Coordinator
from shoal.node.desk import handler
from shoal.node.journal import Journal
from shoal.node.messages import REPORT, VIEW, AskNodes, Nodes
from shoal.node.pipeline import Pipeline
from shoal.node.shards import ShardKeeper
from shoal.node.stage_keys import submit_topic
from shoal.node.voice import Bell
from shoal.plan.problem import Plan
from shoal.runtime.executor.staged import StagedExecutor
from shoal.runtime.frames import GatewayMessage, StageFrame
from shoal.store.home import open_store
from shoal.store.peer import Wanted, serve_chunks
from shoal.transport.frame import pack
from shoal.transport.keys import (
    ChunkTopic,
    ControlTopic,
    CreditTopic,
    EventTopic,
    FrameTopic,
    HeartbeatTopic,
    TokensTopic,
    WorkerTopic,
    key_of,
)
from shoal.transport.memory import MemoryBus, MemoryFabric
from shoal.transport.parse import parse

few = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def odd_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    return st.just(whole) | damaged(whole) | st.binary(max_size=40)


def said_to_a_stage(kind: object) -> st.SearchStrategy[bytes]:
    """Frames of another plan that say anything, whole or damaged; lies within a plan are for `test_strange_frames`."""

    def packed(message: Any) -> bytes:  # noqa: ANN401 a union is no type
        ours = msgspec.structs.replace(message, plan_epoch=2) if hasattr(message, "plan_epoch") else message
        return pack(msgspec.msgpack.encode(ours), {})

    return values_of(kind).map(packed).flatmap(odd_bytes)


@few
@given(st.lists(said_to_a_stage(StageFrame), max_size=6), st.lists(said_to_a_stage(GatewayMessage), max_size=4))
def test_a_pipeline_answers_after_whatever_strangers_told_its_stages(
    log: FilteringBoundLogger, told: list[bytes], asked_of_it: list[bytes]
) -> None:
    fabric = MemoryFabric()
    keys = [
        key_of(FrameTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1)),
        key_of(TokensTopic(fleet=FLEET, deployment=M, plan_epoch=1)),
        key_of(CreditTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1)),
    ]

    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        stranger = fabric.attach("stranger")
        for payload in told:
            for key in keys:
                stages.outside.put(key, payload)
        for payload in [*asked_of_it, *told]:
            stranger.put(key_of(submit_topic(FLEET, NODE, stages.shard())), payload)
            stranger.put(key_of(EventTopic(fleet=FLEET, node=NODE, kind="answers")), payload)
        assert len(await tokens(executor, asked("honest", max_tokens=3))) == 3

    with stages_of(2, fabric.attach, log) as stages:
        use(fabric.attach, log, stages, then)


@contextlib.asynccontextmanager
async def node(home: Path, bus: MemoryBus, log: FilteringBoundLogger) -> AsyncIterator[Agent]:
    """An agent that coordinates; its disk, its keeper and its decisions are real, its workers do nothing."""
    journal = Journal(home / "journal.db")
    mine = Coordinator(
        me=ME, journal=journal, clock=SystemClock(), planner=NoPlanner(), send_order=obey, broadcast=lambda _: None,
        note=lambda *_, **__: None, begin_log=lambda _: None, eager=True, tick_s=0.01,
    )  # fmt: skip

    async def nodes(_: AskNodes) -> Nodes:
        return Nodes(nodes=())

    agent = Agent(
        me=ME, fleet=FLEET, incarnation=1, facts=lambda: FACTS, bus=bus, coordinator=mine, bell=Bell(), journal=journal,
        keeper=ShardKeeper(journal, fetch, launch, lambda _: None, lambda: None, log), handlers={"nodes": handler(AskNodes, nodes)},
        complete_manifests=tuple, uses=tuple, on_view=lambda _: None, stand_in=lambda _: None, log=log,
    )  # fmt: skip
    async with running(agent.run), running(mine.run):
        await until(lambda: mine.leading)
        yield agent
    journal.close()


def said_to_a_node(kind: object) -> st.SearchStrategy[bytes]:
    return values_of(kind).map(msgspec.msgpack.encode).flatmap(odd_bytes)


TOLD: dict[str, object] = {
    key_of(HeartbeatTopic(fleet=FLEET, node=OTHER)): NodeReport,
    key_of(EventTopic(fleet=FLEET, node=OTHER, kind=VIEW)): CoordinatorView,
    key_of(
        WorkerTopic(fleet=FLEET, node=ME, deployment=DeploymentId("m"), plan_epoch=1, stage=0, verb=REPORT)
    ): ShardReport,
}
ASKED: dict[str, object] = {
    key_of(ControlTopic(fleet=FLEET, node=ME, verb="order")): Order,
    key_of(ControlTopic(fleet=FLEET, node=ME, verb="call")): Call,
}


@pytest.mark.parametrize("key", [*TOLD, *ASKED], ids=lambda key: key.split("/", 2)[2])
def test_a_node_lives_and_answers_after_whatever_strangers_told_it(
    key: str, log: FilteringBoundLogger, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @few
    @given(st.lists(said_to_a_node((TOLD | ASKED)[key]), min_size=1, max_size=5))
    def law(said: list[bytes]) -> None:
        anyio.run(scenario, said)

    async def scenario(said: list[bytes]) -> None:
        fabric = MemoryFabric()
        bus, stranger = fabric.attach("node"), fabric.attach("stranger")
        beats: list[int] = []
        stranger.subscribe(key_of(HeartbeatTopic(fleet=FLEET, node=ME)), lambda _: beats.append(1))
        async with node(tmp_path_factory.mktemp("home"), bus, log):
            for payload in said:
                if key in TOLD:
                    stranger.put(key, payload)
                    continue
                with contextlib.suppress(ShoalError):
                    await anyio.to_thread.run_sync(partial(stranger.query, key, payload, timeout_s=5))
            heard = len(beats)
            caller = Caller(stranger, FLEET, lambda: "honest")
            assert await caller.call(ME, "nodes", AskNodes(), Nodes, timeout_s=5) == Nodes(nodes=())
            await until(lambda: len(beats) > heard)
        bus.close()
        stranger.close()

    law()


@pytest.mark.parametrize("offset", [0, 1])
def test_a_file_of_this_machine_is_no_chunk_however_it_is_asked_for(offset: int, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("nobody's business")
    store, fabric = open_store(tmp_path / "home"), MemoryFabric()
    bus, stranger = fabric.attach("node"), fabric.attach("stranger")
    serve_chunks(bus, FLEET, ME, store.disk, first=store.chunks)

    for name in (str(secret), "../../../secret", "ab/../../../../secret"):
        key = key_of(ChunkTopic(fleet=FLEET, node=ME, digest=Digest(name)))
        wanted = msgspec.msgpack.encode(Wanted(offset=offset, size_bytes=100))
        with pytest.raises(MalformedFrameError, match="names no chunk"):
            stranger.query(key, wanted, timeout_s=5)
        with pytest.raises(InvalidRequestError, match="is no digest"):
            store.disk.drop(Digest(name))

    assert secret.exists()
    bus.close()
    stranger.close()


@pytest.mark.parametrize("epoch", [2**63, 2**64 - 1])
def test_a_number_that_no_disk_can_keep_is_refused_and_the_next_record_is_written(epoch: int, journal: Journal) -> None:
    with pytest.raises(InvalidRequestError, match="out of range"):
        journal.put("fence", "epoch", Wanted(offset=0, size_bytes=0), generation=epoch)

    journal.put("fence", "epoch", Wanted(offset=3, size_bytes=0), generation=3)
    assert journal.get("fence", "epoch", Wanted) == Wanted(offset=3, size_bytes=0)


def test_a_plan_without_a_stage_is_no_plan_wherever_it_comes_from() -> None:
    with pytest.raises(MalformedFrameError, match=r"length >= 1 - at `\$\.stages`"):
        parse(msgspec.msgpack.encode({"type": "plan", "stages": []}), Decoder(Plan), "plan")
