"""How hard a fetch presses on links that answers travel on, too.

Problem.  A frame of a pipeline is a few kilobytes and comes every few tens of milliseconds; weights are gigabytes.  They travel on
connections of their own, but what is queued at the slowest hop belongs to both: each byte of weights under way delays a frame.

Rule.  While any model of the fleet is served, or the owner has set a limit, a fetch is gentle: one small piece at a time, and while
models are served the link rests after each piece for as long as that piece took, so that it is free at least half of the time.
Otherwise nobody waits but the fetch, which goes as fast as pieces come back.  A limit counts from question to question,
whichever chunk they are about.  Nodes that fetch from the same one do not know of each other: each leaves half of the time,
their sum may not.

How small a piece is depends on the link, which nobody here knows: so pieces begin small and grow while they come back hardly
later than the quickest of the last ones, and shrink when they do not (`_Size`).  A frame then waits for some 20 to 40 ms, at 1
as at 50 Mbit/s; with pieces of 64 KiB it was half a second at 1.  A fetch that is not gentle does the same with more patience:
half a megabyte in the queue of a link of 1 Mbit/s takes four seconds, and the agents at its ends, whose heartbeats wait behind
it, took each other for dead.

Price.  A round trip per small piece, and as long a rest: 698 chunks of 98 MB took 4 s instead of 1 over a link without delay, 82 s
instead of 7 over one with a round trip of 20 ms.  Recovery seldom pays it: the model that recovers is not served meanwhile.

Rejected: a share of the measured bandwidth.  That is known to the coordinator, of some pairs, as it was up to minutes ago; how
long a piece took is known here, of this link, now.  Rejected, too: to be gentle only while *this* node serves.  Weights leave by
the uplink of the node that has them, which may be a stage of a pipeline that does not pass here.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from shoal.clock import Clock, SystemClock

PIECE_BYTES = 256 * 1024


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What may be under way: so many pieces of at most this size, and so many bytes in all."""

    pieces: int
    piece_bytes: int
    total_bytes: int


FAST = Window(pieces=4, piece_bytes=PIECE_BYTES, total_bytes=2 * PIECE_BYTES)
"""Two full pieces keep a link busy across its round trip; of small chunks, of which a model has many, it takes more.  The most that
is under way on a quick link."""

GENTLE = Window(pieces=1, piece_bytes=PIECE_BYTES // 4, total_bytes=PIECE_BYTES // 4)
"""The same while others need the link."""

_KEPT = 32


@dataclass(slots=True)
class _Size:
    """How large pieces may be, from how long they take: beyond the quickest of the last ones, which is the way there and back and
    little more, a piece should take no longer than *later_s*.

    The quickest is forgotten after a while: a source that is further away than the last one is not slow.
    """

    least_bytes: int
    most_bytes: int
    later_s: float
    now_bytes: int = 0
    _took_s: "deque[float]" = field(default_factory=lambda: deque(maxlen=_KEPT))

    def __post_init__(self) -> None:
        self.now_bytes = self.least_bytes

    def took(self, size_bytes: int, time_s: float) -> None:
        """A piece of *size_bytes* came back after *time_s*."""
        self._took_s.append(time_s)
        late_s = time_s - min(self._took_s)
        if late_s > self.later_s:
            self.now_bytes = max(self.least_bytes, self.now_bytes // 2)
        elif late_s <= self.later_s / 2 and size_bytes >= self.now_bytes:
            self.now_bytes = min(self.most_bytes, 2 * self.now_bytes)


class Pacer:
    """Holds the questions of all fetches of a node back; `yields` says whether models are being served."""

    def __init__(
        self,
        *,
        bytes_per_s: float | None = None,
        yields: Callable[[], bool] = lambda: False,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._yields = yields
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._free_s = float("-inf")
        self._gentle = _Size(least_bytes=4 << 10, most_bytes=GENTLE.piece_bytes, later_s=0.02)
        self._fast = _Size(least_bytes=16 << 10, most_bytes=FAST.piece_bytes, later_s=0.25)

    def now_s(self) -> float:
        """Seconds on the clock that this pacer goes by."""
        return self._clock.now_s()

    def window(self) -> Window:
        """What may be under way now."""
        if self._is_gentle():
            size_bytes = self._gentle.now_bytes
            return Window(pieces=GENTLE.pieces, piece_bytes=size_bytes, total_bytes=size_bytes)
        size_bytes = self._fast.now_bytes
        return Window(pieces=FAST.pieces, piece_bytes=size_bytes, total_bytes=2 * size_bytes)

    def _is_gentle(self) -> bool:
        return self._bytes_per_s is not None or self._yields()

    def wait(self, size_bytes: int) -> None:
        """Return when *size_bytes* may be asked for."""
        now_s = self._clock.now_s()
        if self._free_s > now_s:
            self._sleep(self._free_s - now_s)
        if self._bytes_per_s is not None:
            self._free_s = max(now_s, self._free_s) + size_bytes / self._bytes_per_s

    def arrived(self, asked_s: float, size_bytes: int) -> None:
        """A piece of that size that was asked for at *asked_s* is here: let its link rest for as long as it took."""
        now_s = self._clock.now_s()
        (self._gentle if self._is_gentle() else self._fast).took(size_bytes, now_s - asked_s)
        if self._yields():
            self._free_s = max(self._free_s, now_s + now_s - asked_s)
