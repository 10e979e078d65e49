"""shoal leave: let a machine drain and go."""

from typing import Annotated

import typer

from shoal.cli.connect import URL_HELP, connect, find_node, local_node
from shoal.errors import NodeUnreachableError


def leave(
    node: Annotated[str, typer.Argument(help="Name or id of the node; by default the one on this machine.")] = "",
    *,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Drain a node and let it go: running answers end, its shards move, then it stops."""
    running = local_node()
    with connect(url) as shoal:
        wanted = node or (running.node if running is not None else "")
        if not wanted:
            raise NodeUnreachableError("no node runs on this machine", hint="name one: `shoal nodes` lists them")
        found = find_node(wanted, shoal.nodes())
        shoal.leave(found.id)
    typer.echo(f"node {found.name} drains and leaves")
