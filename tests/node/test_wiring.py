"""The way out of a stage: who is dialled, when it counts, and what is said when it cannot be made."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.errors import NodeUnreachableError
from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.stage_keys import submit_topic
from shoal.node.stage_loop import StageLoop, Stopped
from shoal.node.wiring import Outcome, Wirer
from shoal.node.worker_spec import Wiring, WorkerSpec
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.settings import StageSettings
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus, Sample
from shoal.transport.keys import key_of
from shoal.transport.memory import MemoryBus, MemoryFabric

FLEET, ME, NEXT = "f", NodeId("m" * 32), NodeId("n" * 32)
SHARDS = [ShardId(deployment=DeploymentId("m"), plan_epoch=1, stage=stage) for stage in (0, 1)]
Attach = Callable[[str], MemoryBus]


@dataclass
class Line:
    """Two stages at work and the wirer of the first; data travels on a fabric of its own."""

    data: MemoryFabric
    loops: list[StageLoop]
    outcomes: SimpleQueue[Outcome] = field(default_factory=SimpleQueue)
    dialled: list[str] = field(default_factory=list)
    ways: list[MemoryBus] = field(default_factory=list)
    refuse: Exception | None = None

    def dial(self, locators: Sequence[str]) -> Bus:
        self.dialled.append(*locators)
        if self.refuse is not None:
            raise self.refuse
        self.ways.append(self.data.attach(f"way{len(self.dialled)}"))
        return self.ways[-1]

    def outcome(self) -> Outcome:
        return self.outcomes.get(timeout=10)


def wiring(locator: str = "tcp/next:1") -> Wiring:
    return Wiring(shard=SHARDS[0], next_node=NEXT, next_locators=(locator,))


def order(of: Wiring) -> Sample:
    return Sample(key="k", payload=msgspec.msgpack.encode(of))


@contextmanager
def line(bus_of: Attach, log: FilteringBoundLogger) -> Iterator[Line]:
    data, loops, threads = MemoryFabric(), [], []
    with ExitStack() as stack:
        for stage, shard in enumerate(SHARDS):
            inbound = data.attach(f"in{stage}")
            stack.callback(inbound.close)
            piece = null_shard(3 * stage, 3 * stage + 3, embeds=not stage, vocabulary=64 * stage)
            settings = StageSettings(plan_epoch=1, index=stage, stages=2, slots=2, context_tokens=256, vocabulary=64)
            control = bus_of(f"worker{stage}")
            session = NullBackend().load(piece)
            loops.append(
                StageLoop(FLEET, shard, settings, session, control, inbound, SystemThreads(), lambda: None, log)
            )
            loops[-1].listen(key_of(submit_topic(FLEET, ME, shard)))
            threads.append(threading.Thread(target=loops[-1].run))
            threads[-1].start()
        made = Line(data, loops)
        yield made
        for loop, thread in zip(loops, threads, strict=True):
            loop.inbox.put(Stopped())
            thread.join(10)
        for way in made.ways:
            way.close()


@contextmanager
def wirer_of(made: Line, log: FilteringBoundLogger, *, unreached_s: float = 10.0, stages: int = 2) -> Iterator[Wirer]:
    spec = WorkerSpec(
        fleet=FLEET, node=ME, home="", agent_locator="", data_listen="", shard=SHARDS[0], stages=stages,
        manifest=Digest("d"), start=0, stop=3, slots=2, context_tokens=256, in_flight=1, threads=1,
    )  # fmt: skip
    wirer = Wirer(
        spec=spec, loop=made.loops[0], dial=made.dial, shape=lambda bus, _: bus, told=made.outcomes.put, log=log,
        threads=SystemThreads(),
        unreached_s=unreached_s,
    )  # fmt: skip
    yield wirer
    wirer.close()


def is_open(bus: MemoryBus) -> bool:
    try:
        bus.put("x", b"")
    except NodeUnreachableError:
        return False
    return True


def test_a_way_counts_as_wired_when_the_next_stage_has_answered_over_it(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    with line(bus_of, log) as made, wirer_of(made, log) as wirer:
        for _ in range(3):
            wirer.on_wire(order(wiring()))
        outcome = made.outcome()

        assert outcome.error is None
        assert outcome.rtt_s is not None
        assert outcome.rtt_s > 0
        assert made.dialled == ["tcp/next:1"], "the same order again changes nothing"


@pytest.mark.slow
def test_half_a_link_does_not_count_and_is_wired_when_the_other_half_is_there(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    with line(bus_of, log) as made, wirer_of(made, log, unreached_s=0.0) as wirer:
        made.data.partition("in1", "way1")
        wirer.on_wire(order(wiring()))

        outcome = made.outcome()

        assert outcome.error is not None
        assert "hello" in outcome.error.message
        assert made.outcome().error is None, "the second dial has a link of its own"
        assert [is_open(way) for way in made.ways] == [False, True]


def test_a_stage_that_cannot_be_dialled_is_named_with_both_nodes_and_where_and_tried_again(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    with line(bus_of, log) as made, wirer_of(made, log, unreached_s=0.3) as wirer:
        made.refuse = NodeUnreachableError("nothing answers")
        wirer.on_wire(order(wiring()))
        error = made.outcome().error

        assert error is not None
        assert error.code == "node_unreachable"
        assert all(word in error.message for word in (ME, NEXT, "tcp/next:1", "nothing answers"))
        assert "--listen" in error.hint
        assert len(made.dialled) > 1

        made.refuse = None
        while made.outcomes.get(timeout=10).error is not None:
            pass


def test_whatever_goes_wrong_in_a_dial_the_next_order_is_followed(bus_of: Attach, log: FilteringBoundLogger) -> None:
    with line(bus_of, log) as made, wirer_of(made, log) as wirer:
        made.refuse = OSError("too many open files")
        wirer.on_wire(Sample(key="k", payload=b"garbage"))
        wirer.on_wire(order(wiring("tcp/old:1")))
        while not made.dialled:
            threading.Event().wait(0.01)
        made.refuse = None
        wirer.on_wire(order(wiring("tcp/new:1")))

        outcome = made.outcome()
        assert (outcome.error, outcome.wiring.next_locators) == (None, ("tcp/new:1",))


def test_the_old_way_is_closed_when_a_new_one_has_replaced_it(bus_of: Attach, log: FilteringBoundLogger) -> None:
    with line(bus_of, log) as made, wirer_of(made, log) as wirer:
        for locator in ("tcp/old:1", "tcp/new:1"):
            wirer.on_wire(order(wiring(locator)))
            assert made.outcome().error is None
        until = threading.Event()
        while is_open(made.ways[0]):
            until.wait(0.01)

        assert is_open(made.ways[1])


def test_an_order_back_to_the_way_that_is_there_is_told_as_made_without_another_dial(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    with line(bus_of, log) as made, wirer_of(made, log, unreached_s=0.0) as wirer:
        wirer.on_wire(order(wiring("tcp/there:1")))
        first = made.outcome()
        made.refuse = NodeUnreachableError("nothing answers")
        wirer.on_wire(order(wiring("tcp/away:1")))
        assert made.outcome().error is not None
        wirer.on_wire(order(wiring("tcp/there:1")))

        while (outcome := made.outcome()).error is not None:
            pass
        assert outcome == first
        assert made.dialled.count("tcp/there:1") == 1
        assert is_open(made.ways[0])


def test_a_stage_alone_is_wired_without_dialling_anybody(bus_of: Attach, log: FilteringBoundLogger) -> None:
    with line(bus_of, log) as made, wirer_of(made, log, stages=1) as wirer:
        wirer.on_wire(order(wiring()))

        outcome = made.outcome()
        assert (outcome.error, outcome.rtt_s, made.dialled) == (None, None, [])
