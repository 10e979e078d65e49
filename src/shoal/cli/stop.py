"""shoal stop: stop serving a deployment."""

from typing import Annotated

import typer

from shoal.cli.connect import URL_HELP, connect


def stop(
    deployment: Annotated[str, typer.Argument(help="Its name, as `shoal ps` shows it.")],
    *,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Stop serving a deployment and give its memory back."""
    with connect(url) as shoal:
        shoal.stop(deployment)
    typer.echo(f"{deployment} is stopped")
