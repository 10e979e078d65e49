"""A model's chunks are still in the fleet when the node that they came from is not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import pytest

from shoal.errors import NodeUnreachableError
from shoal.fleet.order import Hold
from shoal.fleet.reconcile import missing_orders
from shoal.fleet.report import NodeFacts, NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import DeploymentWanted, FleetState, NodeHeard, PlanMade, apply
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.artifacts import Artifacts, fetch_artifact, fetch_shard, load_shard
from shoal.node.holding import complete_manifests, fetch_hold
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage
from shoal.store.fetch import Fetcher
from shoal.store.home import Store, missing_bytes, open_store
from shoal.store.pace import Pacer
from shoal.store.peer import serve_chunks
from shoal.transport.bus import Closable
from shoal.transport.memory import MemoryBus

FLEET = "f"
SOURCE, A, B = (NodeId(name) for name in ("s", "a", "b"))
FACTS = NodeFacts(name="box", version="0.1.0", locators=(), cores=2, memory_total_bytes=8, memory_budget_bytes=4)


@dataclass
class Box:
    """A node as far as its chunks go."""

    store: Store
    artifacts: Artifacts
    fetcher: Fetcher
    serving: Closable


BoxOf = Callable[[NodeId, Store], Box]


@pytest.fixture
def box_of(bus_of: Callable[[str], MemoryBus]) -> BoxOf:
    def make(node: NodeId, store: Store) -> Box:
        bus = bus_of(node)
        fetcher = Fetcher(bus, FLEET, store, pacer=Pacer(), timeout_s=5.0)
        serving = serve_chunks(bus, FLEET, node, store.disk, first=store.chunks)
        return Box(store, Artifacts(store), fetcher, serving)

    return make


def whole_on(node: NodeId, blocks: int) -> Plan:
    """All blocks on *node*."""
    stage = Stage(
        node=node, start=0, stop=blocks, weights_bytes=10, kv_bytes=1, memory_bytes=12, prefill_s=0.1, decode_s=0.1,
        send_prefill_s=0.0, send_decode_s=0.0,
    )  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    return Plan(
        stages=(stage,), objective=Objective.LATENCY, shape=RequestShape(), estimate=figures, lower_bound=1, gap=0,
        solver="test",
    )  # fmt: skip


def ordered(digest: Digest, blocks: int, boxes: dict[NodeId, Box]) -> Hold:
    """What a coordinator that hears *boxes* alone orders when everything is to run on A."""
    spec = DeploymentSpec(deployment=DeploymentId("m"), model="m", manifest=digest, source=SOURCE)
    state = apply(FleetState(), DeploymentWanted(spec=spec))
    state = apply(state, PlanMade(deployment=spec.deployment, plan_epoch=2, answer=whole_on(A, blocks), at_s=0.0))
    for node, box in boxes.items():
        said = NodeReport(node=node, incarnation=1, sequence=1, facts=FACTS, manifests=complete_manifests(box.store))
        state = apply(state, NodeHeard(report=said, at_s=0.0))
    (addressed,) = missing_orders(state, 1, 0.0)
    assert isinstance(addressed.order, Hold)
    assert addressed.node == A
    return addressed.order


def test_blocks_move_between_two_nodes_that_hold_shards_after_the_source_has_died(
    tmp_path: Path, tiny_store: tuple[Store, Digest], box_of: BoxOf
) -> None:
    whole, digest = tiny_store
    source = box_of(SOURCE, whole)
    boxes = {node: box_of(node, open_store(tmp_path / node)) for node in (A, B)}
    blocks = len(source.artifacts.open(digest).blocks)
    for node, span in ((A, (0, blocks // 2)), (B, (blocks // 2, blocks))):
        artifact = fetch_artifact(boxes[node].fetcher, boxes[node].artifacts, digest, [SOURCE])
        fetch_shard(boxes[node].fetcher, artifact, span, [SOURCE], lambda _: None)
    assert [complete_manifests(box.store) for box in boxes.values()] == [(), ()]

    source.serving.close()
    hold = ordered(digest, blocks, boxes)
    anyio.run(partial(fetch_hold, boxes[A].store, boxes[A].fetcher, boxes[A].artifacts, hold, lambda _: None))

    here = boxes[A]
    assert missing_bytes(here.store, artifact.manifest) == {}
    assert load_shard(
        here.store, here.artifacts.open(digest), (0, blocks), slots=1, context_tokens=16, threads=1
    ).tensors


def test_without_anybody_who_has_the_rest_the_missing_source_is_named(
    tmp_path: Path, tiny_store: tuple[Store, Digest], box_of: BoxOf
) -> None:
    whole, digest = tiny_store
    source = box_of(SOURCE, whole)
    boxes = {node: box_of(node, open_store(tmp_path / node)) for node in (A, B)}
    blocks = len(source.artifacts.open(digest).blocks)
    source.serving.close()

    hold = ordered(digest, blocks, boxes)

    with pytest.raises(NodeUnreachableError, match=f"nobody answers .*{SOURCE}/{digest}"):
        anyio.run(partial(fetch_hold, boxes[A].store, boxes[A].fetcher, boxes[A].artifacts, hold, lambda _: None))
