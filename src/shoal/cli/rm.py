"""shoal rm: forget a model."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.node.settings import read_settings
from shoal.store.home import open_store


def rm(name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `shoal models` lists.")]) -> None:
    """Forget a model; `gc` then frees its space."""
    store = open_store(Path(read_settings().home))
    store.library.remove(name)
    typer.echo(f"{name} is forgotten; `shoal gc` frees what no other model shares")
