"""The process that relays: for each spec on its input one more relay, and its end when the input closes or a relay fails."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import msgspec
import pytest

from shoal.fleet.report import ShardId, ShardReport, ShardState
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.messages import REPORT
from shoal.node.reporter import worker_key
from shoal.node.worker_spec import WorkerSpec
from shoal.transport.zenoh import ZenohBus, open_agent

NODE = NodeId("n" * 32)
STAGES = 5


def spec(stage: int, agent: ZenohBus, listen: str = "tcp/127.0.0.1:0") -> WorkerSpec:
    return WorkerSpec(
        fleet="f", node=NODE, home="", agent_locator=agent.locators[0], data_listen=listen,
        shard=ShardId(deployment=DeploymentId("m"), plan_epoch=1, stage=stage), stages=STAGES, manifest=Digest("d"),
        start=2, stop=2, slots=2, context_tokens=64, in_flight=2, threads=1,
    )  # fmt: skip


@pytest.fixture
def agent() -> Iterator[ZenohBus]:
    bus = open_agent(("tcp/127.0.0.1:0",), (), discover=False)
    yield bus
    bus.close()


@contextmanager
def relaying(*specs: WorkerSpec) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-m", "shoal.node.relay"], stdin=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            for one in specs:
                process.stdin.write(msgspec.json.encode(one) + b"\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()


def heard(agent: ZenohBus, stage: int) -> "SimpleQueue[ShardReport]":
    reports: SimpleQueue[ShardReport] = SimpleQueue()
    agent.subscribe(
        worker_key(spec(stage, agent), REPORT),
        lambda sample: reports.put(msgspec.msgpack.decode(sample.payload, type=ShardReport)),
    )
    return reports


def until(reports: "SimpleQueue[ShardReport]", state: ShardState) -> ShardReport:
    while True:
        try:
            found = reports.get(timeout=30)
        except Empty:
            pytest.fail(f"no report of a relay that is {state}")
        if found.state is state:
            return found


def test_two_relays_of_one_process_listen_each_for_itself_and_end_with_its_input(agent: ZenohBus) -> None:
    ears = [heard(agent, stage) for stage in (1, 3)]

    with relaying(spec(1, agent), spec(3, agent)) as process:
        ready = [until(reports, ShardState.READY) for reports in ears]
        assert [report.shard.stage for report in ready] == [1, 3]
        assert all((report.start, report.stop) == (2, 2) for report in ready)
        assert ready[0].locators
        assert ready[1].locators
        assert ready[0].locators != ready[1].locators

        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_relay_that_cannot_listen_says_so_and_ends_them_all(agent: ZenohBus) -> None:
    fine, broken = heard(agent, 1), heard(agent, 3)

    with relaying(spec(1, agent)) as process:
        until(fine, ShardState.READY)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec(3, agent, "tcp/192.0.2.1:0")) + b"\n")
        process.stdin.flush()

        assert until(broken, ShardState.FAILED).error
        assert process.wait(30) == 1
