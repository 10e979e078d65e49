"""Several pipelines for people: what each runs, what share of the requests it gets, and what the whole is worth."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.cli.front_table import blocks_text
from shoal.cli.plan_table import Names, reason_text, streams_text
from shoal.plan.figures import duration
from shoal.plan.replicas import Pipeline, Replicas

NARROW = 1e-3
"""A gap below it is shown as none."""


def render_replicas(answer: Replicas, names: Names | None = None) -> RenderableType:
    """Pipelines as a table and sentences; *names* are the nodes' display names, where they have some."""
    known = names or {}
    return Group(
        _pipelines(answer, known),
        Text(),
        _summary(answer, known),
        Text(),
        *(reason_text(reason, known) for reason in answer.reasons),
    )


def _pipelines(answer: Replicas, names: Names) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("PIPELINE", "WEIGHT", "TOK/S", "FIRST TOKEN", "PER TOKEN"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("WHAT RUNS WHERE", overflow="fold")
    for index, pipeline in enumerate(answer.pipelines):
        table.add_row(
            str(index + 1),
            f"{pipeline.weight:.1%}",
            f"{pipeline.tokens_per_s:.3g}",
            duration(pipeline.estimate.time_to_first_token_s),
            duration(pipeline.estimate.time_per_output_token_s),
            _placement(pipeline, names),
        )
    return table


def _placement(pipeline: Pipeline, names: Names) -> str:
    return ", ".join(f"{names.get(s.node, s.node)} {blocks_text(s.start, s.stop)}" for s in pipeline.stages)


def _summary(answer: Replicas, names: Names) -> Text:
    text = Text.assemble(
        ("together  ", "bold"),
        f"{answer.tokens_per_s:.4g} tok/s, {streams_text(answer.shape)} in each; the best single pipeline gives "
        f"{answer.single_tokens_per_s:.4g}\n",
        ("certificate  ", "bold"),
        _certificate(answer),
    )
    if answer.limited_by:
        found = ", ".join(answer.limited_by)
        for node, name in names.items():
            found = found.replace(node, name)
        text.append("\nlimited by  ", "bold")
        text.append(found)
    return text


def _certificate(answer: Replicas) -> str:
    if answer.upper_bound is None or answer.gap is None:
        return "no bound was found"
    if answer.gap <= NARROW:
        return "proven: no set of pipelines gives more"
    return (
        f"no set of pipelines gives more than {answer.upper_bound:.4g} tok/s, {answer.gap:.1%} above is unproven: "
        "the bound does not know that pipelines share memory"
    )
