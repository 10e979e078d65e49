"""Nodes that can be killed and come back at the address that the others know."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from bench.measure import child_environment
from bench.nodes import forget_deployments, wait_until, workers_of
from shoal.node.running import Running, running_file

_START_LIMIT_S = 90.0
_END_LIMIT_S = 10.0


@dataclass(slots=True)
class Machine:
    """A home that stays, and a process that comes and goes."""

    home: Path
    flags: tuple[str, ...]
    process: "subprocess.Popen[bytes] | None" = None
    running: Running | None = None

    def start(self) -> Running:
        """Start the node and wait until it says how it is reached; a second time at the same address."""
        flags = list(self.flags)
        if self.running is not None and "--listen" in flags:
            flags[flags.index("--listen") + 1] = self.running.locators[0].removeprefix("tcp/")
        running_file(self.home).unlink(missing_ok=True)
        with (self.home / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shoal", *flags],
                env={**child_environment(), "SHOAL_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        said = wait_until(self._told, f"node {self.home.name}", _START_LIMIT_S)
        assert isinstance(said, Running)
        self.running = said
        return said

    def workers(self) -> list[psutil.Process]:
        """Its worker processes; none while the node is down."""
        try:
            return [] if self.process is None or self.process.poll() is not None else workers_of(self.process.pid)
        except psutil.Error:
            return []

    def kill(self) -> None:
        """kill -9, its workers with it, as when the power goes."""
        assert self.process is not None
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        for worker in workers:
            _quietly(worker.kill)

    def end(self) -> None:
        if self.process is None:
            return
        workers = self.workers()
        self.process.terminate()
        try:
            self.process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for worker in workers:
            _quietly(worker.kill)

    def _told(self) -> Running | None:
        assert self.process is not None
        if self.process.poll() is not None:
            sys.exit(f"a node ended: {(self.home / 'node.log').read_text()[-2000:]}")
        try:
            return msgspec.json.decode(running_file(self.home).read_bytes(), type=Running)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None


@contextmanager
def machines(homes: Sequence[Path]) -> Iterator[list[Machine]]:
    """One node for each home; the first has the gateway, the others join it."""
    made: list[Machine] = []
    try:
        for number, home in enumerate(homes):
            home.mkdir(parents=True, exist_ok=True)
            forget_deployments(home)
            (home / "node.log").write_bytes(b"")
            common = ("--listen", "127.0.0.1:0", "--name", home.name, "--threads", "1")
            if number == 0:
                flags: tuple[str, ...] = ("up", "--port", "0", *common)
            else:
                first = made[0].running
                assert first is not None
                flags = ("join", first.locators[0].removeprefix("tcp/"), *common)
            made.append(Machine(home, flags))
            made[-1].start()
        yield made
    finally:
        for machine in reversed(made):
            machine.end()


@dataclass(slots=True)
class Misfortune:
    """What goes wrong next; the first node is spared, for it holds the gateway that is measured."""

    fleet: Sequence[Machine]
    chance: random.Random
    freeze_s: float = 5.0

    def strike(self) -> str:
        """One fault, and what it was."""
        kinds = (self._kill_worker, self._kill_worker, self._freeze_worker, self._kill_node)
        return self.chance.choice(kinds)()

    def _kill_worker(self) -> str:
        worker = self._worker()
        if worker is None:
            return "no worker to kill"
        _quietly(worker.kill)
        return "worker killed"

    def _freeze_worker(self) -> str:
        worker = self._worker()
        if worker is None:
            return "no worker to freeze"
        _quietly(lambda: worker.send_signal(signal.SIGSTOP))
        time.sleep(self.freeze_s)
        _quietly(lambda: worker.send_signal(signal.SIGCONT))
        return "worker frozen"

    def _kill_node(self) -> str:
        machine = self.chance.choice(self.fleet[1:])
        machine.kill()
        time.sleep(self.freeze_s)
        machine.start()
        return "node killed and started again"

    def _worker(self) -> psutil.Process | None:
        workers = [worker for machine in self.fleet for worker in machine.workers()]
        return self.chance.choice(workers) if workers else None


def _quietly(action: Callable[[], object]) -> None:
    """A process that is gone already needs no signal."""
    with suppress(psutil.Error):
        action()
