"""Caches that are kept when an answer ends, and which of them a new prompt can begin from.

System prompts and the turns of a chat come again: their rows need not be computed twice.  A slot whose request has ended keeps its
cache until somebody else needs the slot, or nobody has come for it for `KEEP_S`.  A new request begins behind the longest
prefix that a kept slot, or the slot of a running request, shares with its prompt: in its place where the slot is free, else from
a copy.  Every stage holds the same positions; one that does not (it was started anew) says so, and that request begins again
from its first position.

Rows of a prompt are computed in chunks and rows of an answer one by one: their last bits differ.  Who must be reproducible reuses
only what was computed as it would be for it: rows of prompts, behind which at least two rows are left to compute.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shoal.ids import RequestId

KEEP_S = 900.0
LEAST = 16
"""Shorter prefixes are not worth a thought, or a slot that a longer one might need."""
COPY_GAIN = 32
"""So many positions more must be saved by a copy than by beginning in place."""


@dataclass(frozen=True, slots=True)
class Cached:
    """What a slot holds of a request: keys and values of `ids`, of which the first `exact` were computed in chunks."""

    slot: int
    request: RequestId
    ids: tuple[int, ...]
    exact: int
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reuse:
    """Begin behind `count` positions of what `request` has in `source`."""

    source: int
    request: RequestId
    count: int
    exact: int
    """So many of them were computed in chunks."""


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning; by halving, since comparing tuples is quick and a loop is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def reusable(held: Cached, prompt: tuple[int, ...], *, reproducible: bool) -> int:
    """Positions of *held* that *prompt* can begin behind."""
    left = 2 if reproducible else 1
    shared = min(common(held.ids, prompt), len(prompt) - left)
    shared = min(shared, held.exact) if reproducible else shared
    return shared if shared >= LEAST else 0


def best(prompt: tuple[int, ...], own: Cached | None, others: Iterable[Cached], *, reproducible: bool) -> Reuse | None:
    """What a request that has been given a slot begins from: what its slot holds (*own*), or a copy of another."""
    here = reusable(own, prompt, reproducible=reproducible) if own is not None else 0
    found = max(((reusable(h, prompt, reproducible=reproducible), h) for h in others), key=lambda f: f[0], default=None)
    if found is not None and found[0] >= here + COPY_GAIN:
        return _reuse(found[1], found[0])
    return _reuse(own, here) if own is not None and here else None


def _reuse(held: Cached, count: int) -> Reuse:
    return Reuse(held.slot, held.request, count, min(count, held.exact))


@dataclass(slots=True)
class KeptSlots:
    """Slots that nobody uses and that still hold something.  Owned by the first stage."""

    held: dict[int, Cached] = field(default_factory=dict)

    def choose(self, free: Sequence[int], prompt: tuple[int, ...], *, reproducible: bool) -> int:
        """Which of the *free* slots a request with *prompt* gets: where it can begin furthest, else one that holds nothing."""
        lengths = {s: reusable(self.held[s], prompt, reproducible=reproducible) for s in free if s in self.held}
        furthest = max(lengths, key=lambda slot: lengths[slot], default=None)
        if furthest is not None and lengths[furthest]:
            return furthest
        empty = next((slot for slot in free if slot not in self.held), None)
        return empty if empty is not None else min(free, key=lambda slot: self.held[slot].since_s)

    def keep(self, held: Cached) -> None:
        """A slot is free now and goes on holding."""
        self.held[held.slot] = held

    def take(self, slot: int) -> Cached | None:
        """Somebody has the slot now; what it held."""
        return self.held.pop(slot, None)

    def expired(self, now_s: float) -> list[Cached]:
        """Those that nobody has come for; they are kept no more."""
        gone = [held for held in self.held.values() if now_s - held.since_s > KEEP_S]
        for held in gone:
            del self.held[held.slot]
        return gone
