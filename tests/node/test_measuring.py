"""What a node finds out about itself and its neighbours: links, blocks; and how it starts and ends a worker."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import msgspec
import pytest

from shoal.clock import SystemClock
from shoal.errors import UnavailableError
from shoal.fleet.report import NodeFacts, ShardId
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.artifacts import Artifacts, open_artifact
from shoal.node.emulated import dial_agent
from shoal.node.launch import launch
from shoal.node.measuring import Measurer
from shoal.node.messages import ProbeTarget, Profiled, ProfileModel
from shoal.node.options import NodeOptions
from shoal.node.probe import answer_echoes, measure_links, round_trips
from shoal.node.trials import TrialSpec, run_trials
from shoal.node.worker_spec import LinkShape, WorkerSpec
from shoal.profile.fleet import LinkProfile
from shoal.profile.link import PROBE_BYTES
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import SequenceStep, Session, Shard
from shoal.runtime.request import Array
from shoal.store.fetch import Fetcher
from shoal.store.home import Store, fetching, missing_bytes, open_store
from shoal.store.pace import Pacer
from shoal.store.peer import serve_chunks
from shoal.transport.keys import ProbeTopic, key_of
from shoal.transport.memory import MemoryBus, MemoryFabric, Weather
from shoal.transport.zenoh import ZenohBus, open_agent

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
Attach = Callable[[str], MemoryBus]
ANY_PORT = ("tcp/127.0.0.1:0",)
PATIENCE_S = 10.0


def test_a_link_is_measured_with_its_delay_and_a_missing_node_is_left_out(fabric: MemoryFabric, bus_of: Attach) -> None:
    answer_echoes(bus_of("b"), "f", B)
    fabric.weather("a", "b", Weather(delay_s=0.03))
    targets = (ProbeTarget(node=C, locators=("c",)), ProbeTarget(node=B, locators=("b",)))

    links = anyio.run(measure_links, lambda *_: fabric.attach("a"), "f", A, targets, SystemClock())

    assert [(link.source, link.target) for link in links] == [(A, B)]
    assert links[0].rtt_p50_s >= 0.03
    assert links[0].rtt_p99_s >= links[0].rtt_p50_s


@pytest.fixture
def agents() -> Iterator[dict[NodeId, ZenohBus]]:
    """Of a fleet in which B and C dial only A, and so reach each other through it."""
    with ExitStack() as stack:
        a = stack.enter_context(closing(open_agent(ANY_PORT)))
        b, c = (stack.enter_context(closing(open_agent(ANY_PORT, a.locators))) for _ in range(2))
        c.subscribe("settled", lambda _: None)
        b.wait_matched("settled", PATIENCE_S)
        for node, agent in ((A, a), (B, b), (C, c)):
            stack.enter_context(closing(answer_echoes(agent, "f", node)))
        yield {A: a, B: b, C: c}


def target_of(agent: ZenohBus, node: NodeId, *locators: str) -> ProbeTarget:
    return ProbeTarget(node=node, locators=locators or agent.locators, zid=agent.zid)


def links_from_b(*targets: ProbeTarget) -> tuple[LinkProfile, ...]:
    options = NodeOptions(home="", name="b", fleet="f")
    return anyio.run(measure_links, partial(dial_agent, options, B), "f", B, targets, SystemClock())


def test_a_link_is_measured_without_the_node_that_joins_its_ends(agents: dict[NodeId, ZenohBus]) -> None:
    target = target_of(agents[C], C)
    agents[A].close()

    (link,) = links_from_b(target)

    assert (link.source, link.target, link.relayed) == (B, C, False)


def test_a_node_that_only_a_third_one_reaches_has_no_link(agents: dict[NodeId, ZenohBus]) -> None:
    assert links_from_b(target_of(agents[C], C, "tcp/127.0.0.1:1"), target_of(agents[C], C, "nonsense")) == ()


def test_an_address_where_another_node_answers_is_none_of_the_targets(agents: dict[NodeId, ZenohBus]) -> None:
    """Every machine has a loopback address; the agent found there would pass the probe on."""
    own_and_right = (*agents[B].locators, *agents[C].locators)

    assert links_from_b(target_of(agents[C], C, *agents[B].locators)) == ()
    assert [link.target for link in links_from_b(target_of(agents[C], C, *own_and_right))] == [C]


def test_an_emulated_link_is_measured_as_slow_as_it_is_made(agents: dict[NodeId, ZenohBus]) -> None:
    """Every round trip takes what the link takes or more: a lower bound, which no slow machine can break."""
    shape = LinkShape(target=C, latency_s=0.01, bytes_per_s=1e7)
    options = NodeOptions(home="", name="b", fleet="f", links=(shape,))
    key = key_of(ProbeTopic(fleet="f", source=B, target=C))

    with closing(dial_agent(options, B, agents[C].locators[0], agents[C].zid)) as bus:
        samples = round_trips(partial(bus.query, key, timeout_s=PATIENCE_S), SystemClock())

    assert {sample.payload_bytes for sample in samples} == set(PROBE_BYTES)
    assert all(sample.round_trip_s >= 2 * 0.01 + sample.payload_bytes / 1e7 for sample in samples)


def test_every_kind_of_block_is_timed_in_prefill_and_decode(tiny_store: tuple[Store, Digest]) -> None:
    store, manifest = tiny_store
    kinds = {block.kind for block in open_artifact(store, manifest).blocks}

    result = run_trials(store, TrialSpec(home="", manifest=manifest, threads=1), OnnxBackend(), SystemClock())

    assert {trial.kind for trial in result.trials} == kinds
    assert result.fault is None
    assert result.step_overhead_s >= 0
    for kind in kinds:
        mine = [t for t in result.trials if t.kind == kind]
        assert {t.rows for t in mine} > {1}, "decode is one row, prefill are many"
        assert all(t.time_s > 0 for t in mine)


def test_an_encoder_is_timed_with_no_more_rows_than_it_has_positions(
    pulled: Callable[[Path], tuple[Store, Digest]], golden: Path
) -> None:
    """Alone, its blocks would take more; as a run they refuse them."""
    store, manifest = pulled(golden / "bert")

    result = run_trials(store, TrialSpec(home="", manifest=manifest, threads=1), OnnxBackend(), SystemClock())

    assert {trial.rows for trial in result.trials} == {1, 16}
    assert {trial.kind for trial in result.trials} == {b.kind for b in open_artifact(store, manifest).blocks}


@dataclass
class Scales:
    """ONNX Runtime, weighed: bytes of weights that are loaded at once, now and at most."""

    engine: OnnxBackend = field(default_factory=OnnxBackend)
    now_bytes: int = 0
    most_bytes: int = 0

    def load(self, shard: Shard) -> Session:
        held = sum(array.nbytes for array in shard.tensors.values())
        self.now_bytes += held
        self.most_bytes = max(self.most_bytes, self.now_bytes)
        return Weighed(self, self.engine.load(shard), held)


@dataclass
class Weighed:
    scales: Scales
    session: Session
    held_bytes: int

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        return self.session.step(sequences, tensors)

    def release(self, slot: int) -> None:
        self.session.release(slot)

    def close(self) -> None:
        self.session.close()
        self.scales.now_bytes -= self.held_bytes
        self.held_bytes = 0


def test_a_model_too_big_for_a_device_is_timed_block_by_block(tiny_store: tuple[Store, Digest]) -> None:
    store, manifest = tiny_store
    blocks = open_artifact(store, manifest).blocks
    budget_bytes = sum(block.weights_bytes for block in blocks) * 11 // 20  # of a real model, two blocks are far less
    spec = TrialSpec(home="", manifest=manifest, threads=1, memory_bytes=budget_bytes)
    scales = Scales()

    result = run_trials(store, spec, scales, SystemClock())

    assert {trial.kind for trial in result.trials} == {block.kind for block in blocks}
    assert 0 < scales.most_bytes <= budget_bytes
    assert scales.now_bytes == 0


def measurer_of(store: Store, bus: MemoryBus, facts: NodeFacts) -> Measurer:
    return Measurer(
        me=B, fleet="f", dial=partial(dial_agent, NodeOptions(home="", name="b"), B), store=store,
        artifacts=Artifacts(store), fetcher=Fetcher(bus, "f", store, pacer=Pacer(clock=SystemClock())),
        clock=SystemClock(), threads=1, facts=lambda: facts,
    )  # fmt: skip


def test_a_node_that_fetches_a_whole_model_says_so_instead_of_keeping_a_plan_waiting(
    tiny_store: tuple[Store, Digest], tmp_path: Path, bus_of: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.measuring.SAMPLES_TURN_WITHIN_S", 0.2)
    source, manifest = tiny_store
    serve_chunks(bus_of("a"), "f", A, source.chunks)
    store = open_store(tmp_path)
    facts = NodeFacts(name="b", version="1", locators=(), cores=1, memory_total_bytes=9, memory_budget_bytes=9)
    measurer = measurer_of(store, bus_of("b"), facts)

    with fetching(store), pytest.raises(UnavailableError, match="another fetch"):
        anyio.run(measurer.profile, msgspec.msgpack.encode(ProfileModel(manifest=manifest, sources=(A,))))


def test_a_node_profiles_a_model_that_it_cannot_hold_and_says_what_that_took_and_what_it_kept(
    tiny_store: tuple[Store, Digest], tmp_path: Path, bus_of: Attach
) -> None:
    """It fetches only the weights that it times."""
    source, manifest = tiny_store
    blocks = open_artifact(source, manifest).blocks
    model_bytes = sum(block.weights_bytes for block in blocks)
    serve_chunks(bus_of("a"), "f", A, source.chunks)
    store = open_store(tmp_path)
    facts = NodeFacts(
        name="b", version="1", locators=(), cores=1, fingerprint="b",
        memory_total_bytes=model_bytes, memory_budget_bytes=model_bytes // 2,
    )  # fmt: skip
    measurer = measurer_of(store, bus_of("b"), facts)
    asked = msgspec.msgpack.encode(ProfileModel(manifest=manifest, sources=(A,)))

    first, second = (msgspec.msgpack.decode(anyio.run(measurer.profile, asked), type=Profiled).device for _ in range(2))

    assert {trial.kind for trial in first.trials} == {block.kind for block in blocks}
    assert missing_bytes(store, store.library.read("it"))
    assert (first.cached, second.cached) == (False, True)
    assert first.trials_took_s == second.trials_took_s > 0
    assert first.trials == second.trials


def spec(tmp_path: Path) -> WorkerSpec:
    return WorkerSpec(
        fleet="f", node=A, home=str(tmp_path), agent_locator="tcp/127.0.0.1:1", data_listen="tcp/127.0.0.1:0",
        shard=ShardId(deployment=DeploymentId("m"), plan_epoch=1, stage=0), stages=1, manifest=Digest("d"), start=0,
        stop=1, slots=1, context_tokens=8, in_flight=1, threads=1,
    )  # fmt: skip


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Make a module of this source that `python -m` finds."""

    def make(source: str) -> str:
        (tmp_path / "stand_in.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "stand_in"

    return make


def test_a_worker_gets_its_spec_and_ends_when_its_input_closes(tmp_path: Path, module: Callable[[str], str]) -> None:
    told = tmp_path / "told"
    name = module(f"import sys\nline = sys.stdin.readline()\nsys.stdin.read()\nopen({str(told)!r}, 'w').write(line)\n")

    async def scenario() -> None:
        worker = await launch(spec(tmp_path), name)
        await worker.stop()
        await worker.stop()
        assert await worker.wait() == f"worker {worker.pid} ended with exit code 0"

    anyio.run(scenario)
    assert '"plan_epoch":1' in told.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_reason_of_a_workers_end_is_told_in_words(tmp_path: Path, module: Callable[[str], str]) -> None:
    name = module("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")

    async def scenario() -> None:
        worker = await launch(spec(tmp_path), name)
        with anyio.fail_after(20):
            assert await worker.wait() == f"worker {worker.pid} was ended by SIGKILL"
        await worker.stop()

    anyio.run(scenario)


def test_a_real_worker_whose_agent_is_not_there_says_so_and_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        worker = await launch(spec(tmp_path))
        with anyio.fail_after(30):
            assert "exit code 1" in await worker.wait()
        await worker.stop()

    anyio.run(scenario)
    assert "nothing answers at tcp/127.0.0.1:1" in capfd.readouterr().err
