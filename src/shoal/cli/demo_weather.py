"""Changes to a demo that runs: a device that slows down, a link that gets worse, and all as it was."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from shoal.errors import SettingsError
from shoal.ids import NodeId
from shoal.node.options import parse_link
from shoal.node.running import running_node
from shoal.node.weather import Weather, read_weather, write_weather
from shoal.node.worker_spec import LinkShape

_SLOW = re.compile(r"^(?P<name>\w+)=(?P<factor>\d+(?:\.\d+)?)$")
_LINK = re.compile(r"^(?P<one>\w+):(?P<other>\w+)=(?P<shape>.+)$")


def change(homes: Mapping[str, Path], slow: Sequence[str], links: Sequence[str], *, restore: bool) -> None:
    """Have the demo that runs be so; what is not named stays as it is, or (*restore*) as it was at the start."""
    ids = _ids(homes)
    if restore:
        clear(homes)
        typer.echo("all devices and links are as at the start")
    for text in slow:
        typer.echo(_slow(homes, text))
    for text in links:
        typer.echo(_link(homes, ids, text))


def clear(homes: Mapping[str, Path]) -> None:
    """All as the flags of each node say."""
    for home in homes.values():
        if home.exists():
            write_weather(home, Weather())


def _ids(homes: Mapping[str, Path]) -> dict[str, NodeId]:
    running = {name: running_node(home) for name, home in homes.items()}
    missing = [name for name, node in running.items() if node is None]
    if missing:
        raise SettingsError(
            f"no demo runs: its node {missing[0]} is not there", hint="`shoal demo` in another terminal starts one"
        )
    return {name: node.node for name, node in running.items() if node is not None}


def _slow(homes: Mapping[str, Path], text: str) -> str:
    found = _SLOW.match(text)
    if found is None or found["name"] not in homes:
        raise SettingsError(
            f"{text!r} is no device and factor", hint=f"write NAME=FACTOR, for example box=6; names: {', '.join(homes)}"
        )
    home, factor = homes[found["name"]], max(1.0, float(found["factor"]))
    write_weather(home, Weather(slowdown=factor, links=read_weather(home).links))
    return f"{found['name']} is now {factor:g} times slower than this machine"


def _link(homes: Mapping[str, Path], ids: Mapping[str, NodeId], text: str) -> str:
    found = _LINK.match(text)
    if found is None or not {found["one"], found["other"]} <= homes.keys() or found["one"] == found["other"]:
        raise SettingsError(
            f"{text!r} is no link",
            hint=f"write NAME:NAME=LATENCYms,RATEmbit, for example gateway:box=40ms,10mbit; names: {', '.join(homes)}",
        )
    for here, there in ((found["one"], found["other"]), (found["other"], found["one"])):
        _put(homes[here], parse_link(f"{ids[there]}={found['shape']}"))
    return f"the link between {found['one']} and {found['other']} is now {found['shape']}"


def _put(home: Path, shape: LinkShape) -> None:
    known = read_weather(home)
    others = tuple(link for link in known.links if link.target != shape.target)
    write_weather(home, Weather(slowdown=known.slowdown, links=(*others, shape)))
