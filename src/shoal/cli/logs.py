"""shoal logs: what happened in the fleet."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from shoal.cli.connect import URL_HELP, connect
from shoal.client import Shoal
from shoal.fleet.views import EventView

PAGE = 1000


def logs(
    deployment: Annotated[str, typer.Argument(help="Only what concerns this deployment.")] = "",
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as things happen, until Ctrl-C.")] = False,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Show what happened in the fleet: nodes that came and went, plans, deployments."""
    with connect(url) as shoal:
        for event in shoal.follow() if follow else every_event(shoal):
            if not deployment or event.deployment == deployment:
                typer.echo(line(event))


def every_event(shoal: Shoal) -> Iterator[EventView]:
    """All that is still kept, page by page."""
    after = 0
    while page := shoal.events(after=after, limit=PAGE):
        yield from page
        after = page[-1].sequence


def line(event: EventView) -> str:
    """One event as one line; times are UTC."""
    when = datetime.fromtimestamp(event.unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    about = event.deployment or (event.node[:8] if event.node else "")
    return f"{when}  {event.kind:24} {about:20} {event.text}"
