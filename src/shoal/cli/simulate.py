"""shoal simulate: a plan in virtual time, beside what the planner predicts of it."""

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from shoal.cli.files import read_file, read_problem
from shoal.cli.plan import NO_PLAN
from shoal.cli.plan_table import render_plan
from shoal.cli.simulate_table import Compared, render_compared
from shoal.errors import InvalidRequestError
from shoal.plan.budget import DeadlineBudget
from shoal.plan.choosing import as_chosen
from shoal.plan.cost import Span, price
from shoal.plan.document import answer_json, parse_plan
from shoal.plan.line import check_chain
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Plan, Problem
from shoal.plan.simulate import simulate as run
from shoal.plan.simulated import Load, exactly, jitter


def simulate(
    problem: Annotated[Path, typer.Argument(help="A problem file: devices, links, blocks, and what is asked.")],
    *,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan of this problem, as `shoal plan --json` writes it.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests to measure under load.")] = 64,
    jitter: Annotated[float, typer.Option(help="Times vary evenly by this share: 0.2 is +-20 %.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    seconds: Annotated[float, typer.Option(help="How long to search for a plan at most.")] = 10.0,
) -> None:
    """Run a plan in virtual time, and hold what was predicted against it."""
    asked = read_problem(problem)
    answer = _answer(asked, plan, seconds)
    if isinstance(answer, Infeasible):
        _say_infeasible(answer, as_json=json)
        raise typer.Exit(NO_PLAN)
    compared = compare(asked, answer, requests, (jitter, seed))
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(compared), indent=2) + b"\n")
    else:
        Console().print(render_compared(compared))


def compare(problem: Problem, plan: Plan, requests: int, noise: tuple[float, int]) -> Compared:
    """Predicted, one stream alone, and as many as the shape has in flight; *noise* is a jitter and its seed."""
    problem = as_chosen(problem, plan.shape)
    _check_origin(problem, plan)
    spread, seed = noise
    factor = jitter(spread, seed) if spread else exactly
    spans = [Span(stage.node, stage.start, stage.stop) for stage in plan.stages]
    streams = problem.shape.in_flight
    return Compared(
        predicted=price(problem, spans).estimate,
        said=plan.estimate,
        stages=plan.stages,
        shape=problem.shape,
        alone=run(problem, plan.stages, Load(streams=1, requests=min(requests, 16)), factor),
        loaded=run(problem, plan.stages, Load(streams=streams, requests=requests), factor),
    )


def _answer(problem: Problem, plan: Path | None, seconds: float) -> Answer:
    if plan is not None:
        return parse_plan(read_file(plan, "plan"))
    return place(problem, DeadlineBudget(time.monotonic, seconds))


def _say_infeasible(answer: Infeasible, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(answer_json(answer) + b"\n")
    else:
        Console().print(render_plan(answer))


def _check_origin(problem: Problem, plan: Plan) -> None:
    """Raise InvalidRequestError when *plan* cannot have been made for *problem*.  Other figures are no fault: times change."""
    check_chain(problem, plan.stages)
    if plan.shape != problem.shape:
        pairs = (
            (name, getattr(plan.shape, name), getattr(problem.shape, name)) for name in plan.shape.__struct_fields__
        )
        said = ", ".join(f"{name} {ours} and {theirs}" for name, ours, theirs in pairs if ours != theirs)
        raise InvalidRequestError(
            f"plan and problem ask for different things: {said}",
            hint="plan this problem again, or give the one that the plan was made for",
            param="plan",
        )
    for stage in plan.stages:
        ends = ((stage.first_block, stage.start), (stage.last_block, stage.stop - 1))
        for name, block in ends if stage.start < stage.stop else ():
            if name and name != problem.blocks[block].name:
                raise InvalidRequestError(
                    f"the plan calls block {block} {name}, the problem {problem.blocks[block].name}",
                    hint="the plan was made for another model",
                    param="plan",
                )
