"""Prompts as token ids: prose, and JSON documents to be written again; each round has others, so that no cache knows them."""

import json
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf

_KINDS = ("sensor", "pump", "valve", "motor", "lamp", "gate", "meter", "relay", "camera", "heater", "filter", "switch")


class Kind(StrEnum):
    """What is asked for."""

    PROSE = "prose"
    JSON = "json"
    """A document, its second edition, and the beginning of a third: an editor's work."""


@dataclass(slots=True)
class Texts:
    """Prompts one after another; the same ones for whoever begins anew."""

    tokenizer: Tokenizer
    prose: Sequence[int]
    taken: int = 0

    def next(self, kind: Kind, tokens: int) -> list[int]:
        """One more prompt; *tokens* is the length of prose, a document has its own."""
        self.taken += 1
        match kind:
            case Kind.PROSE:
                return prose_at(self.prose, self.taken, tokens)
            case Kind.JSON:
                return self.tokenizer.encode(document_twice(self.taken), add_special=False)


def texts(gguf: Path) -> Texts:
    tokenizer = Tokenizer.from_files(tokenizer_files_from_gguf(gguf))
    topics = pydoc_data.topics.topics
    whole = "\n\n".join(topics[name] for name in sorted(topics, key=lambda name: -len(topics[name]))[:12])
    return Texts(tokenizer, tokenizer.encode(whole, add_special=False))


def prose_at(prose: Sequence[int], number: int, tokens: int) -> list[int]:
    """The *number*th piece; pieces do not begin alike, though long ones may overlap in the end."""
    start = number * 331 % (len(prose) - tokens)
    return list(prose[start : start + tokens])


def document_twice(number: int) -> str:
    """Two editions of one document that differ in a field, and the beginning of the next edition."""
    kind = _KINDS[number % len(_KINDS)]
    rows = [{"id": n, "name": f"{kind}-{number}{n}", "online": True, "limits": [n + number, 40 + n]} for n in range(4)]
    first = json.dumps(rows, indent=1)
    return f"{first}\n\n{first.replace('true', 'false', 1)}\n\n["
