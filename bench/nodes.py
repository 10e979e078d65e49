"""Nodes to measure: real processes in homes of their own under `bench/results/tmp`, with the model imported once."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psutil

from bench.measure import MODEL, SCRATCH, Options, child_environment, ended
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import ShoalError
from shoal.fleet.state import Standing
from shoal.fleet.views import DeploymentState, DeploymentView
from shoal.node.importing import import_files
from shoal.node.pull import PullRequest, pull
from shoal.node.running import Running, running_file
from shoal.runtime.speculate.speculator import OFF, Speculation
from shoal.store.home import open_store

_START_LIMIT_S = 60.0
_LOAD_LIMIT_S = 180.0


def imported_home(options: Options, name: str = "home") -> Path:
    """A home that holds the model; cheap when it is there already."""
    if not options.gguf.exists():
        sys.exit(f"{options.gguf} is missing: run `make models`, or set SHOAL_TEST_MODELS")
    home = SCRATCH / name
    pull(open_store(home), PullRequest(reference=str(options.gguf), name=MODEL), import_files)
    return home


def forget_deployments(home: Path) -> None:
    """Let a node start with nothing to serve; models and profiles stay."""
    for path in home.glob("journal.db*"):
        path.unlink()


@contextmanager
def node(home: Path, command: Sequence[str]) -> Iterator[tuple[Running, subprocess.Popen[bytes]]]:
    """`shoal COMMAND...` in a process of its own, until it says how it is reached; its log is `node.log` in its home."""
    home.mkdir(parents=True, exist_ok=True)
    running_file(home).unlink(missing_ok=True)
    with (home / "node.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", *command],
            env={**child_environment(), "SHOAL_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        with ended(process):
            yield _running(home, process), process


def up(home: Path, *flags: str, threads: int = 1) -> Sequence[str]:
    """The command of a node with a gateway on free ports."""
    forget_deployments(home)
    return ["up", "--port", "0", "--listen", "127.0.0.1:0", "--name", home.name, "--threads", str(threads), *flags]


@contextmanager
def fleet_of(homes: Sequence[Path], *, threads: int = 1) -> Iterator[tuple[Shoal, Running, list[int]]]:
    """Nodes on loopback, the first with the gateway; gives the SDK, the first node and every node's process id."""
    first, *others = homes
    with ExitStack() as stack:
        running, process = stack.enter_context(node(first, up(first, threads=threads)))
        pids = [process.pid]
        address = running.locators[0].removeprefix("tcp/")
        for home in others:
            forget_deployments(home)
            flags = ["join", address, "--name", home.name, "--threads", str(threads)]
            pids.append(stack.enter_context(node(home, flags))[1].pid)
        shoal = stack.enter_context(Shoal(running.url, timeout_s=300.0))
        wait_until(lambda: alive(shoal) == len(homes), "all nodes alive", _START_LIMIT_S)
        yield shoal, running, pids


def deploy(shoal: Shoal, name: str, wanted: PlanOptions, *, speculation: Speculation = OFF) -> DeploymentView:
    """Deploy the model as *name* and wait until it serves; plain decoding unless *speculation* says more."""
    shoal.deploy(MODEL, name=name, speculation=speculation, **wanted)

    def ready() -> DeploymentView | None:
        found = next((d for d in shoal.deployments() if d.name == name), None)
        if found is not None and found.state is DeploymentState.FAILED:
            sys.exit(f"{name} cannot be served: {found.detail}")
        return found if found is not None and found.state is DeploymentState.READY else None

    view = wait_until(ready, f"{name} ready", _LOAD_LIMIT_S)
    assert isinstance(view, DeploymentView)
    return view


def workers_of(node_pid: int) -> list[psutil.Process]:
    """The worker processes of a node, oldest first."""
    children = psutil.Process(node_pid).children()
    return sorted((p for p in children if "shoal.node.worker" in _command(p)), key=lambda p: p.create_time())


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def alive(shoal: Shoal) -> int:
    try:
        return sum(node.standing is Standing.ALIVE for node in shoal.nodes())
    except ShoalError:
        return 0  # the coordinator has not spoken yet


def _running(home: Path, process: subprocess.Popen[bytes]) -> Running:
    def told() -> Running | None:
        if process.poll() is not None:
            sys.exit(f"a node ended: {(home / 'node.log').read_text().strip()}")
        try:
            return msgspec.json.decode(running_file(home).read_bytes(), type=Running)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    said = wait_until(told, f"node {home.name}", _START_LIMIT_S)
    assert isinstance(said, Running)
    return said


def wait_until(asked: Callable[[], object], what: str, limit_s: float, *, every_s: float = 0.05) -> object:
    """The first true answer of *asked*; ends the benchmark when none comes."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < limit_s:
        found = asked()
        if found:
            return found
        time.sleep(every_s)
    sys.exit(f"{what}: not within {limit_s:.0f} s")
