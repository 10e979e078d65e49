"""Guesses by looking up: where the newest ids stood before, the same ids may follow again.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): answers that edit code, fill JSON or quote their prompt repeat it for long
stretches.  An index holds, for every run of n ids, where it last stood; with several n the longest run that is known
wins.  Learning an id and looking up cost a few dictionary operations, however long the text.  What follows the found place may
run into the end of what is known; it then goes on with itself, which foresees loops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.ids import RequestId
from shoal.runtime.request import GenerateRequest
from shoal.runtime.speculate.draft import Draft

SIZES = (8, 4, 2)
"""Longest first."""
LONGEST_MATCH = 32
"""Further back nobody looks: a longer match is no better a sign."""


@dataclass(slots=True)
class NgramIndex:
    """`ids` of one text; `after[n]` says where a run of n ids last ended: the position behind it."""

    ids: list[int] = field(default_factory=list)
    after: dict[int, dict[tuple[int, ...], int]] = field(default_factory=lambda: {n: {} for n in SIZES})

    def learn(self, ids: Sequence[int]) -> None:
        """Append *ids*.  A run is entered when something follows it: the newest run never finds itself."""
        for token in ids:
            end = len(self.ids)
            for n, places in self.after.items():
                if end >= n:
                    places[tuple(self.ids[end - n :])] = end
            self.ids.append(token)

    def find(self, newest: Sequence[int], most: int) -> Draft:
        """What followed the last time that *newest* ended as it does."""
        place = self.place(newest)
        return Draft() if place is None else Draft(ids=self._from(place, most), match=self._match(newest, place))

    def place(self, newest: Sequence[int]) -> int | None:
        """Behind the last run of ids that ends as *newest* does; None when none does."""
        return next(
            (places[tuple(newest[-n:])] for n, places in self.after.items() if tuple(newest[-n:]) in places), None
        )

    def _from(self, place: int, most: int) -> tuple[int, ...]:
        found = self.ids[place : place + most]
        while len(found) < most:
            found += found[: most - len(found)]
        return tuple(found)

    def _match(self, newest: Sequence[int], place: int) -> int:
        longest = min(LONGEST_MATCH, len(newest), place)
        return next((i for i in range(longest) if newest[-1 - i] != self.ids[place - 1 - i]), longest)


@dataclass(slots=True)
class _Text:
    """Prompt and answer so far, and beside them what the client said that the answer would be, followed as far as it is true."""

    prompt_left: int
    own: NgramIndex = field(default_factory=NgramIndex)
    told: NgramIndex = field(default_factory=NgramIndex)
    at: int | None = 0
    """Where in `told` the answer stands; None where it has left it."""
    followed: int = 0

    def learn(self, ids: Sequence[int]) -> None:
        self.own.learn(ids)
        answer = ids[self.prompt_left :]
        self.prompt_left = max(0, self.prompt_left - len(ids))
        if self.told.ids:
            for token in answer:
                self._follow(token)

    def draft(self, most: int) -> Draft:
        if self.at is not None and (ids := tuple(self.told.ids[self.at : self.at + most])):
            return Draft(ids=ids, match=self.followed, predicted=True)
        return self.own.find(self.own.ids, most)

    def _follow(self, token: int) -> None:
        if self.at is not None and self.at < len(self.told.ids) and self.told.ids[self.at] == token:
            self.at, self.followed = self.at + 1, self.followed + 1
        else:
            self.at, self.followed = self.told.place(self.own.ids), 0


@dataclass(slots=True)
class NgramDrafter:
    """An index over prompt and answer of each open request (`Drafter`), and over what its client predicted."""

    texts: dict[RequestId, _Text] = field(default_factory=dict)

    def open(self, request: GenerateRequest) -> None:
        """See `Drafter.open`."""
        text = self.texts[request.request] = _Text(len(request.prompt))
        text.told.learn(request.predicted)

    def learn(self, request: RequestId, ids: Sequence[int]) -> None:
        """See `Drafter.learn`."""
        self.texts[request].learn(ids)

    def propose(self, request: RequestId, most: int) -> Draft:
        """See `Drafter.propose`."""
        text = self.texts.get(request)
        return text.draft(most) if text and most > 0 else Draft()

    def close(self, request: RequestId) -> None:
        """See `Drafter.close`."""
        self.texts.pop(request, None)
