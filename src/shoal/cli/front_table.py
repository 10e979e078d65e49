"""Fronts for people: one line a plan, and what the front is worth.  Pure: a front in, something to print out."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.cli.plan_table import Names, render_plan
from shoal.plan.figures import duration
from shoal.plan.pareto import Front
from shoal.plan.problem import Estimate, Infeasible, Objective, Plan

MOST_ROWS = 40
TITLES = {
    Objective.LATENCY: "LATENCY",
    Objective.THROUGHPUT: "TOK/S",
    Objective.ENERGY: "JOULES",
    Objective.PRICE: "PRICE",
}


def render_front(front: Front | Infeasible, names: Names | None = None) -> RenderableType:
    """A front as a table within 80 columns; *names* are the nodes' display names, where they have some."""
    if isinstance(front, Infeasible):
        return render_plan(front, names)
    return Group(_points(front, names or {}), Text(), _summary(front))


def placement_text(plan: Plan, names: Names) -> str:
    """Who runs which blocks, in one line."""
    return ", ".join(
        f"{names.get(stage.node, stage.node)} {blocks_text(stage.start, stage.stop)}" for stage in plan.stages
    )


def figure_text(objective: Objective, estimate: Estimate) -> str:
    """A plan's figure by one objective."""
    match objective:
        case Objective.LATENCY:
            # Neighbours on a front may differ by little: a digit more than elsewhere.
            return f"{estimate.latency_s:.4g} s" if estimate.latency_s >= 1 else duration(estimate.latency_s)
        case Objective.THROUGHPUT:
            return f"{estimate.tokens_per_s:.4g}"
        case Objective.ENERGY:
            return f"{estimate.joules:.4g}"
        case Objective.PRICE:
            return f"{estimate.price:.3g}"


def _points(front: Front, names: Names) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("PLAN", justify="right", no_wrap=True)
    shown = [objective for objective in Objective if objective in front.objectives or _known(front, objective)]
    for objective in shown:
        table.add_column(TITLES[objective], justify="right", no_wrap=True)
    table.add_column("WHAT RUNS WHERE", overflow="fold")
    for index in _chosen(front):
        plan = front.points[index]
        figures = (figure_text(objective, plan.estimate) for objective in shown)
        style = "green" if index == front.knee else ""
        table.add_row(str(index + 1), *figures, placement_text(plan, names), style=style)
    return table


def _known(front: Front, objective: Objective) -> bool:
    """Figures that were not asked about are shown where there are some."""
    return objective in {Objective.LATENCY, Objective.THROUGHPUT} or any(
        (plan.estimate.joules if objective is Objective.ENERGY else plan.estimate.price) for plan in front.points
    )


def _chosen(front: Front) -> list[int]:
    """All points, or the ends, the knee and an even choice between them."""
    count = len(front.points)
    if count <= MOST_ROWS:
        return list(range(count))
    even = {round(place * (count - 1) / (MOST_ROWS - 2)) for place in range(MOST_ROWS - 1)}
    return sorted(even | ({front.knee} if front.knee is not None else set()))


def _summary(front: Front) -> Text:
    goals = " against ".join(objective.value for objective in front.objectives)
    text = Text.assemble(("front  ", "bold"), f"{goals}: {front.covers}, {len(front.points)} of them")
    if front.complete:
        text.append(", proven")
    left_out = len(front.points) - len(_chosen(front))
    if left_out:
        text.append(f"; {left_out} between them are not listed (--json has all)")
    if front.knee is not None:
        text.append(f"\nknee   plan {front.knee + 1}: beyond it one figure costs more of the other")
    if front.hypervolume is not None:
        text.append(f"\nshare  {front.hypervolume:.1%} of the space up to 10 % beyond the worst figures is dominated")
    return text


def blocks_text(start: int, stop: int) -> str:
    """A range of blocks, or that a device relays."""
    if start == stop:
        return "(relay)"
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"
