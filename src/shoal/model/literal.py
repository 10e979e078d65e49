"""What users type stays text: `<|im_end|>` in a message does not end the turn.

A chat template renders a conversation to one text, in which a special token out of a message looks like one out of the
template.  Who sends a message (or a web page that is quoted in one) could forge turns and system prompts.  Rule: before
rendering, a mark is put inside every special token that stands in the conversation or in the tools; templates carry it along
like any character.  After rendering, special tokens without a mark are the template's own; they are renamed to what nobody
can type, the marks are taken out, and the text is encoded by a twin of the tokenizer that knows only the new names.

The twin is the model's own tokenizer otherwise, so that prefixes, splits and merges are as ever (encoding the pieces between
special tokens by themselves was rejected: it changes spaces of SentencePiece vocabularies); it is made when it is first needed.
A special token that is put together from the end of one field and the start of the next is marked, too.  What cannot be kept
apart is refused.  Tokens that a model adds without calling them special (`<think>`) are read as in any text.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as Engine

from shoal.errors import InvalidRequestError
from shoal.model.tokenizer import Tokenizer

# Unicode noncharacters: valid in UTF-8 and JSON, never text, untouched by normalisation.
MARK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
HALF_CHARS = 2
"""So many characters of a special token at a field's edge count as a part of one."""


@dataclass(slots=True)
class Literals:
    """Keeps special tokens in users' text apart from a template's; safe to share between threads."""

    tokenizer: Tokenizer
    _token: re.Pattern[str] = field(init=False)
    _beginnings: re.Pattern[str] = field(init=False)
    _heads: frozenset[str] = field(init=False)
    _tails: frozenset[str] = field(init=False)
    _twin: Engine | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        tokens = sorted(self.tokenizer.special, key=len, reverse=True)
        any_token = "|".join(map(re.escape, tokens)) or "(?!)"
        self._token = re.compile(any_token)
        self._beginnings = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)
        self._heads = frozenset(t[:n] for t in tokens for n in range(HALF_CHARS, len(t)))
        self._tails = frozenset(t[-n:] for t in tokens for n in range(HALF_CHARS, len(t)))

    def marked(self, value: Any) -> Any:  # noqa: ANN401 - a JSON value in, the same out
        """*value* with a mark inside each special token of its texts, keys of objects included.

        Raises InvalidRequestError for a text with a special token that cannot be marked, or with noncharacters beside one.
        """
        match value:
            case str():
                return self._marked_text(value)
            case Mapping():
                return {self.marked(key): self.marked(item) for key, item in value.items()}
            case [*items]:
                return [self.marked(item) for item in items]
            case _:
                return value

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation with marks; raises InvalidRequestError when the model's tokens are not kept apart."""
        renamed, expected = self._token.subn(lambda found: _name(self.tokenizer.special[found[0]]), rendered)
        ids = list(self._engine().encode(renamed.replace(MARK, ""), add_special_tokens=False).ids)
        special = frozenset(self.tokenizer.special.values())
        if sum(i in special for i in ids) != expected:
            raise _refusal("special tokens of the model")
        return ids

    def _marked_text(self, text: str) -> str:
        marked = self._beginnings.sub(rf"\1{MARK}", text)
        if text[:1] and any(text[:n] in self._tails for n in self._lengths(text)):
            marked = marked[0] + MARK + marked[1:]
        if any(text[-n:] in self._heads for n in self._lengths(text)):
            marked = marked[:-1] + MARK + marked[-1]
        if marked == text:
            return text
        if found := self._token.search(marked):
            raise _refusal(found[0])
        if found := re.search(f"[{MARK}{OPEN}{CLOSE}]", text):
            raise _refusal(f"U+{ord(found[0]):04X} beside special tokens")
        return marked

    def _lengths(self, text: str) -> range:
        longest = max(map(len, self.tokenizer.special), default=0)
        return range(HALF_CHARS, min(len(text), longest) + 1)

    def _engine(self) -> Engine:
        with self._lock:
            if self._twin is None:
                self._twin = _twin_of(self.tokenizer)
            return self._twin


def _name(token: int) -> str:
    return f"{OPEN}{token}{CLOSE}"


def _twin_of(tokenizer: Tokenizer) -> Engine:
    """The same tokenizer, its special tokens renamed wherever their texts stand."""
    names = {text: _name(token) for text, token in tokenizer.special.items()}
    described = json.loads(tokenizer.engine.to_str())
    for added in described["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = described["model"]
    model["vocab"] = _renamed(model["vocab"], names)
    model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    described["post_processor"] = None  # nothing is put around a conversation, and it would name the old texts
    return Engine.from_str(json.dumps(described))


def _renamed(vocabulary: Mapping[str, int] | Sequence[Sequence[Any]], names: Mapping[str, str]) -> object:
    """Of most models an object, of unigram models a list of texts and scores."""
    if isinstance(vocabulary, Mapping):
        return {names.get(text, text): token for text, token in vocabulary.items()}
    return [[names.get(text, text), score] for text, score in vocabulary]


def _refusal(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the messages hold {what}, which this model's tokenizer cannot read as plain text",
        hint="remove it, or put a space inside",
        param="messages",
    )
