"""What a lap's tokens make of a request: how its answer goes on, and whether it ends."""

from collections.abc import Sequence

from shoal.errors import MalformedFrameError, UnsupportedVersionError
from shoal.runtime.frames import Failure, RequestTokens
from shoal.runtime.grammar import Bound
from shoal.runtime.request import FinishReason, OutputDelta, SampledToken
from shoal.runtime.sequence import LiveSequence
from shoal.runtime.settings import StageSettings
from shoal.runtime.speculate.speculator import agreed

_UNBOUND = (
    "the last stage runs an older version of Shoal, which knows no grammars: update its node, or ask for free text"
)


def judge(
    sequence: LiveSequence, entry: RequestTokens, draft: Sequence[int], settings: StageSettings
) -> OutputDelta | Failure:
    """Let *sequence* take the tokens of *entry* as far as *draft* was right, and one more; the piece of its answer they make.

    A token that cannot be the next one, and an answer that was to follow a grammar and did not, fail the request.
    """
    kept: list[SampledToken] = []
    finish = None
    right = agreed(entry.tokens, draft)
    for token in entry.tokens[: right + 1]:
        vocabulary = settings.vocabulary
        if token.position != sequence.known or token.token < 0 or 0 < vocabulary <= token.token:
            text = (
                f"the last stage answered token {token.token} at position {token.position} where {sequence.known} "
                f"is next, of a vocabulary of {vocabulary}"
            )
            return Failure(request=entry.request, code=MalformedFrameError.code, text=text)
        finish = sequence.accept(token.token, settings.context_tokens)
        if finish is not FinishReason.STOP:
            kept.append(token)
        if finish is not None:
            break
    sequence.settle()
    if entry.bound is Bound.COMPLETE and len(kept) == len(entry.tokens):
        finish = FinishReason.STOP  # the whole answer is there, even if max_tokens are as well
    constrained = entry.bound is not Bound.FREE
    if sequence.request.grammar is not None and not constrained:
        return Failure(request=entry.request, code=UnsupportedVersionError.code, text=_UNBOUND)
    return OutputDelta(
        request=entry.request, tokens=tuple(kept), finish=finish, constrained=constrained,
        drafted=len(draft), accepted=right, cached=sequence.reused if len(sequence.output) == len(kept) else 0,
    )  # fmt: skip
