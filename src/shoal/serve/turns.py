"""Conversations that `previous_response_id` continues: the newest ones, in memory.

They are a convenience, not a store: a gateway that starts anew has none, and says so.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from shoal.errors import InvalidRequestError
from shoal.serve.openai_requests import Message

KEPT = 256
MOST_CHARS = 1 << 20
"""Of one conversation; longer ones are not kept."""


@dataclass(slots=True)
class Turns:
    """Messages up to and with each answer, by its id.  Belongs to the event loop."""

    _kept: "OrderedDict[str, tuple[Message, ...]]" = field(default_factory=OrderedDict)

    def find(self, response: str) -> tuple[Message, ...]:
        """The conversation that ends with *response*; raises InvalidRequestError when nobody remembers it."""
        if response not in self._kept:
            raise InvalidRequestError(
                f"no response {response!r} is remembered here",
                hint=f"send the whole conversation as input: a gateway keeps the newest {KEPT}, and forgets them when it restarts",
                param="previous_response_id",
            )
        self._kept.move_to_end(response)
        return self._kept[response]

    def keep(self, response: str, messages: tuple[Message, ...]) -> None:
        """Remember a conversation; the one that was used least lately goes."""
        if sum(len(str(m.content)) for m in messages) > MOST_CHARS:
            return
        self._kept[response] = messages
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
