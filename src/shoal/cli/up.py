"""shoal up: start this machine's node with a gateway; the first node of a fleet coordinates it."""

from typing import Annotated

import msgspec
import typer

from shoal.cli.node_flags import UP, NodeFlags
from shoal.cli.spread import spread
from shoal.cli.start import run
from shoal.node.options import DEFAULT_HTTP_PORT


@spread
def up(
    *,
    host: Annotated[str, typer.Option(help="Where the HTTP gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port; 0 takes any free one.", min=0, max=65535)] = DEFAULT_HTTP_PORT,
    node: NodeFlags = UP,
) -> None:
    """Start this machine's node with a gateway."""
    first = {"http": (host, port), "coordinates": True, "eager": True}
    run(msgspec.structs.asdict(node) | first, expose=node.expose)
