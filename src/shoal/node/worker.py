"""A worker process: one shard, one engine session, one place in a pipeline (ADR 6).

Its life: read the spec from standard input, load, listen (`ready`), be wired, serve; it ends when standard input closes, which
happens when its agent says so and also when the agent dies.  Reports go to the agent over the control session.
"""

import contextlib
import os
import secrets
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock, SystemClock
from shoal.errors import PortInUseError, ShardLostError, ShoalError
from shoal.fleet.report import ShardReport, ShardState, StepTimes
from shoal.ids import NodeId
from shoal.node.artifacts import Artifact, load_shard, open_artifact
from shoal.node.messages import REPORT, WIRE
from shoal.node.stage_keys import submit_topic
from shoal.node.stage_loop import StageLoop, Stopped
from shoal.node.weather import ChangingLinks, Slowness, link_of, links_of
from shoal.node.wiring import Outcome, Wirer
from shoal.node.worker_spec import Wiring, WorkerSpec
from shoal.observe.log import set_up_logs
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.backend.roles import forms_of
from shoal.runtime.backend.throttled import Throttled
from shoal.runtime.ports import Backend, Session
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import StageSettings, TensorForm
from shoal.store.home import Store, open_store
from shoal.transport.bus import Bus
from shoal.transport.keys import ROOT, WorkerTopic, key_of
from shoal.transport.shaped import ShapedBus
from shoal.transport.zenoh import ZenohBus, open_control, open_data

_REPORT_EVERY_S = 0.5
_PORT_PATIENCE_S = 5.0


@dataclass(slots=True)
class Reporter:
    """Tells the agent where the shard stands: on each change, when it begins or ceases to answer, and twice a second.

    If need be from a thread beside the loop: the agent takes a worker that says nothing for dead, and loading and steps may
    take longer than that.
    """

    spec: WorkerSpec
    control: Bus
    clock: Clock
    state: ShardState = ShardState.LOADING
    locators: tuple[str, ...] = ()
    wired_to: tuple[str, ...] = ()
    error: ShoalError | None = None
    next_node: NodeId | None = None
    rtt_s: float | None = None
    loop: StageLoop | None = None
    _step_times: StepTimes | None = None
    _sent_s: float = float("-inf")
    _said_busy: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Report from now on, until closed."""
        threading.Thread(target=self._run, name="report", daemon=True).start()

    def tell(self, state: ShardState, error: ShoalError | None = None) -> None:
        """Report *state* at once."""
        with self._lock:
            self.state, self.error = state, error
            self._send()

    def wired(self, outcome: Outcome) -> None:
        """Report what became of a wiring; a stage alone sends to nobody, old or new."""
        wiring, alone = outcome.wiring, self.spec.stages == 1
        with self._lock:  # another thread may be reporting: half of a wiring is none
            self.next_node, self.rtt_s = wiring.next_node, outcome.rtt_s
            self.wired_to = () if alone else wiring.next_locators
            self.state, self.error = ShardState.READY if outcome.error else ShardState.WIRED, outcome.error
            self._send()

    def remind(self) -> None:
        """Report again when the last report is old, or says busy of a shard that is idle or the reverse."""
        loop = self.loop
        busy = loop is not None and loop.live_requests + loop.waiting_requests > 0
        if busy is not self._said_busy or self.clock.now_s() - self._sent_s >= _REPORT_EVERY_S:
            with self._lock:
                self._send()

    def close(self) -> None:
        """Say no more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(_REPORT_EVERY_S / 2):
            with contextlib.suppress(ShoalError):  # of a session that is being closed
                self.remind()

    def _trouble(self) -> ShoalError | None:
        """What the loop sees go wrong: the fleet should plan anew, but if nobody does it may yet mend itself."""
        if self.loop is None or not self.loop.trouble:
            return None
        where = f"; the next stage is on node {self.next_node}" if self.next_node else ""
        return ShardLostError(f"{self.loop.trouble}{where}")

    def _send(self) -> None:
        loop, error = self.loop, self.error or self._trouble()
        if loop is not None:
            # The last that is known goes on being said: agents pass on only the newest report.
            self._step_times = loop.live.take_steps() or self._step_times
        report = ShardReport(
            shard=self.spec.shard,
            state=self.state,
            start=self.spec.start,
            stop=self.spec.stop,
            locators=self.locators,
            wired_to=self.wired_to,
            next_node=self.next_node,
            rtt_s=self.rtt_s,
            error_code=error.code if error else "",
            error=error.message if error else "",
            steps=loop.steps if loop else 0,
            busy_s=loop.busy_s if loop else 0.0,
            live_requests=loop.live_requests if loop else 0,
            waiting_requests=loop.waiting_requests if loop else 0,
            step_times=self._step_times,
            hop_times=loop.live.hop() if loop else None,
        )
        self.control.put(worker_key(self.spec, REPORT), msgspec.msgpack.encode(report))
        self._said_busy = report.live_requests + report.waiting_requests > 0
        self._sent_s = self.clock.now_s()


