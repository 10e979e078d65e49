"""The one place that names concrete classes: a node out of its parts, running until cancelled."""

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock, SystemClock
from shoal.errors import SettingsError
from shoal.fleet.order import Hold
from shoal.fleet.report import NodeFacts
from shoal.fleet.statuses import named
from shoal.fleet.views import JoinView
from shoal.ids import NodeId
from shoal.node.agent import Agent
from shoal.node.artifacts import Artifacts
from shoal.node.calls import Caller, Handler
from shoal.node.coordinator import Coordinator
from shoal.node.crews import Crews
from shoal.node.desk import CoordinatorDesk
from shoal.node.emulated import dial_agent, shaped_agent
from shoal.node.events import EventRing
from shoal.node.facts import engine_threads, node_facts
from shoal.node.fleet_api import FleetApi
from shoal.node.fleet_figures import errors_of, figures
from shoal.node.gateway import Models
from shoal.node.holding import complete_manifests, fetch_hold
from shoal.node.in_use import journal_file
from shoal.node.journal import Journal
from shoal.node.last_plan import kept_port
from shoal.node.launch import RELAY, launch
from shoal.node.measuring import Measurer
from shoal.node.options import NodeOptions
from shoal.node.pipeline import AnswerDesk
from shoal.node.planning import FleetPlanner
from shoal.node.probe import answer_echoes
from shoal.node.rousing import wake_by_call
from shoal.node.running import Running, lock_file, running_file
from shoal.node.shards import ShardKeeper, WorkerHandle
from shoal.node.voice import Bell, Voice
from shoal.node.worker_spec import WorkerSpec
from shoal.observe.figures import register
from shoal.observe.metrics import Metrics
from shoal.plan.replan import Rules
from shoal.profile.device import device_facts
from shoal.serve.access import Access, access_for, read_keys
from shoal.serve.app import build_app
from shoal.serve.ports import Limits, Node
from shoal.serve.run import bind, serve, url_of
from shoal.store.disk import home_named
from shoal.store.fetch import Fetcher
from shoal.store.home import Store, open_store
from shoal.store.lock import try_locked
from shoal.store.pace import Pacer
from shoal.store.peer import serve_chunks
from shoal.transport.bus import Bus, Closable
from shoal.transport.zenoh import ZenohBus, open_agent
from shoal.trust.identity import load_or_create, node_id

UNHEARD_S = 5.0


async def run_node(options: NodeOptions, log: FilteringBoundLogger, started: Callable[[Running], None]) -> None:
    """Run a node until cancelled or until it has left the fleet.

    Raises SettingsError when another node runs in the same home or it cannot be written to, StorageFullError when it is
    full, PortInUseError when an address is taken.
    """
    home = Path(options.home)
    with home_named(home), try_locked(lock_file(home)) as mine:
        if not mine:
            raise SettingsError(
                f"a node is already running with home {home}",
                hint="stop it with `shoal leave`, or choose another SHOAL_HOME",
            )
        access, http = _door(options)
        try:
            parts = _open_parts(options, log, url_of(http) if http is not None else "")
            try:
                await _run(parts, _Gateway(access, http) if http is not None else None, started)
            finally:
                parts.close()
        finally:
            running_file(home).unlink(missing_ok=True)
            if http is not None:
                http.close()


def _door(options: NodeOptions) -> tuple[Access, socket.socket | None]:
    """The gateway's rules and its socket; one that would stand open is refused before anything is bound."""
    if options.http is None:
        return Access(), None
    keys = read_keys(Path(options.api_keys)) if options.api_keys else frozenset()
    access = access_for(options.http[0], keys, names=options.allow_hosts, origins=options.allow_origins)
    return access, bind(*options.http)


