"""The one place that names concrete classes: a node out of its parts, running until cancelled."""

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from shoal import __version__
from shoal.clock import SystemClock
from shoal.errors import SettingsError
from shoal.fleet.order import Hold
from shoal.fleet.report import NodeFacts
from shoal.fleet.view import CoordinatorView
from shoal.fleet.views import JoinView
from shoal.ids import Digest, NodeId
from shoal.node.agent import Agent
from shoal.node.artifacts import fetch_artifact, fetch_shard
from shoal.node.calls import Caller, Handler
from shoal.node.coordinator import Coordinator
from shoal.node.desk import CoordinatorDesk, handler
from shoal.node.events import EventRing
from shoal.node.fleet_api import FleetApi
from shoal.node.gateway import Models
from shoal.node.journal import Journal
from shoal.node.launch import launch
from shoal.node.measuring import Measurer
from shoal.node.messages import Leave, Nothing
from shoal.node.options import NodeOptions
from shoal.node.pipeline import AnswerDesk
from shoal.node.planning import FleetPlanner
from shoal.node.probe import answer_echoes
from shoal.node.shards import ShardKeeper, WorkerHandle
from shoal.node.voice import Bell, Voice
from shoal.node.worker_spec import WorkerSpec
from shoal.observe.metrics import Metrics
from shoal.profile.device import device_facts, fingerprint
from shoal.runtime.backend.onnx import providers
from shoal.serve.access import access_for, read_keys
from shoal.serve.app import App, build_app
from shoal.serve.ports import Limits, Node
from shoal.serve.run import bind, serve, url_of
from shoal.store.home import Store, missing_bytes, open_store
from shoal.store.lock import try_locked
from shoal.store.peer import Fetcher, Pace, serve_chunks
from shoal.transport.bus import Bus
from shoal.transport.keys import ChunkTopic, ControlTopic, ProbeTopic, key_of
from shoal.transport.shaped import Link, ShapedBus, Way
from shoal.transport.zenoh import open_agent
from shoal.trust.identity import load_or_create, node_id

