"""shoal nodes: the machines of the fleet."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table

from shoal.cli.connect import URL_HELP, connect
from shoal.cli.progress import human_bytes
from shoal.fleet.state import Standing
from shoal.fleet.views import NodeView

_COLOURS = {Standing.ALIVE: "green", Standing.SUSPECT: "yellow", Standing.LOST: "red", Standing.LEAVING: "cyan"}


def nodes(
    *,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the machines of the fleet."""
    with connect(url) as shoal:
        found = shoal.nodes()
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        Console().print(render_nodes(found))


def render_nodes(found: Sequence[NodeView]) -> RenderableType:
    """Machines, and under them the links that were measured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("node", "state", "roles", "cores", "load", "memory", "engine", "address"):
        right, whole = column in {"cores", "load", "memory"}, column in {"memory", "address"}
        table.add_column(column, justify="right" if right else "left", no_wrap=whole, overflow="fold")
    for node in found:
        table.add_row(
            node.name,
            f"[{_COLOURS[node.standing]}]{node.standing}[/]",
            " ".join(node.roles),
            str(node.cores),
            f"{node.load:.2f}" if node.load is not None else "-",
            f"{human_bytes(node.memory_promised_bytes)} of {human_bytes(node.memory_budget_bytes)}",
            " ".join(p.removesuffix("ExecutionProvider") for p in node.providers),
            node.address.removeprefix("tcp/"),
        )
    names = {node.id: node.name for node in found}
    links = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("link", "round trip", "jitter", "p99", "Mbit/s"):
        links.add_column(column, justify="left" if column == "link" else "right")
    for node in found:
        for link in node.links:
            links.add_row(
                f"{node.name} -> {names.get(link.target, link.target[:8])}",
                f"{link.rtt_p50_s * 1000:.2f} ms",
                f"+-{link.jitter_s * 1000:.2f} ms",
                f"{link.rtt_p99_s * 1000:.2f} ms",
                f"{link.bytes_per_s * 8 / 1e6:.0f}",
            )
    return Group(table, "", links) if links.row_count else table
