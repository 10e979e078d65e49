"""shoal ps: what is served, and by whom."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from shoal.cli.connect import URL_HELP, connect
from shoal.fleet.views import DeploymentState, DeploymentView, PredictionView
from shoal.ids import NodeId
from shoal.plan.problem import Stage

_COLOURS = {DeploymentState.READY: "green", DeploymentState.FAILED: "red", DeploymentState.ASLEEP: "blue"}


def ps(
    *,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List what is served, and by whom."""
    with connect(url) as shoal:
        found = shoal.deployments()
        names = {node.id: node.name for node in shoal.nodes()} if found and not json else {}
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    elif not found:
        typer.echo("nothing is deployed; `shoal serve MODEL` deploys a model")
    else:
        console = Console()
        console.print(render_deployments(found, names))
        for line in moved_lines(found):
            console.print(line, highlight=False, soft_wrap=True)


def render_deployments(found: Sequence[DeploymentView], names: Mapping[NodeId, str]) -> Table:
    """One row per deployment: its state, its stages, how busy each was lately, and the predicted speed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("deployment", "model", "state", "stages, busy", "predicted", "missed by", "last token"):
        table.add_column(column)
    for view in found:
        colour = _COLOURS.get(view.state, "yellow")
        plan = view.plan
        busy = view.busy if plan and len(view.busy) == len(plan.stages) else (None,) * len(plan.stages if plan else ())
        stages = [f"{_at(s, names)}{_busy(b)}" for s, b in zip(plan.stages, busy, strict=True)] if plan else []
        age_s = view.last_token_age_s
        table.add_row(
            view.name,
            view.model,
            f"[{colour}]{view.state}[/]" + (f": {view.detail}" if view.detail else ""),
            " -> ".join(stages) or "-",
            f"{plan.estimate.time_per_output_token_s * 1000:.1f} ms/token" if plan else "-",
            missed_by(view.prediction),
            f"{age_s:.0f} s ago" if age_s is not None else "-",
        )
    return table


def moved_lines(found: Sequence[DeploymentView]) -> list[str]:
    """Why those that have moved did."""
    return [f"{view.name} moved: {view.moved}" for view in found if view.moved]


def missed_by(prediction: PredictionView | None) -> str:
    """How far the plan's figures were from what requests took: to the first token, and per token."""
    if prediction is None:
        return "-"
    errors = (prediction.time_to_first_token_error, prediction.time_per_output_token_error)
    first, each = (f"{error:.0%}" if error is not None else "-" for error in errors)
    return f"{first} first, {each} per token"


def _at(stage: Stage, names: Mapping[NodeId, str]) -> str:
    return f"{names.get(stage.node, stage.node[:8])} {_part(stage)}"


def _busy(share: float | None) -> str:
    return "" if share is None else f" {share:.0%}"


def _part(stage: Stage) -> str:
    return "(relay)" if stage.is_relay else f"[{stage.start}, {stage.stop})"