LEAVE_S = 30.0


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What a started node tells whoever started it; also kept in `<home>/run/node.json` for the command line."""

    node: NodeId
    name: str
    url: str
    locators: tuple[str, ...]


def running_file(home: Path) -> Path:
    """Where a running node says how it is reached."""
    return home / "run" / "node.json"


async def run_node(options: NodeOptions, log: FilteringBoundLogger, started: Callable[[Running], None]) -> None:
    """Run a node until cancelled or until it has left the fleet.

    Raises SettingsError when another node runs in the same home, PortInUseError when an address is taken.
    """
    home = Path(options.home)
    (home / "run").mkdir(parents=True, exist_ok=True)
    with try_locked(home / "run" / "lock") as mine:
        if not mine:
            raise SettingsError(
                f"a node is already running with home {home}",
                hint="stop it with `shoal leave`, or choose another SHOAL_HOME",
            )
        http = _listener(options)
        try:
            await _Assembly(options, log).run(http, started)
        finally:
            running_file(home).unlink(missing_ok=True)
            if http is not None:
                http.close()


def _listener(options: NodeOptions) -> socket.socket | None:
    if options.http is None:
        return None
    keys = read_keys(Path(options.api_keys)) if options.api_keys else frozenset()
    access_for(options.http[0], keys)  # a gateway that would stand open is refused before anything is bound
    return bind(*options.http)


@dataclass(slots=True)
class _Assembly:
    options: NodeOptions
    log: FilteringBoundLogger

    async def run(self, http: socket.socket | None, started: Callable[[Running], None]) -> None:
        options, log, clock = self.options, self.log, SystemClock()
        home = Path(options.home)
        store = open_store(home, quota_bytes=options.quota_bytes)
        me = node_id(load_or_create(home / "node.key").public_key())
        journal = Journal(home / "journal.db")
        fabric = open_agent((options.listen,), options.connect, discover=options.discover)
        bus = shaped_agent(fabric, options, me)
        caller = Caller(bus, options.fleet, lambda: secrets.token_hex(8))
        facts = self._facts(fabric.locators, url_of(http) if http is not None else "")
        fetcher = Fetcher(bus, options.fleet, store, pace=Pace())
        ring = EventRing(log, time.time)
        planner = FleetPlanner(caller, clock, log)
        models: Models | None = None
        stop = anyio.CancelScope()

        def on_view(view: CoordinatorView) -> None:
            if models is not None:
                models.hear(view)

        voice, bell = Voice(bus, options.fleet, me, on_view), Bell()
        keeper = ShardKeeper(
            journal,
            partial(fetch_hold, fetcher, store),
            partial(self._launch, me, facts, fabric.locators[0]),
            voice.tell_worker,
            bell.ring,
        )
        coordinator = (
            Coordinator(
                me=me,
                journal=journal,
                clock=clock,
                planner=planner,
                send_order=voice.send_order,
                broadcast=voice.broadcast,
                note=ring.note,
                eager=options.eager,
            )
            if options.coordinates
            else None
        )
        measurer = Measurer(
            me=me,
            fleet=options.fleet,
            bus=bus,
            store=store,
            fetcher=fetcher,
            clock=clock,
            threads=options.threads or facts.cores,
            facts=lambda: facts,
        )

        async def leave(_: Leave) -> Nothing:
            agent.leaving = True
            bell.ring()
            group.start_soon(_go_when_drained, agent, stop)
            return Nothing()

        handlers: dict[str, Handler] = {"profile": measurer.profile, "links": measurer.links, "blocks": measurer.blocks}
        handlers["leave"] = handler(Leave, leave)
        if coordinator is not None:
            handlers |= CoordinatorDesk(coordinator, planner, ring).handlers()
        agent = Agent(
            me=me,
            fleet=options.fleet,
            incarnation=journal.next_number("incarnation"),
            facts=lambda: facts,
            bus=bus,
            keeper=keeper,
            coordinator=coordinator,
            bell=bell,
            handlers=handlers,
            complete_manifests=partial(complete_manifests, store),
            on_view=on_view,
            log=log,
        )
        serving = [answer_echoes(fabric, options.fleet, me), serve_chunks(fabric, options.fleet, me, store.chunks)]
        try:
            async with anyio.create_task_group() as group:
                with stop:
                    if http is not None:
                        desk = AnswerDesk(bus, options.fleet, me, clock, log)
                        desk.open()
                        serving.append(desk)
                        models = Models(me, store, desk, clock, time.time, lambda: secrets.token_hex(8), log)
                        group.start_soon(models.run)
                        api = FleetApi(
                            me,
                            caller,
                            store,
                            lambda: models.view,
                            _join(facts, options),
                            models.last_token_age_s,
                            models.answers,
                        )
                        node = Node(
                            deployments=models,
                            health=models,
                            machines=api,
                            placement=api,
                            events=api,
                            metrics=Metrics(CollectorRegistry()),
                            clock=clock,
                            unix_s=time.time,
                            draw=lambda: secrets.randbits(63),
                        )
                        await group.start(partial(serve, self._app(node), http))
                    group.start_soon(agent.run)
                    running = Running(node=me, name=options.name, url=facts.gateway, locators=fabric.locators)
                    running_file(home).write_bytes(msgspec.json.encode(running))
                    started(running)
                    await anyio.sleep_forever()
                group.cancel_scope.cancel()
        finally:
            for open_thing in serving:
                open_thing.close()
            bus.close()
            fabric.close()
            journal.close()

    def _app(self, node: Node) -> App:
        options = self.options
        assert options.http is not None
        keys = read_keys(Path(options.api_keys)) if options.api_keys else frozenset()
        return build_app(node, access_for(options.http[0], keys), Limits())

    def _facts(self, locators: tuple[str, ...], gateway: str) -> NodeFacts:
        options = self.options
        machine = device_facts(f"onnxruntime {version('onnxruntime')}")
        threads = options.threads or machine.cores
        emulated = (f"slowdown {options.slowdown}",) if options.slowdown != 1 else ()
        return NodeFacts(
            name=options.name,
            version=__version__,
            locators=locators,
            cores=machine.cores,
            memory_total_bytes=machine.memory_total_bytes,
            memory_budget_bytes=options.memory_bytes or machine.suggested_budget_bytes,
            providers=providers(),
            fingerprint=fingerprint(machine, threads, emulated),
            gateway=gateway,
            coordinates=options.coordinates,
            slowdown=options.slowdown,
        )

    async def _launch(self, me: NodeId, facts: NodeFacts, agent_locator: str, hold: Hold) -> WorkerHandle:
        options = self.options
        host = options.listen.removeprefix("tcp/").rpartition(":")[0]
        spec = WorkerSpec(
            fleet=options.fleet,
            node=me,
            home=options.home,
            agent_locator=agent_locator,
            data_listen=f"tcp/{host}:0",
            shard=hold.shard,
            stages=hold.stages,
            manifest=hold.manifest,
            start=hold.start,
            stop=hold.stop,
            slots=hold.slots,
            context_tokens=hold.context_tokens,
            in_flight=hold.in_flight,
            threads=options.threads or facts.cores,
            slowdown=options.slowdown,
            links=options.links,
        )
        return await launch(spec)


async def fetch_hold(fetcher: Fetcher, store: Store, hold: Hold, arrived: Callable[[int], None]) -> None:
    """Bring the chunks of a shard here; *arrived* is called on the event loop."""

    def work() -> None:
        artifact = fetch_artifact(fetcher, store, hold.manifest, hold.sources)
        span = (hold.start, hold.stop)
        fetch_shard(fetcher, artifact, span, hold.sources, lambda n: anyio.from_thread.run_sync(arrived, n))

    await anyio.to_thread.run_sync(work)


def complete_manifests(store: Store) -> tuple[Digest, ...]:
    """Models of which every chunk is here."""
    names = store.library.names()
    return tuple(store.library.digest(n) for n in names if not missing_bytes(store, store.library.read(n)))


def shaped_agent(bus: Bus, options: NodeOptions, me: NodeId) -> Bus:
    """The agent's bus as over the emulated links: what is addressed to a node travels on the link to it."""
    if not options.links:
        return bus
    links: dict[str, Link] = {}
    for shape in options.links:
        way = Way(latency_s=shape.latency_s, bytes_per_s=shape.bytes_per_s)
        link = Link(out=way, back=way)
        fleet, node = options.fleet, shape.target
        for key in (
            key_of(ControlTopic(fleet=fleet, node=node, verb="x")).removesuffix("/x"),
            key_of(ChunkTopic(fleet=fleet, node=node, digest=Digest("x"))).removesuffix("/x"),
            key_of(ProbeTopic(fleet=fleet, source=me, target=node)),
        ):
            links[key] = link
    return ShapedBus(bus, links, SystemClock())


async def _go_when_drained(agent: Agent, stop: anyio.CancelScope) -> None:
    with anyio.move_on_after(LEAVE_S):
        await anyio.sleep(1.0)  # a heartbeat or two: the coordinator must hear before we are gone
        while agent.keeper.reports():  # noqa: ASYNC110 - another task's state, looked at rarely
            await anyio.sleep(0.1)
    stop.cancel()


def _join(facts: NodeFacts, options: NodeOptions) -> JoinView:
    address = facts.locators[0].removeprefix("tcp/") if facts.locators else options.listen
    return JoinView(address=address, command=f"shoal join {address}")
