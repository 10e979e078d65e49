"""What a worker tells its agent about its shard, and on which keys they speak."""

import contextlib
import threading
from dataclasses import dataclass, field

import msgspec

from shoal.errors import ShardLostError, ShoalError
from shoal.fleet.report import ShardReport, ShardState, StepTimes
from shoal.ids import NodeId
from shoal.node.live_times import BusyShare
from shoal.node.messages import REPORT
from shoal.node.stage_loop import StageLoop
from shoal.node.wiring import Outcome
from shoal.node.worker_spec import WorkerSpec
from shoal.threads import Threads
from shoal.transport.bus import Bus
from shoal.transport.keys import WorkerTopic, key_of

_REPORT_EVERY_S = 0.5


@dataclass(slots=True)
class Reporter:
    """Tells the agent where the shard stands: on each change, when it begins or ceases to answer, and twice a second.

    If need be from a thread beside the loop: the agent takes a worker that says nothing for dead, and loading and steps may
    take longer than that.
    """

    spec: WorkerSpec
    control: Bus
    threads: Threads
    state: ShardState = ShardState.LOADING
    locators: tuple[str, ...] = ()
    wired_to: tuple[str, ...] = ()
    wired_birth: int = 0
    error: ShoalError | None = None
    next_node: NodeId | None = None
    rtt_s: float | None = None
    loop: StageLoop | None = None
    _step_times: StepTimes | None = None
    _busy: BusyShare = field(default_factory=BusyShare)
    _sent_s: float = float("-inf")
    _said_busy: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Report from now on, until closed."""
        self.threads.start("report", self._run)

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
            self.wired_to, self.wired_birth = () if alone else wiring.next_locators, outcome.birth
            self.state, self.error = ShardState.READY if outcome.error else ShardState.WIRED, outcome.error
            self._send()

    def remind(self) -> None:
        """Report again when the last report is old, or says busy of a shard that is idle or the reverse."""
        loop = self.loop
        busy = loop is not None and loop.live_requests + loop.waiting_requests > 0
        if busy is not self._said_busy or self.threads.now_s() - self._sent_s >= _REPORT_EVERY_S:
            with self._lock:
                self._send()

    def close(self) -> None:
        """Say no more."""
        self._ended.set()

    def _run(self) -> None:
        while not self.threads.wait(self._ended, _REPORT_EVERY_S / 2):
            with contextlib.suppress(ShoalError):  # of a session that is being closed
                self.remind()

    def _trouble(self) -> ShoalError | None:
        """What the loop sees go wrong: the fleet should plan anew, but if nobody does it may yet mend itself."""
        if self.loop is None or not self.loop.trouble:
            return None
        where = f"; the next stage is on node {self.next_node}" if self.next_node else ""
        return ShardLostError(f"{self.loop.trouble}{where}")

    def _spoiled(self) -> ShoalError | None:
        """What the stage before sends cannot be read, whatever it is asked."""
        if self.loop is None or self.loop.spoiled_by is None:
            return None
        return ShardLostError(f"stage {self.spec.shard.stage - 1} sends numbers that are not finite, of every request")

    def _send(self) -> None:
        loop, error, spoiled = self.loop, self.error or self._trouble(), self._spoiled()
        error = error or spoiled
        if loop is not None and self.spec.start < self.spec.stop:  # a relay's steps tell nothing of its device's blocks
            # The last that is known goes on being said: agents pass on only the newest report.
            self._step_times = loop.live.take_steps() or self._step_times
        report = ShardReport(
            shard=self.spec.shard,
            state=self.state,
            start=self.spec.start,
            stop=self.spec.stop,
            locators=self.locators,
            attempt=self.spec.attempt,
            birth=self.spec.birth,
            wired_to=self.wired_to,
            wired_birth=self.wired_birth,
            next_node=self.next_node,
            rtt_s=self.rtt_s,
            error_code=error.code if error else "",
            error=error.message if error else "",
            blames=self.spec.shard.stage - 1 if error is not None and error is spoiled else None,
            blamed_birth=(loop.spoiled_by or 0) if loop is not None else 0,
            steps=loop.steps if loop else 0,
            busy_s=loop.busy_s if loop else 0.0,
            busy_share=self._busy.seen(self.threads.now_s(), loop.worked_s) if loop else None,
            live_requests=loop.live_requests if loop else 0,
            waiting_requests=loop.waiting_requests if loop else 0,
            step_times=self._step_times,
            hop_times=loop.live.hop() if loop else None,
        )
        self.control.put(worker_key(self.spec, REPORT), msgspec.msgpack.encode(report))
        self._said_busy = report.live_requests + report.waiting_requests > 0
        self._sent_s = self.threads.now_s()


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
