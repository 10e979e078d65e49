"""shoal join: add this machine to a fleet."""

from typing import Annotated

import msgspec
import typer

from shoal.cli.node_flags import JOIN, NodeFlags
from shoal.cli.spread import spread
from shoal.cli.start import run


@spread
def join(
    address: Annotated[
        list[str], typer.Argument(metavar="ADDRESS...", help="HOST:PORT of one node of the fleet, or of several.")
    ],
    *,
    token: Annotated[str, typer.Option(help="The fleet's join token (checked once nodes have certificates).")] = "",
    standby: Annotated[bool, typer.Option("--standby", help="Take over when the coordinator falls silent.")] = False,
    gateway: Annotated[str, typer.Option(help="Also answer HTTP, at HOST:PORT.")] = "",
    node: NodeFlags = JOIN,
) -> None:
    """Add this machine to a fleet."""
    del token  # part of the command's final form; there is nothing yet to check it against
    further = {"connect": address, "gateway": gateway, "coordinates": standby}
    run(msgspec.structs.asdict(node) | further, expose=node.expose)
