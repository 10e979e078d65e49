"""Which sequence holds which cache slot of a stage, how far its cache reaches, and what slots still hold that nobody uses."""

from dataclasses import dataclass, field

from shoal.ids import RequestId
from shoal.runtime.frames import ClosedSequence, OpenedSequence


@dataclass(slots=True)
class Held:
    """`length` positions of the request are in the slot's cache (or on their way into it)."""

    request: RequestId
    length: int = 0


@dataclass(slots=True)
class SlotTable:
    """Slots [0, `size`); a slot belongs to at most one request.  Owned by one stage machine.

    `kept` are caches of requests that have ended; whoever opens their slot takes it from them.
    """

    size: int
    held: dict[int, Held] = field(default_factory=dict)
    kept: dict[int, Held] = field(default_factory=dict)

    def free(self) -> list[int]:
        """Slots that nobody holds, lowest first."""
        return [slot for slot in range(self.size) if slot not in self.held]

    def reserve(self, slot: int, request: RequestId) -> None:
        """Promise *slot* to *request*; what it holds stays until `open`."""
        self.held[slot] = Held(request)

    def give_up(self, slot: int) -> None:
        """Take back a promise; what the slot holds stays."""
        del self.held[slot]

    def open(self, opened: OpenedSequence) -> bool:
        """Give a slot to a request, whoever held it; whether what it wants to begin behind is here."""
        found = self._source(opened)
        self.kept.pop(opened.slot, None)
        self.held[opened.slot] = Held(opened.request, opened.reuse if found else 0)
        return found

    def close(self, closed: ClosedSequence) -> bool:
        """Take a slot from a request, keeping of its cache what is there of what is to be kept.

        False when it does not hold it (any more), nor kept anything in it.
        """
        mine = self.held.get(closed.slot)
        if mine is None or mine.request != closed.request:
            mine = self.kept.get(closed.slot)
            if closed.keep or mine is None or mine.request != closed.request:
                return False
            del self.kept[closed.slot]
            return True
        del self.held[closed.slot]
        if closed.keep:
            self.kept[closed.slot] = Held(closed.request, min(closed.keep, mine.length))
        return True

    def clear(self) -> list[int]:
        """Forget all; the slots that hold something."""
        slots = sorted({*self.held, *self.kept})
        self.held, self.kept = {}, {}
        return slots

    def covers(self, slot: int, request: RequestId, start: int) -> bool:
        """Whether positions below *start* of *request* are in *slot*: rows at *start* may follow."""
        held = self.held.get(slot)
        return held is not None and held.request == request and held.length >= start

    def extend(self, slot: int, stop: int) -> None:
        """The cache now ends at *stop*; less than before rolls it back."""
        self.held[slot].length = stop

    def cut(self, slot: int, request: RequestId, length: int) -> None:
        """What was on its way into the cache of *request* behind *length* never came there."""
        for held in (self.held.get(slot), self.kept.get(slot)):
            if held is not None and held.request == request:
                held.length = min(held.length, length)

    def _source(self, opened: OpenedSequence) -> bool:
        if not opened.reuse:
            return False
        known = (self.kept.get(opened.source), self.held.get(opened.source))
        return any(h is not None and h.request == opened.of and h.length >= opened.reuse for h in known)
