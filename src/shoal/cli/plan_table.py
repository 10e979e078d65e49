"""Plans for people: what runs where, what it will give, and why.  Pure: an answer in, something to print out."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.ids import NodeId
from shoal.plan.figures import duration, size
from shoal.plan.problem import (
    Alternative,
    Answer,
    Estimate,
    Infeasible,
    Objective,
    Plan,
    Reason,
    RequestShape,
    Stage,
    Weighed,
)
from shoal.plan.written import nodes_of

Names = Mapping[NodeId, str]


def render_plan(answer: Answer, names: Names | None = None) -> RenderableType:
    """A plan as tables and sentences; *names* are the nodes' display names, where they have some."""
    match answer:
        case Plan():
            return _plan(answer, names or {})
        case Infeasible():
            return _infeasible(answer, names or {})


def _plan(plan: Plan, names: Names) -> Group:
    return Group(
        _stages(plan, names),
        Text(),
        _prediction(plan),
        Text(),
        _others(plan, names),
        *_cloud(plan),
        Text(),
        *_written(plan, names),
        *(reason_text(reason, names) for reason in plan.reasons),
    )


def _infeasible(answer: Infeasible, names: Names) -> Group:
    lines = [Text.assemble(("No plan: ", "bold red"), _named(answer.reason, names))]
    if answer.missing_bytes:
        found = f"needed {size(answer.needed_bytes)}, there {size(answer.available_bytes)}"
        lines.append(Text(f"missing: {size(answer.missing_bytes)} ({found})"))
    if answer.hint:
        lines.append(Text.assemble(("hint: ", "bold"), _named(answer.hint, names)))
    return Group(*lines)


def _stages(plan: Plan, names: Names) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("STAGE", "NODE", "BLOCKS"):
        table.add_column(column, overflow="fold")
    for column in ("MEMORY", "PREFILL", "DECODE", "LINK, PREFILL", "LINK, DECODE"):
        table.add_column(column, justify="right")
    for index, stage in enumerate(plan.stages):
        table.add_row(
            str(index + 1),
            _name(stage.node, names),
            _blocks(stage),
            size(stage.memory_bytes),
            duration(stage.prefill_s),
            duration(stage.decode_s),
            duration(stage.send_prefill_s),
            duration(stage.send_decode_s),
        )
    return table


def _blocks(stage: Stage) -> str:
    if stage.is_relay:
        return "relay, no blocks"
    numbers = str(stage.start) if stage.stop - stage.start == 1 else f"{stage.start}-{stage.stop - 1}"
    words = dict.fromkeys(name for name in (stage.first_block, stage.last_block) if name)
    return f"{numbers} ({' to '.join(words)})" if words else numbers


def _prediction(plan: Plan) -> Text:
    shape = plan.shape
    shared = f" sharing a cache of {shape.cache_tokens} tokens" if shape.cache_tokens else ""
    asked = (
        f"for {shape.tokens_in} tokens in, {shape.tokens_out} out, a context of {shape.context_tokens}, "
        f"{shape.slots} slot{'s' * (shape.slots > 1)}{shared}, {streams_text(shape)}"
    )
    chosen = f"           {_weighed(plan.weighed)}\n" if plan.weighed else ""
    value = _bound(plan)
    proof = "proven optimal" if plan.gap <= PROVEN else f"at most {plan.gap:.1%} above the optimum"
    return Text.assemble(
        ("predicted  ", "bold"),
        _figures(plan.estimate),
        f"\n           {asked}\n{chosen}",
        _charges(plan.estimate),
        ("certificate  ", "bold"),
        f"best {plan.objective.value} {proof} (lower bound {value}, {plan.solver})",
    )


def streams_text(shape: RequestShape) -> str:
    """How many micro-batches, and of what size."""
    return f"{shape.in_flight} in flight" + (f", {shape.batch} sequences each" if shape.batch > 1 else "")


def _weighed(rows: Sequence[Weighed]) -> str:
    """What else was there to choose."""
    found = (f"{row.batch} x {row.in_flight} gives {row.tokens_per_s:.3g} tok/s" for row in rows)
    return f"chosen of sequences x in flight: {', '.join(found)}"


def _bound(plan: Plan) -> str:
    match plan.objective:
        case Objective.LATENCY:
            return f"{duration(plan.lower_bound)} per request"
        case Objective.THROUGHPUT:
            return f"{duration(plan.lower_bound)} per token"
        case Objective.ENERGY:
            return f"{plan.lower_bound:.4g} J per request"
        case Objective.PRICE:
            return f"{plan.lower_bound:.3g} per request"


def _charges(estimate: Estimate) -> str:
    """What nothing measures: it follows from what owners declared."""
    found = [f"{estimate.joules:.4g} J"] * bool(estimate.joules) + [f"{estimate.price:.3g} of money"] * bool(
        estimate.price
    )
    return f"           {' and '.join(found)} a request (from declared rates, not measured)\n" if found else ""


PROVEN = 1e-9


def _figures(estimate: Estimate) -> str:
    return (
        f"first token {duration(estimate.time_to_first_token_s)}, then {duration(estimate.time_per_output_token_s)} per token; "
        f"{estimate.tokens_per_s:.3g} tok/s in all"
    )


def _others(plan: Plan, names: Names) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ONE DEVICE ALONE", "WOULD GIVE", ""):
        table.add_column(column, overflow="fold")
    for alternative in plan.alternatives:
        table.add_row(_name(alternative.node, names), *_alone(alternative, names))
    return table


def _alone(alternative: Alternative, names: Names) -> tuple[str, str]:
    figures = _figures(alternative.estimate) if alternative.estimate else "-"
    return figures, f"not possible: {_named(alternative.refused, names)}" if alternative.refused else "possible"


def _cloud(plan: Plan) -> list[Text]:
    cloud = plan.cloud
    if cloud is None:
        return []
    estimate = cloud.estimate
    verdict = f"not allowed: {cloud.refused}" if cloud.refused else "allowed"
    figures = (
        f"{duration(estimate.time_to_first_token_s)} to first token, then {duration(estimate.time_per_output_token_s)} per token; "
        f"{estimate.price:.3g} of money a request (declared, not measured)"
    )
    return [Text(), Text.assemble((f"cloud {cloud.name}  ", "bold"), f"{figures}; {verdict}")]


def _written(plan: Plan, names: Names) -> list[Text]:
    """How activations are written from stage to stage, where the plan chose that."""
    found = []
    for one in plan.written:
        here, there = (_name(node, names) for node in nodes_of(plan.stages, one.stage))
        found.append(Text.assemble((f"{here} to {there}: ", "green"), f"activations {one.text}"))
    return [*found, Text()] if found else []


def reason_text(reason: Reason, names: Names) -> Text:
    """A device and why it takes part or not."""
    style = "green" if reason.used else "yellow"
    return Text.assemble((f"{_name(reason.node, names)}: ", style), _named(reason.text, names))


def _name(node: NodeId, names: Names) -> str:
    return names.get(node, node)


def _named(text: str, names: Names) -> str:
    """*text* with display names for node ids: an id is 32 characters that nobody reads."""
    for node, name in names.items():
        text = text.replace(node, name)
    return text
