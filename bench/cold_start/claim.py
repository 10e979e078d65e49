"""How long until a model that is here answers: with a node that runs already, and with one command from nothing.

The profile is cached and the plan known, as they are for every start but the first; that one is shown beside it.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from bench.measure import MODEL, Cell, Finding, Options, SkippedError, Values, spread, values_of
from bench.nodes import deploy, fleet_of, forget_deployments, imported_home, node, wait_until
from shoal.cli.chat import stream
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import ShoalError
from shoal.fleet.views import DeploymentState
from shoal.node.options import DEFAULT_HTTP_PORT
from shoal.plan.problem import RequestShape

NAME = "cold_start"
TITLE = "Cold start: from the request to serve an imported model to its first token"
GOAL_S = 5.0
_WANTED = PlanOptions(shape=RequestShape(context_tokens=2048, slots=2))
_QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 8, "temperature": 0}


def cells(options: Options) -> list[Cell]:
    count = 2 if options.quick else 5
    return [
        Cell(name="deploy", measure=lambda: _deploy(imported_home(options), count)),
        Cell(name="command", measure=lambda: _command(imported_home(options), count)),
    ]


def _deploy(home: Path, count: int) -> Values:
    """Deploy to a running node; the first time also measures the model's blocks."""
    for path in (home / "profiles").glob("*.json"):
        path.unlink()
    parts: list[dict[str, float]] = []
    with fleet_of((home,), threads=0) as (shoal, running, _):
        for number in range(count + 1):
            began_s = time.monotonic()
            deploy(shoal, f"cold-{number}", _WANTED)
            ready_s = time.monotonic() - began_s
            _first_token(running.url, f"cold-{number}")
            parts.append({"ready_s": ready_s, "first_token_s": time.monotonic() - began_s})
            shoal.stop(f"cold-{number}")
            time.sleep(1.0)
    first, *rest = parts
    return {"very_first_s": first["first_token_s"], **{name: spread([p[name] for p in rest]) for name in first}}


def _command(home: Path, count: int) -> Values:
    """`shoal serve MODEL` with no node running; the clock starts before the interpreter does."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", DEFAULT_HTTP_PORT)) == 0:
            raise SkippedError(f"port {DEFAULT_HTTP_PORT}, where `shoal serve` puts the gateway, is taken")
    parts: list[dict[str, float]] = []
    for _ in range(count):
        forget_deployments(home)
        began_s = time.monotonic()
        with node(home, ["serve", MODEL]) as (running, _):
            up_s = time.monotonic() - began_s
            with Shoal(running.url) as shoal:
                wait_until(lambda: _ready(shoal), "the deployment", 120.0)
            ready_s = time.monotonic() - began_s
            _first_token(running.url, MODEL)
            parts.append({"up_s": up_s, "ready_s": ready_s, "first_token_s": time.monotonic() - began_s})
    return {name: spread([p[name] for p in parts]) for name in parts[0]}


def _ready(shoal: Shoal) -> bool:
    try:
        return any(d.state is DeploymentState.READY for d in shoal.deployments())
    except ShoalError:
        return False


def _first_token(url: str, name: str) -> None:
    """Ask until an answer begins, then leave: the gateway may open the pipeline a moment after it is ready."""

    def begun() -> bool:
        try:
            return any(stream(url, {"model": name, **_QUESTION}))
        except ShoalError:
            return False

    wait_until(begun, "a first token", 30.0)


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for cell, what in (("deploy", "deploy on a running node"), ("command", "`shoal serve` from nothing")):
        values = values_of(results, cell)
        if values is None:
            reason = results.get(cell, {}).get("skipped", "not run")
            found.append(Finding(what=what, goal="<= 5 s to the first token", measured=f"not measured: {reason}"))
            continue
        first = values["first_token_s"]
        measured = f"**{first['median']:.2f} s** (p90 {first['p90']:.2f}; ready after {values['ready_s']['median']:.2f}"
        if "very_first_s" in values:
            measured += f"; {values['very_first_s']:.1f} the very first time, with trials"
        met = first["median"] <= GOAL_S
        found.append(Finding(what=what, goal="<= 5 s to the first token", measured=measured + ")", met=met))
    return found
