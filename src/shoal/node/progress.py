"""Where long work says how far it is; a command line draws it, a node counts it, a test ignores it."""

from typing import Protocol


class Progress(Protocol):
    """Told of one phase after another."""

    def start(self, what: str, total_bytes: int | None = None) -> None:
        """A phase begins; None: its size is not known."""
        ...

    def advance(self, by_bytes: int) -> None:
        """So many bytes more of the phase are done."""
        ...


class Quiet:
    """Tells nobody."""

    def start(self, what: str, total_bytes: int | None = None) -> None:
        """Ignore it."""

    def advance(self, by_bytes: int) -> None:
        """Ignore it."""
