"""Plans of graphs for people: which operators run on which tier, and what a cut between blocks would give."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.cli.plan_table import PROVEN, render_plan
from shoal.plan.dag.problem import GraphAnswer, GraphPlan, Part, WholeAlternative
from shoal.plan.figures import duration, size
from shoal.plan.problem import Infeasible, Reason

SHOWN = 40
"""Operators of a tier; the rest is in the JSON."""


def render_graph_plan(answer: GraphAnswer) -> RenderableType:
    """A plan as tables and sentences."""
    match answer:
        case GraphPlan():
            return Group(
                _tiers(answer),
                Text(),
                _prediction(answer),
                Text(),
                _others(answer.alternatives),
                Text(),
                *(_reason(reason) for reason in answer.reasons),
            )
        case Infeasible():
            return render_plan(answer)


def _tiers(plan: GraphPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("TIER", "NODE", "OPERATORS"):
        table.add_column(column, overflow="fold")
    for column in ("MEMORY", "COMPUTE"):
        table.add_column(column, justify="right")
    table.add_column("SENDS ON", overflow="fold")
    for column in ("LINK", "BACK"):
        table.add_column(column, justify="right")
    for index, part in enumerate(plan.parts):
        table.add_row(str(index + 1), part.node, _names(part.names) or "none: passes frames on", *_figures(part))
    return table


def _figures(part: Part) -> Iterator[str]:
    yield size(part.memory_bytes)
    yield duration(part.compute_s)
    yield f"{_names(part.sends)} ({size(part.send_bytes)})" if part.sends else "-"
    yield duration(part.send_s) if part.send_s else "-"
    yield duration(part.return_s) if part.return_s else "-"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _prediction(plan: GraphPlan) -> Text:
    proof = "proven optimal" if plan.gap <= PROVEN else f"at most {plan.gap:.1%} above the optimum"
    return Text.assemble(
        ("predicted  ", "bold"),
        f"{duration(plan.latency_s)} per request\n           {_compared(plan)}\n",
        ("certificate  ", "bold"),
        f"least latency of all cuts {proof} (lower bound {duration(plan.lower_bound)}, {plan.solver})",
    )


def _compared(plan: GraphPlan) -> str:
    if plan.chain_latency_s is None:
        return "no cut between blocks only satisfies memory, links and pins"
    if plan.solver == "chain":
        return "cut between blocks, as good as any cut that is known"
    gain = 1 - plan.latency_s / plan.chain_latency_s
    return f"the best cut between blocks takes {duration(plan.chain_latency_s)}: this one, through a block, {gain:.1%} less"


def _others(alternatives: tuple[WholeAlternative, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ONE TIER ALONE", "WOULD TAKE", ""):
        table.add_column(column, overflow="fold")
    for alternative in alternatives:
        took = "-" if alternative.latency_s is None else duration(alternative.latency_s)
        table.add_row(
            alternative.node, took, f"not possible: {alternative.refused}" if alternative.refused else "possible"
        )
    return table


def _reason(reason: Reason) -> Text:
    return Text.assemble((f"{reason.node}: ", "green" if reason.used else "yellow"), reason.text)
