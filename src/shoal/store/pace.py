"""How hard a fetch presses on links that answers travel on, too.

Problem.  A frame of a pipeline is a few kilobytes and comes every few tens of milliseconds; weights are gigabytes.  They travel on
connections of their own, but what is queued at the slowest hop belongs to both: each byte of weights under way delays a frame.

Rule.  While any model of the fleet is served, or the owner has set a limit, a fetch is gentle: one small piece at a time.  A frame
then waits for no more than one piece (64 KiB: 5 ms at 100 Mbit/s, 52 ms at 10), and while models are served the link rests after
each piece for as long as that piece took, so that it is free at least half of the time.  Otherwise nobody waits but the fetch,
which goes as fast as pieces come back.  A limit counts from question to question, whichever chunk they are about.  Nodes that
fetch from the same one do not know of each other: each leaves half of the time, their sum may not.

Price.  A round trip per small piece, and as long a rest: 698 chunks of 98 MB took 4 s instead of 1 over a link without delay, 82 s
instead of 7 over one with a round trip of 20 ms.  Recovery seldom pays it: the model that recovers is not served meanwhile.

Rejected: a share of the measured bandwidth.  That is known to the coordinator, of some pairs, as it was up to minutes ago; how
long a piece took is known here, of this link, now.  Rejected, too: to be gentle only while *this* node serves.  Weights leave by
the uplink of the node that has them, which may be a stage of a pipeline that does not pass here.
"""

import time
from collections.abc import Callable

import msgspec

from shoal.clock import Clock, SystemClock

PIECE_BYTES = 256 * 1024


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What may be under way: so many pieces of at most this size, and so many bytes in all."""

    pieces: int
    piece_bytes: int
    total_bytes: int


FAST = Window(pieces=4, piece_bytes=PIECE_BYTES, total_bytes=2 * PIECE_BYTES)
"""Two full pieces keep a link busy across its round trip; of small chunks, of which a model has many, it takes more."""

GENTLE = Window(pieces=1, piece_bytes=PIECE_BYTES // 4, total_bytes=PIECE_BYTES // 4)


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

    def now_s(self) -> float:
        """Seconds on the clock that this pacer goes by."""
        return self._clock.now_s()

    def window(self) -> Window:
        """What may be under way now."""
        return GENTLE if self._bytes_per_s is not None or self._yields() else FAST

    def wait(self, size_bytes: int) -> None:
        """Return when *size_bytes* may be asked for."""
        now_s = self._clock.now_s()
        if self._free_s > now_s:
            self._sleep(self._free_s - now_s)
        if self._bytes_per_s is not None:
            self._free_s = max(now_s, self._free_s) + size_bytes / self._bytes_per_s

    def arrived(self, asked_s: float) -> None:
        """A piece that was asked for at *asked_s* is here: let its link rest for as long as it took."""
        if self._yields():
            now_s = self._clock.now_s()
            self._free_s = max(self._free_s, now_s + now_s - asked_s)
