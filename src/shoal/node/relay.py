"""The process that relays: every stage without blocks that one plan has on this node (ADR 17).

The planner counts one process for all that goes through a device, so there is one.  Each line on standard input is the spec of
a further relay, which works on a thread of its own with its own data session.  They are of one plan: what breaks one breaks the
plan, and so ends the process, which every agent sees and reports.  It reads no model and holds no engine; like any worker, it
ends when its input closes.
"""

import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.errors import ShoalError
from shoal.fleet.report import ShardState
from shoal.node.reporter import Reporter
from shoal.node.stage_loop import StageLoop, Stopped
from shoal.node.stage_work import Bench, listen, work
from shoal.node.worker_spec import WorkerSpec
from shoal.observe.log import set_up_logs
from shoal.runtime.backend.passing import PassingSession
from shoal.runtime.settings import StageSettings
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus
from shoal.transport.zenoh import open_control

_STOP_S = 2.5


@dataclass(slots=True)
class Relays:
    """The relays of a process; used by one thread."""

    control: Bus
    log: FilteringBoundLogger
    loops: list[StageLoop] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, spec: WorkerSpec) -> None:
        """Relay for one more hop."""
        self.threads.append(threading.Thread(target=self._relay, args=(spec,), name=f"relay-{spec.shard}", daemon=True))
        self.threads[-1].start()

    def stop(self) -> None:
        """Let every loop end; those who wait for an answer are told."""
        for loop in self.loops:
            loop.inbox.put(Stopped())
        for thread in self.threads:
            thread.join(_STOP_S / len(self.threads))

    def _relay(self, spec: WorkerSpec) -> None:
        reporter = Reporter(spec=spec, control=self.control, threads=SystemThreads())
        reporter.start()
        try:
            bench = Bench(spec=spec, control=self.control, reporter=reporter, log=self.log)
            work(bench, PassingSession(), relay_settings(spec), listen(spec.data_listen), self.loops.append)
        except Exception as error:  # noqa: BLE001 whatever it is, the plan of all these relays is broken by it
            said = error if isinstance(error, ShoalError) else ShoalError(f"{type(error).__name__}: {error}")
            self.log.error("relay.failed", shard=str(spec.shard), error=str(said))  # noqa: TRY400 as in a worker
            reporter.tell(ShardState.FAILED, said)
            self.control.close()  # with what was just said
            _end(1)


def relay_settings(spec: WorkerSpec) -> StageSettings:
    """The machine's settings for a stage that knows no model: it takes any tensors and any token ids."""
    return StageSettings(
        plan_epoch=spec.shard.plan_epoch,
        index=spec.shard.stage,
        stages=spec.stages,
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        birth=spec.birth,
        recovery=spec.recovery,
        activations=spec.activations,
    )


def relay_all(lines: Iterable[str], log: FilteringBoundLogger) -> None:
    """Relay for each spec that comes, until no more do."""
    relays: Relays | None = None
    for line in lines:
        spec = msgspec.json.decode(line, type=WorkerSpec)
        relays = relays or Relays(open_control(spec.agent_locator), log)
        relays.begin(spec)
    if relays is not None:
        relays.stop()
        relays.control.close()


def main() -> None:
    """Entry point of the process."""
    log = set_up_logs(sys.stderr)
    try:
        relay_all(sys.stdin, log)
    except ShoalError as error:
        log.error("relay.failed", error=str(error))  # noqa: TRY400 the error says it all; a traceback helps nobody
        _end(1)
    _end(0)


def _end(code: int) -> None:
    """At once: threads of the fabric would keep an interpreter that shuts down waiting."""
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
