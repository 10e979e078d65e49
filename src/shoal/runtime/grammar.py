"""What an answer may look like, and who says which token may come next.

A grammar travels with its request to the last stage, once, when the sequence opens; there a matcher says before each draw which
tokens may follow the output so far.  It is asked about the *output*, not told token by token: what it remembers of earlier
questions is its own business.  So a repeated step, a rejected draft and an answer that goes on after a failure need no
call of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidRequestError, RequestTooLargeError, ShoalError, UnsupportedModelError

Allowed = NDArray[np.bool_]

MAX_GRAMMAR_CHARS = 256 * 1024
"""It travels through every stage; OpenAI's own limit is 120,000 characters of names and values in a schema."""


JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Room for any indentation; without an end a model that has lost its way may write blanks until `max_tokens`."""


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


class Grammar(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The language of an answer.  `kind` is text, so that a kind of a later version does not make a frame unreadable."""

    kind: str
    text: str


JSON_OBJECT = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type":"object"}')
"""Any JSON object: OpenAI's JSON mode."""


class Bound(IntEnum):
    """What the last stage says of tokens that it gives: an older one, which knows no grammars, says nothing."""

    FREE = 0
    OPEN = 1
    """A grammar allowed them, and the answer may go on."""
    COMPLETE = 2
    """A grammar allowed them, and nothing may follow."""


class Matcher(Protocol):
    """One answer's grammar over a model's tokens.  A function of *output* alone; questions in order are cheap."""

    def allowed(self, output: Sequence[int]) -> Allowed:
        """Which tokens may follow; at least one may.

        Raises InvalidRequestError for a grammar that cannot be followed, ShoalError when *output* breaks it.
        """
        ...

    def complete(self, output: Sequence[int]) -> bool:
        """Whether *output* is a whole answer that nothing may follow, its end token excepted."""
        ...


class Grammars(Protocol):
    """Makes matchers for one model."""

    def matcher(self, grammar: Grammar) -> Matcher:
        """A fresh one, for one answer.  Returns at once; what is wrong with the grammar is raised when it is asked."""
        ...


class NoGrammars:
    """For stages that sample nothing, and models whose tokens have no text."""

    def matcher(self, grammar: Grammar) -> Matcher:
        """One that refuses whatever it is asked."""
        return Refusing(
            UnsupportedModelError(
                f"this model has no tokenizer here, so its answers cannot follow a grammar ({grammar.kind})",
                hint="ask without response_format and tools",
            )
        )


@dataclass(frozen=True, slots=True)
class Refusing:
    """The matcher of a grammar that cannot be followed."""

    why: ShoalError

    def allowed(self, output: Sequence[int]) -> Allowed:
        """Says why not."""
        del output
        raise self.why

    def complete(self, output: Sequence[int]) -> bool:
        """Says why not."""
        del output
        raise self.why


def check_size(grammar: Grammar) -> None:
    """Raise RequestTooLargeError for a grammar that is too long to travel."""
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise RequestTooLargeError(
            f"the grammar has {len(grammar.text):,} characters, {MAX_GRAMMAR_CHARS:,} are allowed",
            hint="leave descriptions out, or ask for a part of it",
            param="response_format",
        )


def check_grammar(grammar: Grammar | None, *, ignore_eos: bool) -> None:
    """Raise InvalidRequestError for what a pipeline cannot follow, as far as that shows without its tokens."""
    if grammar is None:
        return
    check_size(grammar)
    if ignore_eos:
        raise InvalidRequestError(
            "ignore_eos and a grammar contradict each other: the grammar says where the answer ends",
            hint="leave ignore_eos out",
            param="ignore_eos",
        )
