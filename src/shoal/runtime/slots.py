"""Which sequence holds which cache slot of a stage, and how far its cache reaches."""

from dataclasses import dataclass, field

from shoal.ids import RequestId


@dataclass(slots=True)
class Held:
    """`length` positions of the request are in the slot's cache (or on their way into it)."""

    request: RequestId
    length: int = 0


@dataclass(slots=True)
class SlotTable:
    """Slots [0, `size`); a slot belongs to at most one request.  Owned by one stage machine."""

    size: int
    held: dict[int, Held] = field(default_factory=dict)

    def free(self) -> int | None:
        """The lowest free slot; None when all are held."""
        return next((slot for slot in range(self.size) if slot not in self.held), None)

    def open(self, slot: int, request: RequestId) -> None:
        """Give *slot* to *request*, whoever held it."""
        self.held[slot] = Held(request)

    def close(self, slot: int, request: RequestId) -> bool:
        """Take *slot* from *request*; False when it does not hold it (any more)."""
        held = self.held.get(slot)
        if held is None or held.request != request:
            return False
        del self.held[slot]
        return True

    def covers(self, slot: int, request: RequestId, start: int) -> bool:
        """Whether positions below *start* of *request* are in *slot*: rows at *start* may follow."""
        held = self.held.get(slot)
        return held is not None and held.request == request and held.length >= start

    def extend(self, slot: int, stop: int) -> None:
        """The cache now ends at *stop*; less than before rolls it back."""
        self.held[slot].length = stop
