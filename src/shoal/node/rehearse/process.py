"""A worker of a rehearsed fleet: what `shoal.node.worker` runs as a process, as threads that can be frozen and killed."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
import msgspec
import numpy as np
from structlog.typing import FilteringBoundLogger

from shoal.errors import NodeUnreachableError, ShoalError
from shoal.fleet.report import ShardState
from shoal.node.artifacts import Artifact
from shoal.node.rehearse.network import Listening, Network
from shoal.node.rehearse.virtual import VirtualThreads, VirtualTime
from shoal.node.reporter import Reporter
from shoal.node.stage_loop import StageLoop, Stopped
from shoal.node.stage_work import Bench, work
from shoal.node.worker import stage_settings
from shoal.node.worker_spec import WorkerSpec
from shoal.runtime.backend.null import NullBackend, NullSession, StepCost, null_shard
from shoal.runtime.backend.roles import forms_of
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array
from shoal.transport.bus import Bus
from shoal.transport.memory import MemoryBus

STOP_S = 3.0


@dataclass(slots=True)
class RehearsedWorker:
    """A `WorkerHandle`; belongs to the event loop."""

    spec: WorkerSpec
    host: str
    artifact: Artifact
    network: Network
    virtual: VirtualTime
    cost_s: StepCost
    load_s: float
    log: FilteringBoundLogger
    loop: StageLoop | None = None
    session: NullSession | None = None
    why: str = ""
    spoils: bool = False
    """Its engine is broken: all numbers that it computes are not finite."""
    _buses: list[MemoryBus] = field(default_factory=list)
    _inbound: Listening = field(init=False)
    _ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def group(self) -> str:
        """Of its threads."""
        return f"{self.host} {self.spec.shard} {self.spec.birth}"

    @property
    def locator(self) -> str:
        """Where it is dialled."""
        return self._inbound.locator

    @property
    def threads(self) -> VirtualThreads:
        """Its threads and its time."""
        return self.virtual.group(self.group)

    def begin(self, port: int) -> None:
        """Start it; it listens at *port* if that is not 0."""
        self._buses.append(self.network.attach(self.host, self.threads))
        self._inbound = self.network.listen(self.host, port, self.threads)
        said = self._say_ended(asyncio.get_running_loop())

        def run() -> None:
            try:
                self._serve(self._buses[0])
            except ShoalError as error:
                self.log.warning("worker.failed", shard=str(self.spec.shard), error=str(error))
            finally:
                said()

        self.threads.start("worker", run)

    async def wait(self) -> str:
        """See `WorkerHandle.wait`."""
        await self._ended.wait()
        return self.why or "the worker ended"

    async def stop(self, *, at_once: bool = False) -> None:
        """See `WorkerHandle.stop`."""
        if not at_once and self.loop is not None:
            self.loop.inbox.put(Stopped())
            with anyio.move_on_after(STOP_S):
                await self._ended.wait()
        self.kill("was stopped")
        await self._ended.wait()

    def kill(self, why: str = "was ended by SIGKILL") -> None:
        """End it without a farewell; harmless when it has ended."""
        self.why = self.why or f"worker {why}"
        self.virtual.kill(self.group)
        self.network.hang_up(self._inbound)
        for bus in self._buses:
            bus.close()

    def freeze(self) -> None:
        """Let it stand still."""
        self.virtual.freeze(self.group)

    def thaw(self) -> None:
        """Let it go on."""
        self.virtual.thaw(self.group)

    def _say_ended(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        def said() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ended.set)

        return said

    def _serve(self, control: Bus) -> None:
        spec, threads = self.spec, self.threads
        reporter = Reporter(spec=spec, control=control, threads=threads)
        reporter.start()
        threads.sleep(self.load_s)
        last = spec.shard.stage == spec.stages - 1
        shard = null_shard(
            spec.start,
            spec.stop,
            embeds=spec.shard.stage == 0,
            vocabulary=self.artifact.manifest.spec.vocabulary if last else 0,
            slots=spec.slots,
            context_tokens=spec.context_tokens,
        )
        self.session = NullBackend(cost_s=self.cost_s, wait=threads.sleep).load(shard)
        settings = stage_settings(spec, self.artifact, forms_of(shard.graph))
        settings = msgspec.structs.replace(settings, run=spec.birth)  # drawn, in a process: here it is to be repeated
        bench = Bench(spec=spec, control=control, reporter=reporter, log=self.log, dial=self._dial, threads=threads)
        inbound = _Inbound(self._inbound)
        try:
            work(bench, _Spoilable(self.session, self), settings, inbound, self._begun)
        except ShoalError as error:
            reporter.tell(ShardState.FAILED, error)
            raise

    def _begun(self, loop: StageLoop) -> None:
        self.loop = loop

    def _dial(self, locators: Sequence[str]) -> Bus:
        if not locators:
            raise NodeUnreachableError("nobody is there to dial")
        bus = self.network.dial(self.host, locators[0], self.threads)
        self._buses.append(bus)
        return bus


@dataclass(frozen=True, slots=True)
class _Spoilable:
    """A session whose numbers are broken while its worker `spoils`."""

    session: NullSession
    worker: RehearsedWorker

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.step`."""
        outputs = self.session.step(sequences, tensors)
        return {name: np.full_like(array, np.nan) for name, array in outputs.items()} if self.worker.spoils else outputs

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Session.copy`."""
        self.session.copy(source, target, count)

    def release(self, slot: int) -> None:
        """See `Session.release`."""
        self.session.release(slot)

    def close(self) -> None:
        """See `Session.close`."""
        self.session.close()


class _Inbound:
    """`stage_work.Inbound` of a rehearsed session."""

    def __init__(self, session: Listening) -> None:
        self._session = session
        self.put = session.bus.put
        self.subscribe = session.bus.subscribe
        self.answer = session.bus.answer
        self.query = session.bus.query
        self.alive = session.bus.alive
        self.watch = session.bus.watch
        self.close = session.bus.close

    @property
    def locators(self) -> tuple[str, ...]:
        return (self._session.locator,)
