"""The wires of a rehearsed fleet: one fabric between agents and workers, and one for each session that a stage listens on.

A stage's data session has nobody on it but who dialled it, as on the real fabric: a worker that was given up cannot speak into the
way of the one that took its place.
"""

import itertools
from dataclasses import dataclass, field

from shoal.errors import NodeUnreachableError
from shoal.node.rehearse.virtual import VirtualThreads, VirtualTime
from shoal.transport.memory import MemoryBus, MemoryFabric, Weather

DIAL_S = 0.5
"""Until a dial that nobody takes is given up."""


@dataclass(slots=True)
class Listening:
    """A data session that waits to be dialled: the bus of a stage, and where it is."""

    bus: MemoryBus
    fabric: MemoryFabric
    locator: str
    open: bool = True


@dataclass(slots=True)
class Network:
    """Hosts and what is between them.  `delay_s` is one way."""

    virtual: VirtualTime
    delay_s: float = 0.002
    control: MemoryFabric = field(init=False)
    _sessions: dict[str, Listening] = field(default_factory=dict)
    _hosts: set[str] = field(default_factory=set)
    _cut: set[frozenset[str]] = field(default_factory=set)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.control = MemoryFabric(threads=self.virtual.group("fabric"))

    def attach(self, host: str, threads: VirtualThreads) -> MemoryBus:
        """A bus among agents and workers."""
        self._meet(host)
        return self.control.attach(f"{host}/{next(self._numbers)}", host=host, threads=threads)

    def listen(self, host: str, port: int, threads: VirtualThreads) -> Listening:
        """A data session on *port*, or another one if that is 0."""
        fabric = MemoryFabric(threads=self.virtual.group("fabric"))
        locator = f"tcp/{host}:{port or 1000 + next(self._numbers)}"
        session = Listening(fabric.attach(locator, host=host, threads=threads), fabric, locator)
        self._sessions[locator] = session
        for pair in self._pairs():
            self._shape(fabric, *pair)
        return session

    def dial(self, host: str, locator: str, threads: VirtualThreads) -> MemoryBus:
        """A session with who listens at *locator*; raises NodeUnreachableError."""
        session = self._sessions.get(locator)
        if session is None or not session.open or not session.fabric.reaches(host, session.bus.host):
            threads.sleep(DIAL_S)
            raise NodeUnreachableError(f"nobody answers at {locator}")
        return session.fabric.attach(f"{host}/way{next(self._numbers)}", host=host, threads=threads)

    def hang_up(self, session: Listening) -> None:
        """Let nobody dial it any more; who has dialled it hears nothing of that."""
        session.open = False
        session.bus.close()
        if self._sessions.get(session.locator) is session:
            del self._sessions[session.locator]

    def cut(self, a: str, b: str) -> None:
        """Let nothing pass between two hosts."""
        self._cut.add(frozenset((a, b)))
        for fabric in self._fabrics():
            fabric.partition(a, b)

    def heal(self, a: str, b: str) -> None:
        """End that."""
        self._cut.discard(frozenset((a, b)))
        for fabric in self._fabrics():
            fabric.heal(a, b)

    def is_cut(self, a: str, b: str) -> bool:
        """Whether nothing passes between them."""
        return frozenset((a, b)) in self._cut

    def _meet(self, host: str) -> None:
        if host not in self._hosts:
            self._hosts.add(host)
            for fabric in self._fabrics():
                for pair in self._pairs():
                    self._shape(fabric, *pair)

    def _pairs(self) -> list[tuple[str, str]]:
        return list(itertools.permutations(sorted(self._hosts), 2))

    def _fabrics(self) -> list[MemoryFabric]:
        return [self.control, *(session.fabric for session in self._sessions.values())]

    def _shape(self, fabric: MemoryFabric, a: str, b: str) -> None:
        fabric.weather(a, b, Weather(delay_s=self.delay_s))
        if self.is_cut(a, b):
            fabric.partition(a, b)
