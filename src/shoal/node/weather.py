"""How an emulated machine and its links are at the moment: changed while its node runs, by a file in its home (demos, tests).

A real machine gets hot, a real link gets crowded, and nobody tells the fleet.  So nobody does here: the file is read by what slows
down the engine and the links, not by what reports, and the fleet has to find out by measuring.  It counts only on a node that was
started with `--slowdown` or `--link`; what it does not name is as it was at the start.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.ids import NodeId
from shoal.node.worker_spec import LinkShape
from shoal.transport.shaped import Link, ShapedBus, Way

LOOK_EVERY_S = 0.25


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from the start."""

    slowdown: float | None = None
    links: tuple[LinkShape, ...] = ()


def weather_file(home: Path) -> Path:
    """Where a node looks."""
    return home / "run" / "weather.json"


def write_weather(home: Path, weather: Weather) -> None:
    """Let the node of *home* find *weather*; whole or not at all."""
    path = weather_file(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(weather))
    fresh.replace(path)


def read_weather(home: Path) -> Weather:
    """What the file says; nothing where there is none, or none that can be read."""
    try:
        return msgspec.json.decode(weather_file(home).read_bytes(), type=Weather)
    except (OSError, msgspec.MsgspecError):
        return Weather()


def slowdown_of(home: Path, at_start: float) -> float:
    """How many times slower the machine is now."""
    now = read_weather(home).slowdown
    return at_start if now is None else max(1.0, now)


def links_of(home: Path, at_start: Sequence[LinkShape]) -> tuple[LinkShape, ...]:
    """The emulated links as they are now."""
    now = {link.target: link for link in read_weather(home).links}
    return tuple(now.get(link.target, link) for link in at_start)


def link_of(shape: LinkShape) -> Link:
    """The same both ways: what comes back over it is as slow."""
    way = Way(latency_s=shape.latency_s, bytes_per_s=shape.bytes_per_s)
    return Link(out=way, back=way)


@dataclass(slots=True)
class Slowness:
    """`slowdown_of`, asked at every step and looked up four times a second."""

    home: Path
    at_start: float
    now_s: Callable[[], float] = time.monotonic
    _known: float = 1.0
    _until_s: float = float("-inf")

    def __call__(self) -> float:
        if self.now_s() >= self._until_s:
            self._known, self._until_s = slowdown_of(self.home, self.at_start), self.now_s() + LOOK_EVERY_S
        return self._known


@dataclass(slots=True)
class ChangingLinks:
    """Keeps *bus* as slow as its links are by the file: *prefixes* are the keys that travel to each target."""

    bus: ShapedBus
    home: Path
    at_start: tuple[LinkShape, ...]
    prefixes: Callable[[NodeId], Sequence[str]]
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Follow the file until closed."""
        threading.Thread(target=self._run, name="weather", daemon=True).start()

    def close(self) -> None:
        """Follow it no more; harmless when repeated."""
        self._ended.set()

    def _run(self) -> None:
        known: tuple[LinkShape, ...] = ()
        while not self._ended.wait(LOOK_EVERY_S):
            now = links_of(self.home, self.at_start)
            for shape in set(now) - set(known):
                for prefix in self.prefixes(shape.target):
                    with suppress(ShoalError):  # a way that no message can take: nobody is there to be told
                        self.bus.set_link(prefix, link_of(shape))
            known = now
