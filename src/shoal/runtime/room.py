"""Room in a cache that is smaller than a whole context for each of its slots: who may begin, and what has to be forgotten first.

A request is let in when all that it may come to (its prompt and the longest answer that it asks for) fits beside what the others
may come to: nobody who has begun ever runs out of room, and nothing has to be thrown away in the middle of an answer.  To let in
on a guess, and to compute again what was pushed out, was rejected: on slow devices that is seconds of somebody else's time.

What was committed stays so until the slot is released, also when a shorter sequence follows in it.
"""

from dataclasses import dataclass, field

from shoal.model.cache import STEP_TOKENS, committed_tokens


@dataclass(slots=True)
class CacheRoom:
    """Positions of the cache: `total` in all, at most `context_tokens` in each of `slots`.  Owned by the first stage."""

    slots: int
    context_tokens: int
    total: int
    _promised: dict[int, int] = field(default_factory=dict)
    """What the request in a slot may come to."""
    _touched: dict[int, int] = field(default_factory=dict)
    """What a slot has committed since it was released last, at most."""

    @property
    def scarce(self) -> bool:
        """Whether there is less than a whole context for each slot."""
        return self.total < self.slots * self.context_tokens

    def used(self) -> int:
        """What all slots may come to, as they are."""
        return sum(self._of(slot) for slot in range(self.slots))

    def fits(self, slot: int, length: int) -> bool:
        """Whether a request of at most *length* positions may begin in *slot*."""
        needed = max(committed_tokens(length, self.context_tokens), self._touched.get(slot, 0))
        return self.used() - self._of(slot) + needed <= self.total

    def ever_fits(self, slot: int, length: int) -> bool:
        """Whether it may once all that nobody uses is forgotten: else that would be forgotten in vain."""
        busy = [max(self._of(other), self._floor) for other in self._promised if other != slot]
        idle = self.slots - len(busy) - 1
        return sum(busy) + idle * self._floor + committed_tokens(length, self.context_tokens) <= self.total

    def promise(self, slot: int, length: int) -> None:
        """A request of at most *length* positions has *slot*."""
        self._promised[slot] = committed_tokens(length, self.context_tokens)

    def withdraw(self, slot: int) -> None:
        """It has not begun, and does not any more."""
        self._promised.pop(slot, None)

    def end(self, slot: int, length: int) -> None:
        """It has ended, and *length* positions stay for others to begin behind."""
        self._promised.pop(slot, None)
        held = committed_tokens(length, self.context_tokens)
        self._touched[slot] = max(self._touched.get(slot, 0), held)

    def release(self, slot: int) -> None:
        """The slot holds nothing any more."""
        self._promised.pop(slot, None)
        self._touched.pop(slot, None)

    def clear(self) -> None:
        """No slot holds anything any more."""
        self._promised.clear()
        self._touched.clear()

    @property
    def _floor(self) -> int:
        return min(STEP_TOKENS, self.context_tokens)

    def _of(self, slot: int) -> int:
        return max(self._promised.get(slot, 0), self._touched.get(slot, 0), self._floor)
