"""Deploying from the command line: show the plan first, then watch it come up (`serve` and `demo` share this)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.plan_table import render_plan
from shoal.cli.progress import shown
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import DeadlineExceededError, InfeasibleError, SettingsError, UnavailableError
from shoal.fleet.views import DeploymentState, DeploymentView, NodeView
from shoal.model.spec import ModelKind
from shoal.node.importing import import_files
from shoal.node.pull import PullRequest
from shoal.node.pull import pull as pull_model
from shoal.node.settings import Settings
from shoal.plan.problem import Infeasible, Objective, Pin, Plan, RequestShape, Residency
from shoal.store.home import open_store

Context = Annotated[int, typer.Option(help="Positions that one request may use, prompt and answer.", min=16)]
Slots = Annotated[int, typer.Option(help="Requests whose cache is held at once.", min=1)]
Stages = Annotated[int, typer.Option(help="Exactly this many stages; 0: the planner decides.", min=0)]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="BLOCK=NODE: run this block there; may be repeated.")]
Goal = Annotated[Objective, typer.Option("--objective", help="What the plan is judged by.")]
MaxLatency = Annotated[float | None, typer.Option(help="Seconds that a typical request may take.", min=0.0)]
MaxFirstToken = Annotated[float | None, typer.Option(help="Seconds until its first token, at most.", min=0.0)]
MinTokens = Annotated[
    float | None, typer.Option("--min-tokens-per-s", help="Of all streams together, at least.", min=0.0)
]
MaxJoules = Annotated[float | None, typer.Option(help="Energy of a request, from declared watts.", min=0.0)]
MaxPrice = Annotated[float | None, typer.Option(help="Money of a request, from declared prices.", min=0.0)]
Regions = Annotated[str, typer.Option(help="Regions that activations may enter, with commas; empty: all.")]
Trusts = Annotated[str, typer.Option(help="Trust classes that activations may enter, with commas; empty: all.")]

_LOADING_LIMIT_S = 300.0


def have_model(reference: str, settings: Settings, console: Console) -> str:
    """The name of a model in this machine's store; pulled when it is not there."""
    store = open_store(Path(settings.home), quota_bytes=settings.quota_bytes)
    if reference in store.library.names():
        return reference
    with shown(console) as progress:
        return pull_model(store, PullRequest(reference=reference), import_files, progress).name


def options(
    shape: RequestShape, objective: Objective, stages: int, pins: Sequence[str], nodes: Sequence[NodeView]
) -> PlanOptions:
    """What the flags ask of the planner; raises SettingsError for a pin that cannot be read."""
    return PlanOptions(
        shape=shape, objective=objective, stages=stages, pins=tuple(parse_pin(text, nodes) for text in pins)
    )


def residency(regions: str, trusts: str) -> Residency:
    """Comma-separated lists as a rule."""
    return Residency(regions=_words(regions), trusts=_words(trusts))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_pin(text: str, nodes: Sequence[NodeView]) -> Pin:
    """`BLOCK=NODE`, the node by name or by the beginning of its id; raises SettingsError."""
    block, mark, wanted = text.partition("=")
    found = [n for n in nodes if wanted and (n.name == wanted or n.id.startswith(wanted))]
    if not mark or not block.isdigit() or len(found) != 1:
        names = ", ".join(n.name for n in nodes)
        raise SettingsError(
            f"pin {text!r} cannot be read", hint=f"write BLOCK=NODE, for example 0=NAME; nodes: {names or 'none'}"
        )
    return Pin(block=int(block), node=found[0].id)


def show_plan(shoal: Shoal, model: str, wanted: PlanOptions, console: Console) -> Plan:
    """Ask for the plan and print it; raises InfeasibleError when there is none."""
    with console.status("measuring devices and links"):
        answer = shoal.plan(model, **wanted)
    console.print(render_plan(answer, {n.id: n.name for n in shoal.nodes()}))
    match answer:
        case Infeasible(reason=reason, hint=hint):
            raise InfeasibleError(reason, hint=hint)
        case Plan() as plan:
            return plan


def deploy_and_wait(shoal: Shoal, model: str, name: str, wanted: PlanOptions, console: Console) -> DeploymentView:
    """Deploy and wait until it serves; raises UnavailableError or DeadlineExceededError."""
    made = shoal.deploy(model, name=name, **wanted)
    began_s = time.monotonic()
    with console.status("loading") as status:
        while time.monotonic() - began_s < _LOADING_LIMIT_S:
            found = next((d for d in shoal.deployments() if d.name == made.name), None)
            if found is not None and found.state is DeploymentState.READY:
                console.print(f"[green]{made.name} is ready[/] after {time.monotonic() - began_s:.1f} s")
                return found
            if found is not None and found.state is DeploymentState.FAILED:
                raise UnavailableError(f"{made.name} cannot be served: {found.detail}")
            if found is not None:
                status.update(f"{found.state.value} {found.detail}")
            time.sleep(0.1)
    raise DeadlineExceededError(f"{made.name} did not come up within {_LOADING_LIMIT_S:.0f} s", hint="see `shoal logs`")


def curl_line(url: str, model: str, kind: str = ModelKind.CAUSAL_LM) -> str:
    """A request to copy, fit for the kind of model."""
    if kind == ModelKind.ENCODER:
        asked = f'{{"model": "{model}", "input": "Hello"}}'
        return f"curl {url}/v1/embeddings -H 'Content-Type: application/json' -d '{asked}'"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
