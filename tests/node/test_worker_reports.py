"""What a worker tells its agent, and when."""

from collections.abc import Callable
from queue import Empty, SimpleQueue

import msgspec
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import ManualClock
from shoal.fleet.report import ShardId, ShardReport, ShardState
from shoal.ids import DeploymentId, Digest, NodeId, RequestId
from shoal.node.messages import REPORT
from shoal.node.reporter import Reporter, worker_key
from shoal.node.stage_loop import StageLoop
from shoal.node.worker_spec import WorkerSpec
from shoal.runtime.ports import SequenceStep
from shoal.runtime.settings import StageSettings
from shoal.transport.memory import MemoryBus

SHARD = ShardId(deployment=DeploymentId("chat"), plan_epoch=1, stage=0)
SPEC = WorkerSpec(
    fleet="f", node=NodeId("n" * 32), home="", agent_locator="", data_listen="", shard=SHARD, stages=1,
    manifest=Digest("d"), start=0, stop=1, slots=1, context_tokens=16, in_flight=1, threads=1,
)  # fmt: skip


class Idle:
    """An engine that is not asked for anything here."""

    def step(self, sequences: object, tensors: object) -> dict[str, object]:
        raise AssertionError

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...


def test_a_shard_that_begins_or_ceases_to_answer_says_so_at_once_and_else_twice_a_second(
    bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger
) -> None:
    bus, clock = bus_of("node"), ManualClock(100)
    reporter = Reporter(spec=SPEC, control=bus, threads=clock)  # type: ignore[arg-type] time is all that it asks for here
    settings = StageSettings(
        plan_epoch=1, index=0, stages=1, slots=1, context_tokens=16, vocabulary=8, eos_token_ids=()
    )
    loop = reporter.loop = StageLoop("f", SHARD, settings, Idle(), bus, bus, clock, reporter.remind, log)  # type: ignore[arg-type]
    heard: SimpleQueue[ShardReport] = SimpleQueue()
    bus.subscribe(
        worker_key(SPEC, REPORT), lambda sample: heard.put(msgspec.msgpack.decode(sample.payload, type=ShardReport))
    )

    def told() -> int:
        return heard.get(timeout=5).live_requests

    def nothing_told() -> bool:
        bus.put(
            worker_key(SPEC, REPORT),
            msgspec.msgpack.encode(ShardReport(shard=SHARD, state=ShardState.FAILED, start=0, stop=1)),
        )
        return heard.get(timeout=5).state is ShardState.FAILED

    reporter.tell(ShardState.WIRED)
    assert told() == 0
    loop.live_requests = 1
    reporter.remind()
    assert told() == 1
    loop.live_requests = 2
    reporter.remind()
    assert nothing_told(), "two are no news after one"
    loop.live_requests = 0
    reporter.remind()
    assert told() == 0
    clock.advance(0.49)
    reporter.remind()
    assert nothing_told()
    clock.advance(0.02)
    reporter.remind()
    assert told() == 0
    with pytest.raises(Empty):
        heard.get_nowait()


@pytest.mark.parametrize(("stop", "told"), [(1, True), (0, False)], ids=["a shard", "a relay"])
def test_step_times_are_told_of_blocks_and_not_of_what_only_passes(
    bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger, stop: int, told: bool
) -> None:
    bus, clock, spec = bus_of("node"), ManualClock(100), msgspec.structs.replace(SPEC, stop=stop)
    reporter = Reporter(spec=spec, control=bus, threads=clock)  # type: ignore[arg-type] as above
    settings = StageSettings(plan_epoch=1, index=0, stages=1)
    loop = reporter.loop = StageLoop("f", SHARD, settings, Idle(), bus, bus, clock, reporter.remind, log)  # type: ignore[arg-type]
    heard: SimpleQueue[ShardReport] = SimpleQueue()
    bus.subscribe(
        worker_key(SPEC, REPORT), lambda sample: heard.put(msgspec.msgpack.decode(sample.payload, type=ShardReport))
    )

    loop.live.stepped([SequenceStep(request=RequestId("r"), slot=0, start=4, count=1, logits=1)], 0.01)
    reporter.tell(ShardState.WIRED)

    assert (heard.get(timeout=5).step_times is not None) is told
