"""shoal models: list the models of this machine."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from shoal.cli.progress import human_bytes
from shoal.model.catalog import CATALOGUE
from shoal.node.settings import read_settings
from shoal.store.home import Store, missing_bytes, open_store


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """A model as `--json` prints it; `here_bytes` is less than `size_bytes` where only some blocks were fetched."""

    name: str
    kind: str
    architecture: str
    size_bytes: int
    here_bytes: int
    quantisation: str
    context_tokens: int
    licence: str
    source: str
    digest: str


def models(*, json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the models of this machine, and what can be pulled."""
    store = open_store(Path(read_settings().home))
    rows = [_row(store, name) for name in store.library.names()]
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    elif rows:
        Console().print(_table(rows))
    else:
        typer.echo("No model is here yet. Pull one of these by name, or give a reference (`shoal pull --help`):")
        for entry in CATALOGUE:
            typer.echo(f"  shoal pull {entry.name:20} {entry.about} ({entry.licence})")


def _row(store: Store, name: str) -> ModelRow:
    manifest = store.library.read(name)
    spec, size_bytes = manifest.spec, manifest.size_bytes()
    return ModelRow(
        name=name,
        kind=spec.kind.value,
        architecture=spec.architecture,
        size_bytes=size_bytes,
        here_bytes=size_bytes - sum(missing_bytes(store, manifest).values()),
        quantisation=spec.quantisation,
        context_tokens=spec.context_tokens,
        licence=spec.licence,
        source=spec.source,
        digest=store.library.digest(name),
    )


def _table(rows: list[ModelRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "KIND", "ARCH", "SIZE", "WEIGHTS", "CONTEXT", "LICENCE", "SOURCE"):
        justify: Literal["left", "right"] = "right" if column in {"SIZE", "CONTEXT"} else "left"
        table.add_column(column, justify=justify, no_wrap=column != "SOURCE", overflow="fold")
    for row in rows:
        size = human_bytes(row.size_bytes)
        if row.here_bytes < row.size_bytes:
            size = f"{human_bytes(row.here_bytes)} of {size}"
        context = str(row.context_tokens) if row.context_tokens else "-"
        table.add_row(
            row.name, row.kind, row.architecture, size, row.quantisation or "-", context, row.licence, row.source
        )
    return table
