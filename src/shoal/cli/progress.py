"""Progress in the terminal: a bar where one is watched, a line per phase where output goes to a file."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from shoal.node.progress import Progress


class _Bar:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None, visible=False)

    def start(self, what: str, total_bytes: int | None = None) -> None:
        self._bars.reset(self._task, description=what, total=total_bytes, visible=True)

    def advance(self, by_bytes: int) -> None:
        self._bars.advance(self._task, by_bytes)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, what: str, total_bytes: int | None = None) -> None:
        size = "" if total_bytes is None else f" ({human_bytes(total_bytes)})"
        self._console.print(f"{what}{size}", highlight=False, markup=False)

    def advance(self, by_bytes: int) -> None:
        """Lines do not move."""


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """Draw progress on *console* for the block."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield _Bar(bars)


def human_bytes(size_bytes: float) -> str:
    """Decimal units with three digits: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
