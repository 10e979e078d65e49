"""A stage at work in its process: it listens, is wired, and answers until it is told to stop.

The same for a shard with its engine and for a relay without one; whoever calls brings the session.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from shoal.errors import PortInUseError
from shoal.fleet.report import ShardState
from shoal.node.drafting import DraftModel, DraftThread
from shoal.node.messages import WIRE
from shoal.node.reporter import Reporter, worker_key
from shoal.node.stage_keys import submit_topic
from shoal.node.stage_loop import StageLoop
from shoal.node.weather import ChangingLinks, link_of, links_of
from shoal.node.wiring import Dial, Wirer
from shoal.node.worker_spec import Wiring, WorkerSpec
from shoal.runtime.grammar import Grammars
from shoal.runtime.ports import Session
from shoal.runtime.settings import StageSettings
from shoal.threads import SystemThreads, Threads
from shoal.transport.bus import Bus
from shoal.transport.keys import ROOT, key_of
from shoal.transport.shaped import ShapedBus
from shoal.transport.zenoh import ZenohBus, open_data

_PORT_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the process gives a stage."""

    spec: WorkerSpec
    control: Bus
    reporter: Reporter
    log: FilteringBoundLogger
    grammars: Grammars | None = None
    draft: DraftModel | None = None
    dial: Dial = field(default=partial(open_data, ()))
    threads: Threads = field(default_factory=SystemThreads)


class Inbound(Bus, Protocol):
    """A session that the stage before this one dials."""

    @property
    def locators(self) -> tuple[str, ...]:
        """Where it listens."""
        ...


def work(
    bench: Bench, session: Session, settings: StageSettings, inbound: Inbound, begun: Callable[[StageLoop], None]
) -> None:
    """Answer until the loop, which *begun* is told, is stopped; then close what was given and opened."""
    spec, control, reporter = bench.spec, bench.control, bench.reporter
    loop = StageLoop(
        fleet=spec.fleet,
        shard=spec.shard,
        settings=settings,
        session=session,
        control=control,
        inbound=inbound,
        threads=bench.threads,
        told=reporter.remind,
        log=bench.log,
        grammars=bench.grammars,
    )
    draft = _beside(bench, loop)
    reporter.loop, reporter.locators = loop, inbound.locators
    begun(loop)
    wirer = Wirer(
        spec=spec,
        loop=loop,
        dial=bench.dial,
        shape=lambda bus, wiring: shaped(bus, spec, wiring),
        told=reporter.wired,
        log=bench.log,
        threads=bench.threads,
    )
    listening = control.subscribe(worker_key(spec, WIRE), wirer.on_wire)
    loop.listen(key_of(submit_topic(spec.fleet, spec.node, spec.shard)))
    reporter.tell(ShardState.READY)
    try:
        loop.run()
    finally:
        reporter.close()
        listening.close()
        wirer.close()
        inbound.close()
        if draft is not None:
            draft.close()
        session.close()


def _beside(bench: Bench, loop: StageLoop) -> DraftThread | None:
    """Have the draft model answer what *loop* asks."""
    if bench.draft is None:
        return None
    thread = DraftThread(bench.draft, loop.inbox.put, bench.threads, bench.log)
    thread.start(f"draft-{bench.spec.shard}")
    loop.foretell = thread.ask
    return thread


def listen(wanted: str) -> ZenohBus:
    """Listen where the others know this shard from before; elsewhere only if somebody else has taken that port.

    The worker of the node's last start may still be on its way out.
    """
    host, _, port = wanted.rpartition(":")
    until_s = time.monotonic() + (_PORT_PATIENCE_S if int(port) else 0.0)
    while True:
        try:
            return open_data(listen=(wanted,))
        except PortInUseError:
            if time.monotonic() >= until_s:
                return open_data(listen=(f"{host}:0",))
            time.sleep(0.2)


def shaped(bus: Bus, spec: WorkerSpec, wiring: Wiring) -> Bus:
    """*bus* as over the emulated link to the next node; as it is where none is emulated."""
    home = Path(spec.home)
    mine = tuple(link for link in links_of(home, spec.links) if link.target == wiring.next_node)
    if not mine:
        return bus
    shaped_bus = ShapedBus(bus, {ROOT: link_of(mine[0])}, SystemThreads())
    ChangingLinks(shaped_bus, home, mine, lambda _: (ROOT,)).start()
    return shaped_bus
