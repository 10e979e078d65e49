"""Which sequences of a step share one engine call: a pure function of their slots.

Rows of an answer, one for each sequence, can be computed as a batch: reading the weights once for all of them is most of the gain.
The engine takes the caches of a batch as one array, so a batch is a run of neighbouring slots.  A slot in between that takes no
part may be bridged: a row that nobody wants is computed for it, and writes where the next wanted row of that slot will.  That
costs less than a call of its own (a further row some 0.3 of a call with one row, measured on SmolLM2-135M), for one slot at a time.

Rows of a batch have the same bits whoever shares the call.  Where they depend on how many share it (`lone`), rows that must be
reproducible get rows beside them that nobody wants.  Rows of one sequence that follow each other are another product, so they
keep a call of their own.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from shoal.runtime.ports import SequenceStep

BRIDGED = 1
"""So many slots at most between two neighbours of a batch."""


@dataclass(frozen=True, slots=True)
class Call:
    """One engine call over slots [`first`, `first` + `width`); `members` are positions in the step, in order of their slots."""

    first: int
    width: int
    members: tuple[int, ...]
    slots: tuple[int, ...]
    """Of the members."""

    def lanes(self) -> list[tuple[int, int | None]]:
        """Each slot of the call with the position in the step of whoever has it; None: it is bridged."""
        of_slot = dict(zip(self.slots, self.members, strict=True))
        return [(slot, of_slot.get(slot)) for slot in range(self.first, self.first + self.width)]


def calls_of(sequences: Sequence[SequenceStep], full: Container[int]) -> list[Call]:
    """The calls of a step.  Slots in *full* have no position left for a row that nobody wants."""
    batch = sorted((s.slot, at) for at, s in enumerate(sequences) if s.count == 1 and s.logits == 1)
    taken = {slot for slot, _ in batch}
    alone = [at for at, s in enumerate(sequences) if not (s.count == 1 and s.logits == 1)]
    calls = [alone_call(at, sequences[at].slot) for at in alone]
    group: list[tuple[int, int]] = []
    for slot, at in batch:
        if group and not _reaches(group[-1][0], slot, taken, full):
            calls.append(_call(group))
            group = []
        group.append((slot, at))
    return [*calls, _call(group)] if group else calls


def alone_call(at: int, slot: int) -> Call:
    """A call for one sequence."""
    return Call(slot, 1, (at,), (slot,))


def with_company(call: Call, slots: int, full: Container[int], odd: Container[int]) -> Call:
    """*call*, widened by neighbouring slots until its width is not in *odd*; as it is where there are none."""
    wider = call
    while wider.width in odd:
        right, left = wider.first + wider.width, wider.first - 1
        if right < slots and right not in full:
            wider = replace(wider, width=wider.width + 1)
        elif left >= 0 and left not in full:
            wider = replace(wider, first=left, width=wider.width + 1)
        else:
            return call
    return wider


def _reaches(left: int, right: int, taken: Container[int], full: Container[int]) -> bool:
    between = range(left + 1, right)
    return left < right and len(between) <= BRIDGED and not any(slot in full or slot in taken for slot in between)


def _call(group: Sequence[tuple[int, int]]) -> Call:
    first = group[0][0]
    slots, members = zip(*group, strict=True)
    return Call(first, slots[-1] - first + 1, members, slots)
