"""shoal plan: what would run where, and how fast, before anything is loaded."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.plan_table import render_plan
from shoal.errors import InvalidRequestError
from shoal.plan.budget import DeadlineBudget
from shoal.plan.document import answer_json, parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible

NO_PLAN = 2
"""Exit code when nothing fits: the caller must change the question."""


def plan(
    *,
    problem: Annotated[Path, typer.Option("--problem", help="Solve this problem file, without any fleet.")],
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    seconds: Annotated[float, typer.Option(help="How long to search at most.")] = 10.0,
) -> None:
    """Show which devices would run which blocks, and the predicted speed."""
    answer = solve_file(problem, seconds)
    if json:
        sys.stdout.buffer.write(answer_json(answer) + b"\n")
    else:
        Console().print(render_plan(answer))
    if isinstance(answer, Infeasible):
        raise typer.Exit(NO_PLAN)


def solve_file(path: Path, limit_s: float = 10.0) -> Answer:
    """Solve a problem file offline; raises InvalidRequestError when it cannot be read or makes no sense."""
    try:
        document = path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}", param="problem") from error
    return place(parse_problem(document), DeadlineBudget(time.monotonic, limit_s))
