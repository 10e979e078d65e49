"""shoal plan: what would run where, and how fast, before anything is loaded."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.connect import URL_HELP, connect
from shoal.cli.deploy import Context, Goal, Pins, Slots, Stages, options
from shoal.cli.plan_table import render_plan
from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import DeadlineBudget
from shoal.plan.document import answer_json, parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Objective, Problem, RequestShape

NO_PLAN = 2
"""Exit code when nothing fits: the caller must change the question."""


def plan(
    model: Annotated[str, typer.Argument(help="A model of the gateway's node.")] = "",
    *,
    problem: Annotated[
        Path | None, typer.Option("--problem", help="Solve this problem file instead, without any fleet.")
    ] = None,
    context: Context = 2048,
    slots: Slots = 2,
    stages: Stages = 0,
    pin: Pins = None,
    objective: Goal = Objective.LATENCY,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    seconds: Annotated[float, typer.Option(help="How long to search a problem file at most.")] = 10.0,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Show which devices would run which blocks, and the predicted speed."""
    names: dict[NodeId, str] = {}
    if problem is not None:
        answer = solve_file(problem, seconds)
    elif not model:
        raise InvalidRequestError("name a model, or a problem file with --problem", hint="`shoal models` lists models")
    else:
        with connect(url) as shoal:
            machines = shoal.nodes()
            names = {n.id: n.name for n in machines}
            shape = RequestShape(context_tokens=context, slots=slots)
            answer = shoal.plan(model, **options(shape, objective, stages, pin or (), machines))
    if json:
        sys.stdout.buffer.write(answer_json(answer) + b"\n")
    else:
        Console().print(render_plan(answer, names))
    if isinstance(answer, Infeasible):
        raise typer.Exit(NO_PLAN)


def solve_file(path: Path, limit_s: float = 10.0) -> Answer:
    """Solve a problem file offline; raises InvalidRequestError when it cannot be read or makes no sense."""
    return place(read_problem(path), DeadlineBudget(time.monotonic, limit_s))


def read_problem(path: Path) -> Problem:
    """A problem file, checked."""
    return parse_problem(read_file(path, "problem"))


def read_file(path: Path, param: str) -> bytes:
    """What is in *path*, which the user named as *param*."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(
            f"cannot read {path}: {error.strerror}", hint=f"give the path of a {param} file", param=param
        ) from error
