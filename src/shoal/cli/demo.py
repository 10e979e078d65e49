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

from shoal.cli import demo_weather
from shoal.cli.chat import INTERRUPTED, LENGTH, Piece, show, stream
from shoal.cli.connect import DEMO_GATEWAY, demo_home
from shoal.cli.deploy import curl_line, deploy_and_wait, have_model, show_plan
from shoal.cli.nodes import render_nodes
from shoal.cli.profile_table import render_speeds
from shoal.client import Shoal
from shoal.client.calls import PlanOptions, ServeOptions
from shoal.errors import NodeUnreachableError, SettingsError, ShoalError
from shoal.fleet.state import Standing
from shoal.ids import NodeId
from shoal.node.running import Running, running_file, running_node
from shoal.node.settings import read_settings
from shoal.plan.problem import Estimate, Plan, RequestShape
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import OFF
from shoal.trust.identity import load_or_create, node_id

MODEL = "smollm2-135m"
QUESTION = "Why is the sky blue? Answer in two sentences."
ANSWER_TOKENS = 64
FAR_OFF = 0.25
_START_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Device:
    """One emulated machine."""

    name: str
    memory: str
    slowdown: float


DEVICES = (Device(DEMO_GATEWAY, "220MiB", 2.0), Device("box", "200MiB", 1.0), Device("board", "200MiB", 4.0))
LINKS = {("gateway", "box"): "4ms,100mbit", ("gateway", "board"): "2ms,50mbit", ("box", "board"): "8ms,20mbit"}
SHAPE = RequestShape(tokens_in=48, tokens_out=ANSWER_TOKENS, context_tokens=1024, slots=1)


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the answer.")] = False,
    port: Annotated[int, typer.Option(help="Port of the gateway; 0 takes any free one.", min=0, max=65535)] = 0,
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure devices and links again.")] = False,
    slow: Annotated[
        list[str] | None,
        typer.Option("--slow", help="Of the demo that runs: slow a device down, as in box=6; may be repeated."),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="Of the demo that runs: change a link, as in gateway:box=40ms,10mbit; may be repeated."),
    ] = None,
    restore: Annotated[bool, typer.Option("--restore", help="Of the demo that runs: all as at its start.")] = False,
) -> None:
    """Three unequal nodes on this machine answer through one pipeline; --slow and --link change them while they do."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # else a closed terminal would leave three nodes behind
        signal.signal(number, _end)
    console = Console()
    homes = {device.name: demo_home(device.name) for device in DEVICES}
    if slow or link or restore:
        demo_weather.change(homes, slow or (), link or (), restore=restore)
        return
    settings = msgspec.structs.replace(read_settings(), home=str(homes["gateway"]))
    console.print(Rule("1. the model", align="left"))
    have_model(MODEL, settings, Console(stderr=True))
    console.print(f"{MODEL} is on node gateway; the others will fetch only the blocks that they run")
    demo_weather.clear(homes)
    with ExitStack() as stack:
        url = _start(homes, port, stack)
        shoal = stack.enter_context(Shoal(url))
        _wait_for_nodes(shoal)
        _stop_what_was_left(shoal)
        console.print(Rule("2. three unequal nodes", align="left"))
        wanted = PlanOptions(shape=SHAPE)
        with console.status("measuring each device and link on the model's own blocks (some seconds)"):
            profile = shoal.profile(MODEL, refresh=refresh)
        machines = sorted(shoal.nodes(), key=lambda node: list(homes).index(node.name))
        console.print(render_nodes(machines))
        console.print()
        console.print(render_speeds(profile, {node.id: node.name for node in machines}))
        console.print(Rule("3. the plan, before anything is loaded", align="left"))
        plan = show_plan(shoal, MODEL, wanted, console)
        console.print(Rule("4. an answer through the pipeline", align="left"))
        served = ServeOptions(speculation=OFF, recovery=Recovery.EXACT, on_demand=False, keep_alive_s=None, **wanted)
        deploy_and_wait(shoal, MODEL, MODEL, served, console)
        for _ in _ask(url, "Hello", []):
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


def _stop_what_was_left(shoal: Shoal) -> None:
    """A node serves again what it served before: after a demo that was cut short, nothing would be loaded before our eyes."""
    for deployment in shoal.deployments():
        shoal.stop(deployment.name)
    began_s = time.monotonic()
    while any(node.memory_promised_bytes for node in shoal.nodes()) and time.monotonic() - began_s < _START_LIMIT_S:
        time.sleep(0.1)


def _ask(url: str, question: str, arrived_s: list[float]) -> Iterator[Piece]:
    """Pieces of the answer; the seconds from the request to each that has text are added to *arrived_s*."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
    }
    began_s = time.monotonic()
    for piece in stream(url, body):
        if piece.text:
            arrived_s.append(time.monotonic() - began_s)
        yield piece


def _show_answer(console: Console, url: str, question: str, plan: Plan) -> None:
    console.print(f"[bold cyan]> {question}[/]")
    times_s: list[float] = []
    answer = show(_ask(url, question, times_s), console)
    if answer.finish == INTERRUPTED:
        raise KeyboardInterrupt
    if answer.finish == LENGTH:
        console.print(f"[dim]... ({ANSWER_TOKENS} tokens, the limit)[/]")
    first_s = times_s[0] if times_s else 0.0
    per_token_s = (times_s[-1] - first_s) / max(1, len(times_s) - 1) if times_s else 0.0
    console.print(f"\n{compare(plan.estimate, first_s, per_token_s)}, through {len(plan.stages)} nodes")
    console.print(missed(plan.estimate, first_s, per_token_s), highlight=False)
    if far_off(plan.estimate, first_s, per_token_s):
        console.print(
            f"[yellow]more than {FAR_OFF:.0%} apart[/]: other load while measuring, or now? "
            "`shoal demo --refresh` measures again",
            highlight=False,
        )


def compare(predicted: Estimate, first_s: float, per_token_s: float) -> str:
    """Predicted above measured."""
    rows = (
        ("predicted", predicted.time_to_first_token_s, predicted.time_per_output_token_s),
        ("measured ", first_s, per_token_s),
    )
    return "\n".join(
        f"[bold]{name}[/] {first * 1000:6.0f} ms to the first token, {each * 1000:5.1f} ms per token"
        for name, first, each in rows
    )


def missed(predicted: Estimate, first_s: float, per_token_s: float) -> str:
    """The errors in one line."""
    pairs = ((predicted.time_to_first_token_s, first_s), (predicted.time_per_output_token_s, per_token_s))
    first, each = (f"{abs(said - took) / took:.0%}" if took else "-" for said, took in pairs)
    return f"missed by {first} and {each}; `shoal ps` shows the median over all requests"


def far_off(predicted: Estimate, first_s: float, per_token_s: float) -> bool:
    """Whether a figure is so far from what was predicted that something else must have run meanwhile."""
    pairs = ((predicted.time_to_first_token_s, first_s), (predicted.time_per_output_token_s, per_token_s))
    return any(abs(measured - expected) > FAR_OFF * expected for expected, measured in pairs)


def _stay(console: Console, url: str) -> None:
    console.print(f"\nThe service stays up at {url}/v1 until Ctrl-C. Try:")
    console.print(curl_line(url, MODEL), soft_wrap=True, highlight=False)
    console.print(f"SHOAL_URL={url} shoal chat", highlight=False)
    console.print(
        "shoal demo --slow box=6 (in another terminal; the deployment moves, see `shoal ps`)", highlight=False
    )
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print("\nstopping")
