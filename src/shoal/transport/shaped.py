"""Any Bus, slowed down as if its nodes were far apart; needs no root and no traffic control.

A link belongs to a key prefix: what is put or asked under it waits for its turn on the wire, is sent at the link's rate, and
arrives after its latency.  Long messages are sent in segments, and after each one the smallest lane goes first, as on a real
link with several connections.  Order is kept per link and lane. What a query brings back goes over the link's way back.

`Wire` is pure and knows no clock; `ShapedBus` is the thin shell with one thread that sleeps until the next event.
"""

import heapq
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import msgspec

from shoal.errors import NodeUnreachableError, SettingsError
from shoal.threads import Threads
from shoal.transport.bus import Bus, Closable, Lane, Sample
from shoal.transport.keys import check_key
from shoal.transport.timed import Job, TimedThread

SEGMENT_BYTES = 64 << 10
"""After this many bytes a smaller lane gets the wire."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link.  `jitter_s`: each message arrives up to that much later, never before one of its lane."""

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    """None: no limit."""
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        """Raise SettingsError for a way that no message can take."""
        if self.latency_s < 0 or self.jitter_s < 0 or (self.bytes_per_s is not None and self.bytes_per_s <= 0):
            raise SettingsError(f"{self} is no way: times are 0 or more, bytes per second more than 0")


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Both directions, seen from the node that sends; `back` is for the answers to its queries."""

    out: Way
    back: Way


def due_s(way: Way, ready_s: float, free_s: float, size_bytes: int) -> tuple[float, float]:
    """When the wire is free again, and when the last byte arrives, for bytes that may go from *ready_s*."""
    sent_s = max(ready_s, free_s) + (size_bytes / way.bytes_per_s if way.bytes_per_s else 0.0)
    return sent_s, sent_s + way.latency_s


def jitter_s(way: Way, number: int) -> float:
    """Of the *number*th message: spread evenly over [0, `jitter_s`) without a dice (golden ratio sequence)."""
    return way.jitter_s * ((number * 0.6180339887498949) % 1.0)


@dataclass(slots=True)
class Waiting:
    """A message on its way to the wire."""

    arrive: Job
    ready_s: float
    left_bytes: int


@dataclass(slots=True)
class Wire:
    """One direction with its queue; one owner calls `push`, and `serve` whenever the wire is free.

    Times follow from when messages became ready, not from when `serve` is called: a late call makes nothing slower.
    """

    way: Way
    free_s: float = 0.0
    busy: bool = False
    """Whether the owner has a call to `serve` coming."""
    queue: list[tuple[int, int, Waiting]] = field(default_factory=list)
    pushed: int = 0
    last_s: dict[int, float] = field(default_factory=dict)

    def push(self, now_s: float, lane: Lane, size_bytes: int, arrive: Job) -> None:
        """Queue a message behind those of its lane."""
        self.pushed += 1
        heapq.heappush(self.queue, (int(lane), self.pushed, Waiting(arrive, now_s, size_bytes)))

    def serve(self) -> tuple[float, Job] | None:
        """Send one segment; (when, what arrives) if it was the last of its message."""
        lane, number, waiting = self.queue[0]
        segment = min(waiting.left_bytes, SEGMENT_BYTES)
        waiting.left_bytes -= segment
        self.free_s, arrive_s = due_s(self.way, waiting.ready_s, self.free_s, segment)
        if waiting.left_bytes:
            return None
        heapq.heappop(self.queue)
        self.last_s[lane] = max(arrive_s + jitter_s(self.way, number), self.last_s.get(lane, 0.0))
        return self.last_s[lane], waiting.arrive


class ShapedBus:
    """*bus* with slow links: `links` maps key prefixes (whole chunks; the longest one that fits counts) to links."""

    def __init__(self, bus: Bus, links: Mapping[str, Link], threads: Threads) -> None:
        self._bus = bus
        self._threads = threads
        self._lock = threading.Lock()
        self._links: dict[str, tuple[Wire, Wire]] = {}
        self._open = True
        self._thread = TimedThread("shaped-bus", threads)
        for prefix, link in links.items():
            self.set_link(prefix, link)

    def set_link(self, prefix: str, link: Link | None) -> None:
        """Change or remove the link of *prefix*; what waits on one that is removed is still sent at its rate.

        On one that changes, order is kept: stages count on it.
        """
        with self._lock:
            known = self._links.pop(prefix, None)
            if link is None:
                return
            out, back = known or (Wire(link.out), Wire(link.back))
            out.way, back.way = link.out, link.back
            self._links[prefix] = (out, back)

    def put(self, key: str, payload: bytes, *, lane: Lane = Lane.CONTROL) -> None:
        """See the port; returns at once, the message leaves when the wire has taken it."""
        check_key(key)
        self._check_open()
        wires = self._wires(key)
        if wires is None:
            self._bus.put(key, payload, lane=lane)
        else:
            self._send(wires[0], lane, len(payload), partial(self._bus.put, key, bytes(payload), lane=lane))

    def subscribe(self, pattern: str, deliver: Callable[[Sample], None]) -> Closable:
        """See the port; the sender's links have done the waiting."""
        return self._bus.subscribe(pattern, deliver)

    def answer(self, pattern: str, reply: Callable[[Sample], bytes]) -> Closable:
        """See the port; the asker's links do the waiting."""
        return self._bus.answer(pattern, reply)

    def alive(self, key: str) -> Closable:
        """See the port; not slowed down, for it is a hint that may come late anyway."""
        return self._bus.alive(key)

    def watch(self, pattern: str, gone: Callable[[str], None]) -> Closable:
        """See the port."""
        return self._bus.watch(pattern, gone)

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        """See the port; *timeout_s* covers both ways and the answer."""
        check_key(key)
        self._check_open()
        wires = self._wires(key)
        if wires is None:
            return self._bus.query(key, payload, timeout_s=timeout_s)
        until_s = self._threads.now_s() + timeout_s
        self._pass(wires[0], len(payload), until_s, key)
        answer = self._bus.query(key, payload, timeout_s=max(until_s - self._threads.now_s(), 0.001))
        self._pass(wires[1], len(answer), until_s, key)
        return answer

    def close(self) -> None:
        """Close the bus below too; what still waits on a wire is dropped.  Harmless when repeated."""
        self._open = False
        self._thread.close()
        self._bus.close()

    def _wires(self, key: str) -> tuple[Wire, Wire] | None:
        with self._lock:
            fits = [prefix for prefix in self._links if key == prefix or key.startswith(f"{prefix.rstrip('/')}/")]
            return self._links[max(fits, key=len)] if fits else None

    def _pass(self, wire: Wire, size_bytes: int, until_s: float, key: str) -> None:
        passed = threading.Event()
        self._send(wire, Lane.CONTROL, size_bytes, passed.set)
        if not self._threads.wait(passed, max(until_s - self._threads.now_s(), 0.0)):
            raise NodeUnreachableError(f"no answer to {key} in time: its link is slow", hint="allow more time")

    def _send(self, wire: Wire, lane: Lane, size_bytes: int, arrive: Job) -> None:
        with self._lock:
            wire.push(self._threads.now_s(), lane, size_bytes, arrive)
            was_busy, wire.busy = wire.busy, True
        if not was_busy:
            self._thread.submit(wire.free_s, partial(self._serve, wire))

    def _serve(self, wire: Wire) -> None:
        """Send the next segment and come back when the wire is free; on the thread."""
        with self._lock:
            wire.busy = bool(wire.queue)
            if not wire.busy:
                return
            arrival = wire.serve()
        if arrival is not None:
            self._thread.submit(*arrival)
        self._thread.submit(wire.free_s, partial(self._serve, wire))

    def _check_open(self) -> None:
        if not self._open:
            raise NodeUnreachableError("this bus is closed", hint="open a new one")
