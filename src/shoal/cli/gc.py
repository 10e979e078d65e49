"""shoal gc: free the space of what no model needs."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.progress import human_bytes
from shoal.node.in_use import in_use
from shoal.node.settings import read_settings
from shoal.store.garbage import Garbage, collect
from shoal.store.home import open_store


def gc(*, dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False) -> None:
    """Free the space of what no model needs."""
    home = Path(read_settings().home)
    found = collect(open_store(home), in_use=in_use(home), dry_run=dry_run)
    typer.echo(
        f"{'would free' if dry_run else 'freed'} {human_bytes(found.total_bytes)}: {_parts(found)}"
        if found.total_bytes
        else "nothing to free"
    )


def _parts(found: Garbage) -> str:
    parts = {
        f"{found.chunks} chunks": found.chunks_bytes,
        "derived tensors": found.derived_bytes,
        "unfinished downloads": found.partial_bytes,
        "temporary files": found.tmp_bytes,
    }
    return ", ".join(f"{what} {human_bytes(size)}" for what, size in parts.items() if size)
