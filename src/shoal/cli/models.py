"""shoal models: list the models of this machine."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from shoal.cli.main import complain, exit_code
from shoal.cli.progress import human_bytes
from shoal.errors import ShoalError
from shoal.model.catalog import CATALOGUE
from shoal.node.settings import read_settings
from shoal.store.home import Store, missing_bytes, open_store

_WIDE = 100
"""Columns of a terminal that has room for sources, too; in fewer they would stand letter below letter."""


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """A model as `--json` prints it; `here_bytes` is less than `size_bytes` where only some blocks were fetched.

    `import_error` is the largest relative error that rounding at the import made in any tensor; null where nothing was rounded.
    """

    name: str
    kind: str
    architecture: str
    size_bytes: int
    here_bytes: int
    quantisation: str
    import_error: float | None
    context_tokens: int
    licence: str
    source: str
    digest: str


def models(*, json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the models of this machine, and what can be pulled."""
    store = open_store(Path(read_settings().home))
    rows, damaged = _rows(store)
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    elif rows:
        console = Console()
        console.print(_table(rows, sources=console.width >= _WIDE))
    elif not damaged:
        typer.echo("No model is here yet. Pull one of these by name, or give a reference (`shoal pull --help`):")
        for entry in CATALOGUE:
            typer.echo(f"  shoal pull {entry.name:20} {entry.about} ({entry.licence})")

    for error in damaged:
        complain(error.message, error.hint)
    if damaged:
        raise typer.Exit(exit_code(damaged[0]))


def _rows(store: Store) -> tuple[list[ModelRow], list[ShoalError]]:
    """The models, and what is wrong with those whose manifests cannot be read: they do not hide the others."""
    rows, damaged = [], []
    for name in store.library.names():
        try:
            rows.append(_row(store, name))
        except ShoalError as error:
            damaged.append(error)
    return rows, damaged


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
        import_error=spec.import_error,
        context_tokens=spec.context_tokens,
        licence=spec.licence,
        source=spec.source,
        digest=store.library.digest(name),
    )


def _table(rows: list[ModelRow], *, sources: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    last = ("SOURCE",) if sources else ()
    for column in ("NAME", "KIND", "ARCH", "SIZE", "WEIGHTS", "ERROR", "CONTEXT", "LICENCE", *last):
        justify: Literal["left", "right"] = "right" if column in {"SIZE", "ERROR", "CONTEXT"} else "left"
        table.add_column(column, justify=justify, no_wrap=column != "SOURCE", overflow="fold")
    for row in rows:
        size = human_bytes(row.size_bytes)
        if row.here_bytes < row.size_bytes:
            size = f"{human_bytes(row.here_bytes)} of {size}"
        context = str(row.context_tokens) if row.context_tokens else "-"
        error = f"{row.import_error:.2g}" if row.import_error else "-"
        numbers = (size, row.quantisation or "-", error, context)
        table.add_row(row.name, row.kind, row.architecture, *numbers, row.licence, *((row.source,) if sources else ()))
    return table