@dataclass(frozen=True, slots=True)
class _Gateway:
    access: Access
    http: socket.socket


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a node has before any of its loops runs."""

    options: NodeOptions
    log: FilteringBoundLogger
    clock: Clock
    me: NodeId
    store: Store
    artifacts: Artifacts
    journal: Journal
    fabric: ZenohBus
    bus: Bus
    facts: NodeFacts
    caller: Caller
    ring: EventRing

    def close(self) -> None:
        self.bus.close()
        self.fabric.close()
        self.journal.close()


def _open_parts(options: NodeOptions, log: FilteringBoundLogger, url: str) -> _Parts:
    home = Path(options.home)
    me = node_id(load_or_create(home / "node.key").public_key())
    store = open_store(home, quota_bytes=options.quota_bytes)
    journal = Journal(journal_file(home))
    fabric = open_agent((options.listen,), options.connect, discover=options.discover)
    bus = shaped_agent(fabric, options, me)
    return _Parts(
        options=options,
        log=log,
        clock=SystemClock(),
        me=me,
        store=store,
        artifacts=Artifacts(store),
        journal=journal,
        fabric=fabric,
        bus=bus,
        facts=node_facts(options, fabric, url),
        caller=Caller(bus, options.fleet, new_id),
        ring=EventRing(log, time.time),
    )


async def _run(parts: _Parts, gateway: _Gateway | None, started: Callable[[Running], None]) -> None:
    options, fleet, me = parts.options, parts.options.fleet, parts.me
    desk = AnswerDesk(parts.bus, fleet, me, parts.clock, parts.log)
    models = Models(
        me,
        parts.store,
        parts.artifacts,
        desk,
        parts.clock,
        time.time,
        new_id,
        parts.log,
        partial(wake_by_call, parts.caller),
    )
    voice, bell = Voice(parts.bus, fleet, me, models.hear), Bell()
    agent = _agent(parts, voice, bell, models)
    serving: list[Closable] = [
        answer_echoes(parts.fabric, fleet, me),
        serve_chunks(parts.fabric, fleet, me, parts.store.disk, first=parts.store.chunks),
        desk,
    ]
    try:
        async with anyio.create_task_group() as group:
            if gateway is not None:
                desk.open()
                group.start_soon(models.run)
                app = build_app(_served(parts, models, agent), gateway.access, Limits())
                await group.start(partial(serve, app, gateway.http))
            running = Running(node=me, name=options.name, url=parts.facts.gateway, locators=parts.fabric.locators)
            running_file(Path(options.home)).write_bytes(msgspec.json.encode(running))
            started(running)
            group.start_soon(_say_when_unheard, parts, agent)
            await agent.run()
            group.cancel_scope.cancel()
    finally:
        for open_thing in serving:
            open_thing.close()


async def _say_when_unheard(parts: _Parts, agent: Agent) -> None:
    """A node waits for its fleet as long as it takes; whoever mistyped the address should not wait with it."""
    await anyio.sleep(UNHEARD_S)
    if parts.options.connect and not agent.led:
        parts.log.warning(
            "fleet.not_heard",
            addresses=", ".join(parts.options.connect),
            hint="is its first node up, and the address right? this node goes on trying",
        )


def _agent(parts: _Parts, voice: Voice, bell: Bell, models: Models) -> Agent:
    options, facts = parts.options, parts.facts
    pacer = Pacer(bytes_per_s=options.fetch_bytes_per_s, yields=models.any_served, clock=parts.clock)
    fetcher = Fetcher(parts.bus, options.fleet, parts.store, pacer=pacer)
    keeper = ShardKeeper(
        parts.journal,
        partial(fetch_hold, parts.store, fetcher, parts.artifacts),
        partial(launch_hold, parts, Crews(partial(launch, module=RELAY))),
        voice.tell_worker,
        bell.ring,
        parts.log,
    )
    measurer = Measurer(
        me=parts.me,
        fleet=options.fleet,
        dial=partial(dial_agent, options, parts.me),
        store=parts.store,
        artifacts=parts.artifacts,
        fetcher=fetcher,
        clock=parts.clock,
        threads=engine_threads(options, facts.cores),
        facts=lambda: facts,
    )
    handlers: dict[str, Handler] = {"profile": measurer.profile, "links": measurer.links, "blocks": measurer.blocks}
    planner = FleetPlanner(parts.caller, parts.clock, parts.log)
    coordinator = _coordinator(parts, voice, planner) if options.coordinates else None
    if coordinator is not None:
        handlers |= CoordinatorDesk(coordinator, planner, parts.ring).handlers()
    return Agent(
        me=parts.me,
        fleet=options.fleet,
        # Above the wall clock's seconds: a node whose journal was lost must not seem older than it was.
        incarnation=parts.journal.next_number("incarnation", above=int(time.time())),
        facts=lambda: facts,
        bus=parts.bus,
        keeper=keeper,
        coordinator=coordinator,
        bell=bell,
        handlers=handlers,
        complete_manifests=partial(complete_manifests, parts.store),
        on_view=models.hear,
        uses=models.uses,
        stand_in=models.follow,
        journal=parts.journal,
        log=parts.log,
    )


def _coordinator(parts: _Parts, voice: Voice, planner: FleetPlanner) -> Coordinator:
    coordinator = Coordinator(
        me=parts.me,
        journal=parts.journal,
        clock=parts.clock,
        planner=planner,
        send_order=voice.send_order,
        broadcast=voice.broadcast,
        note=parts.ring.note,
        begin_log=parts.ring.begin,
        eager=parts.options.eager,
        heard=planner.hear,
        move_rules=Rules(dwell_s=parts.options.move_dwell_s),
    )
    planner.corrections.told = lambda change: parts.ring.note(
        "profile.changed", named(str(change), coordinator.state.members), node=change.node
    )
    return coordinator


def _served(parts: _Parts, models: Models, agent: Agent) -> Node:
    """What the gateway asks of this node."""
    api = FleetApi(
        me=parts.me,
        caller=parts.caller,
        store=parts.store,
        view=lambda: models.view,
        join=_join(parts.facts, parts.options),
        last_token_age_s=models.last_token_age_s,
        prediction=models.prediction,
        answers=models.answers,
    )
    registry = CollectorRegistry()
    register(
        registry,
        lambda: msgspec.structs.replace(
            figures(agent.coordinator, agent.report(), models.view, parts.fabric.stats(), parts.journal.failed_writes),
            errors=errors_of(models.predictions()),
        ),
    )
    return Node(
        deployments=models,
        health=models,
        machines=api,
        placement=api,
        events=api,
        metrics=Metrics(registry),
        clock=parts.clock,
        unix_s=time.time,
        draw=lambda: secrets.randbits(63),
    )


def new_id() -> str:
    """Sixteen random hexadecimal characters."""
    return secrets.token_hex(8)


async def launch_hold(parts: _Parts, crews: Crews, hold: Hold, birth: int) -> WorkerHandle:
    """Start the worker of a shard, or a relay, where it listened before if it was here before."""
    options = parts.options
    host = options.listen.removeprefix("tcp/").rpartition(":")[0]
    port = await anyio.to_thread.run_sync(kept_port, parts.journal, hold.shard)
    spec = WorkerSpec(
        fleet=options.fleet,
        node=parts.me,
        home=options.home,
        agent_locator=parts.fabric.locators[0],
        data_listen=f"tcp/{host}:{port}",
        shard=hold.shard,
        stages=hold.stages,
        manifest=hold.manifest,
        start=hold.start,
        stop=hold.stop,
        slots=hold.slots,
        context_tokens=hold.context_tokens,
        in_flight=hold.in_flight,
        threads=engine_threads(options, device_facts("").cores),
        attempt=hold.attempt,
        birth=birth,
        recovery=hold.recovery,
        speculation=hold.speculation,
        draft=hold.draft,
        activations=hold.activations,
        cache_tokens=hold.cache_tokens,
        slowdown=options.slowdown,
        links=options.links,
    )
    return await (crews.begin(spec) if hold.is_relay else launch(spec))


def _join(facts: NodeFacts, options: NodeOptions) -> JoinView:
    address = facts.locators[0].removeprefix("tcp/") if facts.locators else options.listen
    return JoinView(address=address, command=f"shoal join {address}")
