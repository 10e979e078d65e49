"""What a guess is, and who makes one."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from shoal.ids import RequestId
from shoal.runtime.request import GenerateRequest


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer might go on.

    `match` says how many of the newest ids were found in the same order where the guess comes from: long matches are
    seldom wrong.  `predicted` tells a guess out of what the client said the answer would be.
    """

    ids: tuple[int, ...] = ()
    match: int = 0
    predicted: bool = False


class Drafter(Protocol):
    """Guesses, by request.  It may know nothing: a draft may be shorter than asked for, or empty."""

    def open(self, request: GenerateRequest) -> None:
        """A request begins; nothing of its prompt has been learned yet."""
        ...

    def learn(self, request: RequestId, ids: Sequence[int]) -> None:
        """The next ids of prompt or answer, in order; they are settled."""
        ...

    def propose(self, request: RequestId, most: int) -> Draft:
        """At most *most* ids that might follow all that was learned; of a request that is not open, none."""
        ...

    def close(self, request: RequestId) -> None:
        """Forget a request; unknown ones are fine."""
        ...
