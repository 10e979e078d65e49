"""shoal profile: what the fleet's devices and links can do for a model."""

from typing import Annotated

import msgspec
import typer
from rich.console import Console

from shoal.cli.connect import URL_HELP, connect, find_node
from shoal.cli.profile_table import render_profile


def profile(
    model: Annotated[str, typer.Argument(help="A model of the gateway's node; may be left out if there is one.")] = "",
    *,
    node: Annotated[list[str] | None, typer.Option(help="Name or id of a node; all by default.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure devices and links for a model, or show what was measured."""
    with connect(url) as shoal:
        machines = shoal.nodes()
        names = {n.id: n.name for n in machines}
        found = shoal.profile(model, nodes=[find_node(n, machines).id for n in node or ()], refresh=refresh)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        Console().print(render_profile(found, names))
