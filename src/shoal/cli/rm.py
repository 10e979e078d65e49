"""shoal rm: forget a model."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.errors import InvalidRequestError
from shoal.node.in_use import InUse, in_use
from shoal.node.settings import read_settings
from shoal.store.home import Store, open_store


def rm(name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `shoal models` lists.")]) -> None:
    """Forget a model; `gc` then frees its space."""
    home = Path(read_settings().home)
    store = open_store(home)
    _check_unused(store, name, in_use(home))
    store.library.remove(name)
    typer.echo(f"{name} is forgotten; `shoal gc` frees what no other model shares")


def _check_unused(store: Store, name: str, used: InUse) -> None:
    """Raise InvalidRequestError for a model that is served from here, unless another name keeps the same one."""
    if name not in store.library.names():
        return  # `remove` says so, with the names that are here
    digest = store.library.digest(name)
    others = [n for n in store.library.names() if n != name and store.library.digest(n) == digest]
    served = sorted(used.get(digest, ()))
    if served and not others:
        raise InvalidRequestError(
            f"{name} is served here, as {' and '.join(served)}",
            hint=f"{' and '.join(f'`shoal stop {deployment}`' for deployment in served)} first (while the node runs)",
            param="name",
        )