def worker_key(spec: WorkerSpec, verb: str) -> str:
    """Key on which this worker and its agent speak."""
    shard = spec.shard
    topic = WorkerTopic(
        fleet=spec.fleet,
        node=spec.node,
        deployment=shard.deployment,
        plan_epoch=shard.plan_epoch,
        stage=shard.stage,
        verb=verb,
    )
    return key_of(topic)


def stage_settings(spec: WorkerSpec, artifact: Artifact, takes: tuple[TensorForm, ...]) -> StageSettings:
    """The machine's settings for this place in the pipeline."""
    model = artifact.manifest.spec
    return StageSettings(
        plan_epoch=spec.shard.plan_epoch,
        index=spec.shard.stage,
        stages=spec.stages,
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        vocabulary=model.vocabulary,
        eos_token_ids=model.eos_token_ids,
        takes=takes,
        run=secrets.randbits(32),
        scheduler=SchedulerSettings(in_flight=spec.in_flight),
    )


def serve(spec: WorkerSpec, control: Bus, backend: Backend, store: Store, log: FilteringBoundLogger) -> None:
    """Load the shard and work until the agent closes our input."""
    life = _Life()
    threading.Thread(target=life.watch, name="input", daemon=True).start()
    clock = SystemClock()
    reporter = Reporter(spec=spec, control=control, clock=clock)
    reporter.start()
    try:
        artifact = open_artifact(store, spec.manifest)
        session, takes = _load(spec, store, artifact, backend)
        inbound = _listen(spec.data_listen)
    except ShoalError as error:
        reporter.tell(ShardState.FAILED, error)
        raise
    loop = StageLoop(
        fleet=spec.fleet,
        shard=spec.shard,
        settings=stage_settings(spec, artifact, takes),
        session=session,
        control=control,
        inbound=inbound,
        clock=clock,
        told=reporter.remind,
        log=log,
    )
    reporter.loop, reporter.locators = loop, inbound.locators
    life.loop = loop
    wirer = Wirer(
        spec=spec,
        loop=loop,
        dial=partial(open_data, ()),
        shape=lambda bus, wiring: shaped(bus, spec, wiring),
        told=reporter.wired,
        log=log,
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
        session.close()


def _listen(wanted: str) -> ZenohBus:
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


def _load(
    spec: WorkerSpec, store: Store, artifact: Artifact, backend: Backend
) -> tuple[Session, tuple[TensorForm, ...]]:
    """The shard in its engine, and what must come with its frames."""
    shard = load_shard(
        store,
        artifact,
        (spec.start, spec.stop),
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        threads=spec.threads,
    )
    return backend.load(shard), forms_of(shard.graph)


def shaped(bus: Bus, spec: WorkerSpec, wiring: Wiring) -> Bus:
    """*bus* as over the emulated link to the next node; as it is where none is emulated."""
    home = Path(spec.home)
    mine = tuple(link for link in links_of(home, spec.links) if link.target == wiring.next_node)
    if not mine:
        return bus
    shaped_bus = ShapedBus(bus, {ROOT: link_of(mine[0])}, SystemClock())
    ChangingLinks(shaped_bus, home, mine, lambda _: (ROOT,)).start()
    return shaped_bus


@dataclass(slots=True)
class _Life:
    """As long as standard input is open; then the loop is stopped, and the process ends hard if that does not help."""

    loop: StageLoop | None = None

    def watch(self) -> None:
        sys.stdin.read()
        if self.loop is not None:  # else it still loads: nothing is lost by ending at once
            self.loop.inbox.put(Stopped())
            threading.Event().wait(2.5)
        os._exit(0)


def make_backend(spec: WorkerSpec) -> Backend:
    """The engine for this machine, slowed down as its weather says where the spec emulates one."""
    engine: Backend = OnnxBackend()
    emulated = spec.slowdown > 1 or spec.links
    return Throttled(engine, slowdown=Slowness(Path(spec.home), spec.slowdown)) if emulated else engine


def main() -> None:
    """Entry point of the process."""
    spec = msgspec.json.decode(sys.stdin.readline(), type=WorkerSpec)
    log = set_up_logs(sys.stderr)
    try:
        control = open_control(spec.agent_locator)
        store = open_store(Path(spec.home))
        try:
            serve(spec, control, make_backend(spec), store, log)
        finally:
            control.close()
    except ShoalError as error:
        log.error("worker.failed", shard=str(spec.shard), error=str(error))  # noqa: TRY400 the error says it all; a traceback helps nobody
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
