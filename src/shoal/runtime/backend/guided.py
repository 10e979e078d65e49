"""Grammars by llguidance: the one module that imports it.

Its parser works on bytes, and a token is fixed bytes (`model.tokenizer`), so the two agree on what an answer's text is for every
tokenizer that we read.  Where a grammar leaves no choice of bytes the mask is narrowed to the token that the model's own
tokenizer would take there, as in the texts that the model learned from.

Reading a tokenizer and compiling a large schema take up to a second.  Both happen on a thread of their own, while the prompt
goes through the pipeline; only the first draw of that answer waits for them.  What was compiled is kept for the next answers.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shoal.errors import InvalidRequestError, ShoalError, UnsupportedVersionError
from shoal.model.tokenizer import Tokenizer
from shoal.runtime.grammar import JSON_WHITESPACE, Allowed, Grammar, GrammarKind, Matcher, check_size

if TYPE_CHECKING:
    from llguidance import TokenizerWrapper

KEPT = 16
"""So many compiled grammars are kept per model: from tens of KB each to a few MB for large schemas."""
_HIDDEN = "\x02"
"""Stands before a text that is tokenised by itself, so that no tokenizer puts a space before it."""


def validate(grammar: Grammar, param: str = "response_format") -> None:
    """Raise InvalidRequestError, naming *param* and the reason, for a grammar that no answer can follow.

    Needs no model; may take a second.
    """
    try:
        check_size(grammar)
        failed, said = LLMatcher.validate_grammar_with_warnings(_written(grammar), limits=_limits())
        if failed:
            raise _wrong(grammar, said[0])
    except InvalidRequestError as error:
        error.param = param
        raise


@dataclass(slots=True)
class GuidedGrammars:
    """Matchers over the tokens that *read* gives, of a model whose logits have *vocabulary* entries and which ends with *ends*."""

    read: Callable[[], Tokenizer]
    vocabulary: int
    ends: tuple[int, ...]
    _pool: ThreadPoolExecutor = field(init=False)
    _tokens: LLTokenizer | None = None
    _compiled: OrderedDict[Grammar, LLMatcher] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def matcher(self, grammar: Grammar) -> Matcher:
        """See `Grammars.matcher`."""
        ends = frozenset(self.ends)
        return GuidedMatcher(self._pool.submit(self._compile, grammar), grammar, self.vocabulary, ends)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """On the pool's only thread."""
        if self._tokens is None:
            self._tokens = tokens_of(self.read(), self.vocabulary, self.ends)
        if grammar not in self._compiled:
            made = LLMatcher(self._tokens, _written(grammar), log_level=0, limits=_limits())
            if made.is_error():
                raise _wrong(grammar, made.get_error())
            self._compiled[grammar] = made
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[grammar]


@dataclass(slots=True)
class GuidedMatcher:
    """See `Matcher`.  Owned by one answer; what it has read of the output is `_read`."""

    made: Future[LLMatcher]
    grammar: Grammar
    vocabulary: int
    ends: frozenset[int]
    _matcher: LLMatcher | None = None
    _read: list[int] = field(default_factory=list)

    def allowed(self, output: Sequence[int]) -> Allowed:
        """See `Matcher.allowed`."""
        matcher = self._follow(output)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise self._broken(matcher)
        return np.unpackbits(bits, count=self.vocabulary, bitorder="little").view(np.bool_)

    def complete(self, output: Sequence[int]) -> bool:
        """See `Matcher.complete`."""
        return bool(output) and (output[-1] in self.ends or self._follow(output).is_stopped())

    def _follow(self, output: Sequence[int]) -> LLMatcher:
        """The parser behind *output*: back to where the two part, then on."""
        if self._matcher is None:
            self._matcher, self._read = self.made.result().deep_copy(), []
        matcher, same = self._matcher, _shared(self._read, output)
        if same < len(self._read):
            matcher.rollback(len(self._read) - same)
        new = list(output[same:])
        self._read[same:] = new
        if new and not matcher.consume_tokens(new):
            raise self._broken(matcher)
        return matcher

    def _broken(self, matcher: LLMatcher) -> ShoalError:
        """What a parser says that will not go on; the next question begins with a fresh one."""
        said, self._matcher = matcher.get_error(), None
        if matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex"):
            return _wrong(self.grammar, f"it is too complex to follow ({said})")
        return ShoalError(f"the answer does not follow its grammar: {said}", hint="send the request again")


def tokens_of(tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> LLTokenizer:
    """*tokenizer* as llguidance reads one, with ids up to *vocabulary*; one more id ends answers of a model that has no end."""
    return LLTokenizer(cast("TokenizerWrapper", _Words(tokenizer, vocabulary, ends)), eos_token=list(ends) or None)


class _Words:
    """llguidance's view of a tokenizer; the attributes' names are its own."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> None:
        names = {token: text.encode() for text, token in tokenizer.special.items()}
        pieces = (*tokenizer.pieces, *[b""] * (vocabulary - tokenizer.vocabulary))
        self.tokens = [names.get(token, piece) for token, piece in enumerate(pieces)]
        self.special_token_ids = sorted(names)
        self.eos_token_id = ends[0] if ends else len(self.tokens)
        if not ends:
            self.tokens.append(b"")
        self._tokenizer = tokenizer
        self._longest: dict[bytes, int] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are exactly *text*: as the model's tokenizer writes it, else the longest tokens first."""
        wanted, read = text.encode(), self._tokenizer.token_bytes
        for before in ("", _HIDDEN):
            ids = self._tokenizer.encode(before + text, add_special=False)
            for start in range(min(len(ids), 4)):
                if b"".join(map(read, ids[start:])) == wanted:
                    return ids[start:]
        return self._greedy(wanted)

    def _greedy(self, wanted: bytes) -> list[int]:
        if not self._longest:
            self._longest = {piece: token for token, piece in enumerate(self._tokenizer.pieces) if piece}
        ids, start = [], 0
        while start < len(wanted):
            found = next(
                (n for n in range(len(wanted) - start, 0, -1) if wanted[start : start + n] in self._longest), 0
            )
            if not found:
                break
            ids.append(self._longest[wanted[start : start + found]])
            start += found
        return ids


def _shared(known: Sequence[int], output: Sequence[int]) -> int:
    """How many ids both begin with; mostly the one goes on where the other ends."""
    short = min(len(known), len(output))
    if list(known[:short]) == list(output[:short]):
        return short
    return next(i for i in range(short) if known[i] != output[i])


def _written(grammar: Grammar) -> str:
    """*grammar* in llguidance's own form."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(
                _schema(grammar.text), defaults={"whitespace_pattern": JSON_WHITESPACE}
            )
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.text)
        case _:
            raise UnsupportedVersionError(
                f"this node knows no grammars of kind {grammar.kind!r}", hint="update Shoal on every node"
            )


def _schema(text: str) -> dict[str, object]:
    """The schema as a value, so that it cannot say more than a schema."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the schema is not JSON: {error}", param="response_format") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidRequestError("a schema must be an object or true", param="response_format")
    return schema


def _limits() -> LLParserLimits:
    return LLParserLimits(verbose_errors=False)  # what an answer was must not stand in an error


def _wrong(grammar: Grammar, said: str) -> InvalidRequestError:
    what = "JSON schema" if grammar.kind == GrammarKind.JSON_SCHEMA else f"grammar ({grammar.kind})"
    return InvalidRequestError(
        f"the {what} cannot be followed: {said.strip()}",
        hint="docs/guides/api.md lists what a schema may say",
        param="response_format",
    )
