"""Conversations that `previous_response_id` continues: the newest ones, in memory.

They are a convenience, not a store: a gateway that starts anew has none, and says so.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from shoal.errors import InvalidRequestError
from shoal.serve.openai_requests import Message

KEPT = 256
MOST_BYTES = 16 << 20
"""Of all conversations together, as JSON; one that is longer than a quarter of that is not kept."""


@dataclass(slots=True)
class Turns:
    """Messages up to and with each answer, by its id.  Belongs to the event loop."""

    size_bytes: int = 0
    _kept: "OrderedDict[str, tuple[tuple[Message, ...], int]]" = field(default_factory=OrderedDict)

    def find(self, response: str) -> tuple[Message, ...]:
        """The conversation that ends with *response*; raises InvalidRequestError when nobody remembers it."""
        if response not in self._kept:
            raise InvalidRequestError(
                f"no response {response!r} is remembered here",
                hint=f"send the whole conversation as input: a gateway keeps the newest {KEPT}, and forgets them when it restarts",
                param="previous_response_id",
            )
        self._kept.move_to_end(response)
        return self._kept[response][0]

    def keep(self, response: str, messages: tuple[Message, ...]) -> None:
        """Remember a conversation; the one that was used least lately goes."""
        size_bytes = len(msgspec.json.encode(messages))
        if size_bytes > MOST_BYTES // 4:
            return
        self._kept[response] = (messages, size_bytes)
        self.size_bytes += size_bytes
        while len(self._kept) > KEPT or self.size_bytes > MOST_BYTES:
            _, (_, gone_bytes) = self._kept.popitem(last=False)
            self.size_bytes -= gone_bytes
