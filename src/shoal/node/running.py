"""Whether a node runs from a home, and how it is reached: what it leaves there for the command line.

A file alone cannot say that a node runs, for one that was killed leaves it behind: the lock beside it can.
"""

from pathlib import Path

import msgspec

from shoal.ids import NodeId
from shoal.store.disk import home_named
from shoal.store.lock import try_locked


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What a started node tells whoever started it; also kept in `<home>/run/node.json` for the command line."""

    node: NodeId
    name: str
    url: str
    locators: tuple[str, ...]


def running_file(home: Path) -> Path:
    """Where a running node says how it is reached."""
    return home / "run" / "node.json"


def running_node(home: Path) -> Running | None:
    """The node that runs from *home*, or None; what one left behind that was killed is not believed."""
    with home_named(home):
        try:
            said = msgspec.json.decode(running_file(home).read_bytes(), type=Running)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        with try_locked(lock_file(home)) as nobody_runs:
            return None if nobody_runs else said


def lock_file(home: Path) -> Path:
    """What a running node holds locked; its system lets go of it however it ends."""
    return home / "run" / "lock"
