"""shoal demo: three unequal nodes on this machine answer through one pipeline, predicted against measured.

Real nodes in real processes on loopback; only their inequality is emulated: an engine wrapper makes two of them slower, a bus
wrapper gives the links between them latency and a rate.  Each may use less memory than the model needs, so the plan has to cut.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.rule import Rule

from shoal.cli.chat import stream
from shoal.cli.deploy import curl_line, deploy_and_wait, have_model, show_plan
from shoal.cli.nodes import render_nodes
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import NodeUnreachableError, SettingsError, ShoalError
from shoal.fleet.state import Standing
from shoal.ids import NodeId
from shoal.node.assemble import Running, running_file, running_node
from shoal.node.settings import read_settings
from shoal.plan.problem import Plan, RequestShape
from shoal.trust.identity import load_or_create, node_id

MODEL = "smollm2-135m"
QUESTION = "Why is the sky blue? Answer in two sentences."
ANSWER_TOKENS = 64
_START_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Device:
    """One emulated machine."""

    name: str
    memory: str
    slowdown: float


DEVICES = (Device("gateway", "220MiB", 2.0), Device("box", "200MiB", 1.0), Device("board", "200MiB", 4.0))
LINKS = {("gateway", "box"): "4ms,100mbit", ("gateway", "board"): "2ms,50mbit", ("box", "board"): "8ms,20mbit"}
SHAPE = RequestShape(tokens_in=48, tokens_out=ANSWER_TOKENS, context_tokens=1024, slots=1)


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the answer.")] = False,
    port: Annotated[int, typer.Option(help="Port of the gateway; 0 takes any free one.", min=0, max=65535)] = 0,
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
) -> None:
    """Three unequal nodes on this machine answer through one pipeline."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # else a closed terminal would leave three nodes behind
        signal.signal(number, _end)
    console = Console()
    base = Path(read_settings().home) / "demo"
    homes = {device.name: base / device.name for device in DEVICES}
    settings = msgspec.structs.replace(read_settings(), home=str(homes["gateway"]))
    console.print(Rule("1. the model", align="left"))
    have_model(MODEL, settings, Console(stderr=True))
    console.print(f"{MODEL} is on node gateway; the others will fetch only the blocks that they run")
    with ExitStack() as stack:
        url = _start(homes, port, stack)
        shoal = stack.enter_context(Shoal(url))
        _wait_for_nodes(shoal)
        console.print(Rule("2. three unequal nodes", align="left"))
        wanted = PlanOptions(shape=SHAPE)
        with console.status("measuring each device and link on the model's own blocks (some seconds)"):
            shoal.plan(MODEL, **wanted)
        console.print(render_nodes(shoal.nodes()))
        console.print(Rule("3. the plan, before anything is loaded", align="left"))
        plan = show_plan(shoal, MODEL, wanted, console)
        console.print(Rule("4. an answer through the pipeline", align="left"))
        deploy_and_wait(shoal, MODEL, MODEL, wanted, console)
        for _ in _ask(url, "Hello"):
            pass  # the first request pays for cold caches; it is not the one that is measured
        _show_answer(console, url, question, plan)
        if not once:
            _stay(console, url)


def _start(homes: Mapping[str, Path], port: int, stack: ExitStack) -> str:
    """Start the nodes; they end with *stack*."""
    ids = {name: node_id(load_or_create(home / "node.key").public_key()) for name, home in homes.items()}
    first, *others = DEVICES
    flags = ["up", "--port", str(port), "--listen", "127.0.0.1:0", *_flags(first, ids)]
    process = stack.enter_context(_process(flags, homes[first.name]))
    gateway = _wait_for(homes[first.name], process)
    address = gateway.locators[0].removeprefix("tcp/")
    for device in others:
        stack.enter_context(_process(["join", address, *_flags(device, ids)], homes[device.name]))
    return gateway.url


def _flags(device: Device, ids: Mapping[str, NodeId]) -> list[str]:
    flags = ["--name", device.name, "--memory", device.memory, "--threads", "1", "--slowdown", str(device.slowdown)]
    for (one, other), link in LINKS.items():
        if device.name in {one, other}:
            flags += ["--link", f"{ids[other if device.name == one else one]}={link}"]
    return flags


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _process(flags: list[str], home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node in a process of its own; its log goes to `node.log` in its home."""
    home.mkdir(parents=True, exist_ok=True)
    if running_node(home) is not None:
        raise SettingsError(
            f"a demo runs already: its node has home {home}", hint="end it with Ctrl-C, or choose another SHOAL_HOME"
        )
    running_file(home).unlink(missing_ok=True)
    with (home / "node.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", *flags],
            env={**os.environ, "SHOAL_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(home: Path, process: subprocess.Popen[bytes]) -> Running:
    """Until the node at *home* says how it is reached; raises NodeUnreachableError when it ended or keeps silent."""
    began_s = time.monotonic()
    while process.poll() is None and time.monotonic() - began_s < _START_LIMIT_S:
        try:
            return msgspec.json.decode(running_file(home).read_bytes(), type=Running)
        except (FileNotFoundError, msgspec.MsgspecError):
            time.sleep(0.05)
    log = (home / "node.log").read_text().strip()
    raise NodeUnreachableError(
        f"a demo node did not start: {log or 'no word from it'}", hint=f"see {home / 'node.log'}"
    )


def _wait_for_nodes(shoal: Shoal) -> None:
    began_s = time.monotonic()
    while time.monotonic() - began_s < _START_LIMIT_S:
        try:
            alive = [node for node in shoal.nodes() if node.standing is Standing.ALIVE]
            if len(alive) == len(DEVICES):
                return
        except ShoalError:
            pass  # the coordinator has not spoken yet
        time.sleep(0.1)
    raise NodeUnreachableError(f"not all {len(DEVICES)} demo nodes joined within {_START_LIMIT_S:.0f} s")


def _ask(url: str, question: str) -> Iterator[tuple[str, float]]:
    """Pieces of the answer, each with the seconds since the request."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
    }
    began_s = time.monotonic()
    for piece in stream(url, body):
        yield piece, time.monotonic() - began_s


def _show_answer(console: Console, url: str, question: str, plan: Plan) -> None:
    console.print(f"[bold cyan]> {question}[/]")
    times_s: list[float] = []
    for piece, at_s in _ask(url, question):
        times_s += [at_s] if piece else []
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n\n")
    predicted = plan.estimate
    steps = max(1, len(times_s) - 1)
    per_token_s = (times_s[-1] - times_s[0]) / steps if times_s else 0.0
    console.print(
        f"[bold]predicted[/] {predicted.time_to_first_token_s * 1000:6.0f} ms to the first token, "
        f"{predicted.time_per_output_token_s * 1000:5.1f} ms per token"
    )
    console.print(
        f"[bold]measured [/] {times_s[0] * 1000 if times_s else 0:6.0f} ms to the first token, "
        f"{per_token_s * 1000:5.1f} ms per token, through {len(plan.stages)} nodes"
    )


def _stay(console: Console, url: str) -> None:
    console.print(f"\nThe service stays up at {url}/v1 until Ctrl-C. Try:")
    console.print(curl_line(url, MODEL), soft_wrap=True, highlight=False)
    console.print(f"SHOAL_URL={url} shoal chat", highlight=False)
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print("\nstopping")
