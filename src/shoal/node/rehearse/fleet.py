"""Nodes of a rehearsed fleet: agents, coordinators, gateways and workers as `shoal.node.assemble` wires them, from fakes.

What is fake passes the contract of its port: the fabric is in memory, the engine computes hashes, and what a device or a link costs
is said instead of measured.  The model's chunks are on every node, so nothing is fetched.
"""

import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.fleet.order import Hold
from shoal.fleet.report import NodeFacts, ShardId
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.agent import Agent
from shoal.node.artifacts import Artifacts
from shoal.node.calls import Caller, Handler
from shoal.node.coordinator import Coordinator
from shoal.node.desk import CoordinatorDesk
from shoal.node.events import EventRing
from shoal.node.gateway import Models
from shoal.node.journal import Journal
from shoal.node.last_plan import kept_port
from shoal.node.messages import BlocksOf, Deploy, Leave, Links, Nothing, ProbeLinks, Profiled
from shoal.node.pipeline import AnswerDesk
from shoal.node.planning import FleetPlanner
from shoal.node.rehearse.network import Network
from shoal.node.rehearse.process import RehearsedWorker
from shoal.node.rehearse.virtual import VirtualTime
from shoal.node.rousing import wake_by_call
from shoal.node.shards import ShardKeeper
from shoal.node.voice import Bell, Voice
from shoal.node.worker_spec import WorkerSpec
from shoal.profile.fleet import BlockTrial, DeviceProfile, LinkProfile
from shoal.runtime.backend.null import trial_cost
from shoal.runtime.request import GenerateRequest, OutputDelta
from shoal.store.home import Store
from shoal.transport.memory import MemoryBus

