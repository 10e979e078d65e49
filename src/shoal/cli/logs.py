"""shoal logs: what happened in the fleet."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from shoal.cli.connect import URL_HELP, connect
from shoal.fleet.views import EventView


def logs(
    deployment: Annotated[str, typer.Argument(help="Only what concerns this deployment.")] = "",
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as things happen, until Ctrl-C.")] = False,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Show what happened in the fleet: nodes that came and went, plans, deployments."""
    with connect(url) as shoal:
        for event in shoal.follow() if follow else shoal.events(limit=1000):
            if not deployment or event.deployment == deployment:
                typer.echo(line(event))


def line(event: EventView) -> str:
    """One event as one line; times are UTC."""
    when = datetime.fromtimestamp(event.unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    about = event.deployment or (event.node[:8] if event.node else "")
    return f"{when}  {event.kind:24} {about:20} {event.text}"
