"""shoal plan: what would run where, and how fast, before anything is loaded."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, RenderableType

from shoal.cli.connect import URL_HELP, connect
from shoal.cli.files import read_either, read_problem
from shoal.cli.front_picture import picture as front_picture
from shoal.cli.front_table import render_front
from shoal.cli.graph_table import render_graph_plan
from shoal.cli.plan_file import with_flags
from shoal.cli.plan_flags import ASK, DEMANDS, AskFlags, DemandFlags, options
from shoal.cli.plan_table import render_plan
from shoal.cli.replicas_table import render_replicas
from shoal.cli.spread import spread
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import DeadlineBudget
from shoal.plan.dag.placement import place_graph
from shoal.plan.dag.problem import GraphPlan, GraphProblem
from shoal.plan.document import answer_json
from shoal.plan.pareto import Front
from shoal.plan.pareto import pareto as front_of
from shoal.plan.pipelines import MOST
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Objective, Plan, Problem
from shoal.plan.replicas import Replicas, replicate

Shown = Answer | Front | Replicas

NO_PLAN = 2
"""Exit code when nothing fits: the caller must change the question."""


class KindFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What kind of answer is wanted instead of one plan, and how it is shown."""

    pareto: Annotated[bool, typer.Option("--pareto", help="Show all plans that no other beats in every objective.")] = (
        False
    )
    objectives: Annotated[
        str, typer.Option(help="Of --pareto: two or more of latency, throughput, energy, price, with commas.")
    ] = ""
    picture: Annotated[Path | None, typer.Option(help="Of --pareto: draw the plans into this SVG file.")] = None
    replicas: Annotated[
        str, typer.Option(help="Place several pipelines at once: so many at most, or auto for as many as pay off.")
    ] = ""


KIND = KindFlags()


@spread
def plan(
    model: Annotated[str, typer.Argument(help="A model of the gateway's node.")] = "",
    *,
    problem: Annotated[
        Path | None,
        typer.Option("--problem", help="Solve this problem file, without any fleet; options replace what it says."),
    ] = None,
    ask: AskFlags = ASK,
    demands: DemandFlags = DEMANDS,
    kind: KindFlags = KIND,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    seconds: Annotated[float, typer.Option(help="How long to search a problem file at most.")] = 10.0,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Show which devices would run which blocks, and the predicted speed."""
    names: dict[NodeId, str] = {}
    answer: Shown
    if problem is not None:
        stated = read_either(problem)
        if isinstance(stated, GraphProblem):
            refuse_for_graph((ask, ASK), (demands, DEMANDS), (kind, KIND))
            show(place_graph(stated, DeadlineBudget(time.monotonic, seconds)), names, json=json)
            return
        stated = with_flags(stated, ask, demands)
        answer = answered(stated, seconds, kind)
    elif not model:
        raise InvalidRequestError("name a model, or a problem file with --problem", hint="`shoal models` lists models")
    else:
        with connect(url) as shoal:
            machines = shoal.nodes()
            names = {n.id: n.name for n in machines}
            answer = of_fleet(shoal, model, options(ask, demands, machines), seconds, kind)
    if kind.picture is not None:
        draw(answer, kind.picture, names)
    show(answer, names, json=json)


def show(answer: Shown | GraphPlan, names: Mapping[NodeId, str], *, json: bool) -> None:
    """Print an answer; ends with `NO_PLAN` where nothing fits."""
    if json:
        sys.stdout.buffer.write(answer_json(answer) + b"\n")
    else:
        Console().print(rendered(answer, names))
    if isinstance(answer, Infeasible):
        raise typer.Exit(NO_PLAN)


def rendered(answer: Shown | GraphPlan, names: Mapping[NodeId, str]) -> RenderableType:
    """An answer of any kind as tables and sentences."""
    match answer:
        case Front():
            return render_front(answer, names)
        case Replicas():
            return render_replicas(answer, names)
        case GraphPlan():
            return render_graph_plan(answer)
        case Plan() | Infeasible():
            return render_plan(answer, names)


def of_fleet(shoal: Shoal, model: str, asked: PlanOptions, limit_s: float, kind: KindFlags) -> Shown:
    """A fleet's own plan; or the front or the replicas of its problem, searched here."""
    if kind.pareto or kind.replicas:
        return answered(shoal.problem(model, **asked), limit_s, kind)
    return shoal.plan(model, **asked)


def solve_file(path: Path, limit_s: float = 10.0) -> Answer:
    """Solve a problem file offline; raises InvalidRequestError when it cannot be read or makes no sense."""
    return place(read_problem(path), DeadlineBudget(time.monotonic, limit_s))


def answered(stated: Problem, limit_s: float, kind: KindFlags) -> Shown:
    """One plan, the front of the objectives, or several pipelines."""
    budget = DeadlineBudget(time.monotonic, limit_s)
    if kind.pareto and kind.replicas:
        raise InvalidRequestError("--pareto weighs single pipelines", hint="leave out --replicas", param="replicas")
    if kind.replicas:
        return replicate(stated, parse_replicas(kind.replicas), budget)
    return front_of(stated, budget, parse_objectives(kind.objectives)) if kind.pareto else place(stated, budget)


def parse_replicas(text: str) -> int:
    """A number of pipelines at most; 0 for `auto`.  Raises InvalidRequestError."""
    if text == "auto":
        return 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST:
        raise InvalidRequestError(
            f"{text!r} is no number of pipelines", hint=f"write auto, or 1 to {MOST}", param="replicas"
        )
    return int(text)


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """`latency,joules` as objectives; raises InvalidRequestError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    known = {"joules": Objective.ENERGY, **{objective.value: objective for objective in Objective}}
    wrong = next((word for word in words if word not in known), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"{wrong!r} is no objective", hint=f"choose from {', '.join(known)}", param="objectives"
        )
    return tuple(known[word] for word in words)


def draw(answer: Shown, path: Path, names: Mapping[NodeId, str]) -> None:
    """Write the picture of a front; raises InvalidRequestError when there is none, or when the file cannot be written."""
    match answer:
        case Front():
            try:
                path.write_text(front_picture(answer, names), encoding="utf-8")
            except OSError as error:
                raise InvalidRequestError(f"cannot write {path}: {error.strerror}", param="picture") from error
        case Plan() | Replicas():
            raise InvalidRequestError("--picture draws what --pareto finds", hint="add --pareto", param="picture")
        case Infeasible():
            return


def refuse_for_graph(*given: tuple[msgspec.Struct, msgspec.Struct]) -> None:
    """Raise InvalidRequestError for flags that have no meaning for a graph of operators; pairs of flags and defaults."""
    for flags, defaults in given:
        for name in (name for name in flags.__struct_fields__ if getattr(flags, name) != getattr(defaults, name)):
            raise InvalidRequestError(
                f"{name}: a graph of operators is planned for the latency of one request, and nothing else",
                hint="leave that out, or state the problem as a chain of blocks",
                param=name,
            )
