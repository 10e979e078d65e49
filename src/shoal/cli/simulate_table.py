"""Predicted against simulated, for people."""

from collections.abc import Iterable

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.plan.figures import duration
from shoal.plan.problem import Estimate, RequestShape, Stage
from shoal.plan.simulated import Busy, Simulated

SHOWN = 8
"""Devices, and links: the busiest ones."""
SAME = 1e-6


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost model says of a chain, and what happened when it was run in virtual time."""

    predicted: Estimate
    """On the problem's figures."""
    said: Estimate
    """By the plan."""
    stages: tuple[Stage, ...]
    shape: RequestShape
    alone: Simulated
    """One stream."""
    loaded: Simulated
    """As many as the shape has in flight."""


def render_compared(compared: Compared) -> RenderableType:
    """Figures side by side, and what was busy."""
    chain = " -> ".join(f"{stage.node} {_blocks(stage)}" for stage in compared.stages)
    return Group(
        Text.assemble(("plan  ", "bold"), chain),
        *_changed(compared),
        Text(),
        _figures(compared),
        Text(),
        _busy("DEVICE", compared.loaded.devices),
        Text(),
        _busy("LINK", compared.loaded.links),
    )


def _blocks(stage: Stage) -> str:
    return f"[{stage.start}, {stage.stop})" if stage.start < stage.stop else "(relays)"


def _changed(compared: Compared) -> Iterable[Text]:
    then_s, now_s = compared.said.time_per_output_token_s, compared.predicted.time_per_output_token_s
    if abs(then_s - now_s) > SAME * max(then_s, now_s):
        yield Text(
            f"the plan was made for other figures: it says {duration(then_s)} per token, on those of this problem it is "
            f"{duration(now_s)}",
            style="yellow",
        )


def _figures(compared: Compared) -> Table:
    alone, loaded, said, streams = compared.alone, compared.loaded, compared.predicted, compared.shape.in_flight
    table = _table("", "PREDICTED", "ONE STREAM", "OFF BY", f"{streams} IN FLIGHT", "P95", "OFF BY")
    rows = (
        ("first token", said.time_to_first_token_s, alone.time_to_first_token_s, loaded.time_to_first_token_s),
        ("per token", said.time_per_output_token_s, alone.time_per_output_token_s, loaded.time_per_output_token_s),
        ("request", said.latency_s, alone.latency_s, loaded.latency_s),
    )
    tails = {"first token": loaded.time_to_first_token_p95_s, "per token": loaded.time_per_output_token_p95_s}
    for name, predicted_s, alone_s, loaded_s in rows:
        off = _off(predicted_s, alone_s)
        table.add_row(name, duration(predicted_s), _time(alone_s), off, _time(loaded_s), _time(tails.get(name)), "")
    table.add_row(
        "tokens per second", f"{said.tokens_per_s:.4g}", f"{alone.tokens_per_s:.4g}", "", f"{loaded.tokens_per_s:.4g}", "",
        _off(said.tokens_per_s, loaded.tokens_per_s),
    )  # fmt: skip
    return table


def _time(time_s: float | None) -> str:
    return "-" if time_s is None else duration(time_s)


def _off(predicted: float, seen: float | None) -> str:
    """How far what was seen is from what was predicted."""
    return "-" if seen is None or not predicted else f"{(seen - predicted) / predicted:+.1%}"


def _busy(what: str, parts: tuple[Busy, ...]) -> Table:
    table = _table(what, "BUSY")
    for part in sorted(parts, key=lambda p: -p.share)[:SHOWN]:
        table.add_row(part.name, f"{part.share:.1%}")
    if len(parts) > SHOWN:
        table.add_row(f"and {len(parts) - SHOWN} less busy", "")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for column in others:
        table.add_column(column, justify="right")
    return table