FLEET = "rehearsal"
BYTES_PER_S = 1e8


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A device of the rehearsal: seconds that one row of a block takes it, and what its loading takes."""

    name: str
    row_s: float = 0.01
    memory_bytes: int = 4 << 30
    load_s: float = 0.5
    coordinates: bool = False
    eager: bool = True
    """As a coordinator: takes a lease that nobody holds at once."""

    @property
    def node(self) -> NodeId:
        """Its id."""
        return NodeId(self.name.ljust(32, "0"))


@dataclass(slots=True)
class RehearsedNode:
    """A node while it runs."""

    machine: Machine
    bus: MemoryBus
    journal: Journal
    models: Models
    coordinator: Coordinator | None
    keeper: ShardKeeper
    workers: dict[ShardId, RehearsedWorker]
    scope: anyio.CancelScope
    ended: anyio.Event


@dataclass(slots=True)
class RehearsedFleet:
    """Owns the nodes; belongs to the event loop of `rehearse`."""

    virtual: VirtualTime
    group: anyio.abc.TaskGroup
    store: Store
    manifest: Digest
    folder: Path
    """Where journals lie."""
    log: FilteringBoundLogger
    network: Network = field(init=False)
    nodes: dict[str, RehearsedNode] = field(default_factory=dict)
    _artifacts: Artifacts = field(init=False)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.network = Network(self.virtual)
        self._artifacts = Artifacts(self.store)

    def start(self, machine: Machine) -> RehearsedNode:
        """Start a node; one that ran before under that name goes on with its journal."""
        host, me, clock = machine.name, machine.node, self.virtual.group("")
        bus = self.network.attach(host, self.virtual.group(f"{host} agent {next(self._numbers)}"))
        journal = Journal(self.folder / f"{host}.db", durable=False)
        caller = Caller(bus, FLEET, self._new_id)
        ring = EventRing(self.log, self.virtual.now_s)
        desk = AnswerDesk(bus, FLEET, me, clock, self.log)
        wake, now_s = partial(wake_by_call, caller), self.virtual.now_s
        models = Models(me, self.store, self._artifacts, desk, clock, now_s, self._new_id, self.log, wake)
        voice, bell = Voice(bus, FLEET, me, models.hear), Bell()
        workers: dict[ShardId, RehearsedWorker] = {}
        keeper = ShardKeeper(
            journal,
            _nothing_to_fetch,
            partial(self._launch, machine, journal, workers),
            voice.tell_worker,
            bell.ring,
            self.log,
            new_birth=lambda: 2 * next(self._numbers) + 1,
        )
        planner = FleetPlanner(caller, clock, self.log)
        coordinator = self._coordinator(machine, journal, planner, voice, ring) if machine.coordinates else None
        handlers: dict[str, Handler] = {
            "profile": partial(self._profile, machine),
            "links": partial(self._links, machine),
            "blocks": self._blocks,
        }
        if coordinator is not None:
            handlers |= CoordinatorDesk(coordinator, planner, ring).handlers()
        agent = Agent(
            me=me,
            fleet=FLEET,
            incarnation=journal.next_number("incarnation"),
            facts=partial(_facts, machine),
            bus=bus,
            keeper=keeper,
            coordinator=coordinator,
            bell=bell,
            handlers=handlers,
            complete_manifests=lambda: (self.manifest,),
            uses=models.uses,
            on_view=models.hear,
            stand_in=models.follow,
            journal=journal,
            log=self.log,
        )
        node = RehearsedNode(
            machine, bus, journal, models, coordinator, keeper, workers, anyio.CancelScope(), anyio.Event()
        )
        self.nodes[host] = node
        self.group.start_soon(self._run, node, agent, desk)
        return node

    def kill(self, name: str) -> None:
        """End a node and its workers as a power cut does: nobody is told."""
        node = self.nodes.pop(name)
        for other in self.nodes:
            self.network.cut(name, other)
        for worker in node.workers.values():
            worker.kill("went with its node")
        node.scope.cancel()
        node.bus.close()
        for other in self.nodes:
            self.network.heal(name, other)

    async def leave(self, name: str) -> None:
        """Ask a node to go, and wait until it has."""
        node = self.nodes[name]
        caller = Caller(node.bus, FLEET, self._new_id)
        await caller.call(node.machine.node, "leave", Leave(), Nothing, timeout_s=10.0)
        await node.ended.wait()
        if self.nodes.get(name) is node:
            del self.nodes[name]

    async def close(self) -> None:
        """End everything."""
        for name in list(self.nodes):
            node = self.nodes[name]
            self.kill(name)
            await node.ended.wait()
        self.group.cancel_scope.cancel()

    async def deploy(self, spec: DeploymentSpec, *, at: str) -> None:
        """Ask the coordinator on node *at*."""
        caller = Caller(self.nodes[at].bus, FLEET, self._new_id)
        await caller.call(self._machine(at).node, "deploy", Deploy(spec=spec), Nothing, timeout_s=10.0)

    def generate(self, request: GenerateRequest, *, at: str) -> AsyncIterator[OutputDelta]:
        """Ask the gateway of node *at*."""
        return self.nodes[at].models.get(request.deployment).executor.generate(request)

    def workers_of(self, name: DeploymentId) -> list[RehearsedWorker]:
        """Every worker of a deployment that has not ended, whichever plan it is of."""
        return [
            w for node in self.nodes.values() for s, w in node.workers.items() if s.deployment == name and not w.why
        ]

    def _machine(self, name: str) -> Machine:
        return self.nodes[name].machine

    def _new_id(self) -> str:
        return str(next(self._numbers))

    async def _run(self, node: RehearsedNode, agent: Agent, desk: AnswerDesk) -> None:
        desk.open()
        try:
            with node.scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(node.models.run)
                    await agent.run()
                    group.cancel_scope.cancel()
        finally:
            for worker in node.workers.values():
                worker.kill("went with its node")
            node.bus.close()
            node.journal.close()
            node.ended.set()

    def _coordinator(
        self, machine: Machine, journal: Journal, planner: FleetPlanner, voice: Voice, ring: EventRing
    ) -> Coordinator:
        return Coordinator(
            me=machine.node,
            journal=journal,
            clock=self.virtual.group(""),
            planner=planner,
            send_order=voice.send_order,
            broadcast=voice.broadcast,
            note=ring.note,
            begin_log=ring.begin,
            eager=machine.eager,
            heard=planner.hear,
        )

    async def _launch(
        self, machine: Machine, journal: Journal, workers: dict[ShardId, RehearsedWorker], hold: Hold, birth: int
    ) -> RehearsedWorker:
        port = await anyio.to_thread.run_sync(kept_port, journal, hold.shard)
        spec = WorkerSpec(
            fleet=FLEET,
            node=machine.node,
            home="",
            agent_locator="",
            data_listen="",
            shard=hold.shard,
            stages=hold.stages,
            manifest=hold.manifest,
            start=hold.start,
            stop=hold.stop,
            slots=hold.slots,
            context_tokens=hold.context_tokens,
            in_flight=hold.in_flight,
            threads=1,
            attempt=hold.attempt,
            birth=birth,
            recovery=hold.recovery,
            speculation=hold.speculation,
            activations=hold.activations,
            cache_tokens=hold.cache_tokens,
        )
        artifact = self._artifacts.open(self.manifest)
        kinds = [block.kind for block in artifact.blocks[hold.start : hold.stop]]
        worker = RehearsedWorker(
            spec=spec,
            host=machine.name,
            artifact=artifact,
            network=self.network,
            virtual=self.virtual,
            cost_s=trial_cost(self._trials(machine), kinds),
            load_s=machine.load_s,
            log=self.log,
        )
        workers[hold.shard] = worker
        worker.begin(port)
        return worker

    def _trials(self, machine: Machine) -> tuple[BlockTrial, ...]:
        kinds = {block.kind for block in self._artifacts.open(self.manifest).blocks}
        return tuple(
            BlockTrial(kind=kind, rows=rows, batch=1, context=0, time_s=machine.row_s * factor, spread_s=0.0)
            for kind in sorted(kinds)
            for rows, factor in ((1, 1.0), (64, 8.0))
        )

    async def _profile(self, machine: Machine, _: bytes) -> bytes:
        device = DeviceProfile(
            node=machine.node,
            fingerprint=machine.name,
            cores=1,
            threads=1,
            memory_total_bytes=machine.memory_bytes,
            memory_budget_bytes=machine.memory_bytes,
            trials=self._trials(machine),
        )
        return msgspec.msgpack.encode(Profiled(device=device))

    async def _links(self, machine: Machine, body: bytes) -> bytes:
        wanted = msgspec.msgpack.decode(body, type=ProbeLinks)
        rtt_s = 2 * self.network.delay_s
        hosts = {node.machine.node: name for name, node in self.nodes.items()}
        links = tuple(
            LinkProfile(source=machine.node, target=t.node, rtt_p50_s=rtt_s, rtt_p99_s=rtt_s, bytes_per_s=BYTES_PER_S)
            for t in wanted.targets
            if t.node in hosts and not self.network.is_cut(machine.name, hosts[t.node])
        )
        return msgspec.msgpack.encode(Links(links=links))

    async def _blocks(self, _: bytes) -> bytes:
        artifact = self._artifacts.open(self.manifest)
        return msgspec.msgpack.encode(BlocksOf(spec=artifact.manifest.spec, blocks=artifact.blocks))


async def _nothing_to_fetch(_hold: Hold, _arrived: Callable[[int], None]) -> None:
    """Every chunk is here."""


def _facts(machine: Machine) -> NodeFacts:
    return NodeFacts(
        name=machine.name,
        version="rehearsed",
        locators=(f"tcp/{machine.name}:1",),
        cores=1,
        memory_total_bytes=machine.memory_bytes,
        memory_budget_bytes=machine.memory_bytes,
        fingerprint=machine.name,
        coordinates=machine.coordinates,
        mends=True,
    )
