"""What only the last stage does: turn logits into tokens.

It keeps prompt, parameters and output of every open request, so that nothing but a header travels to it and nothing but
token ids leaves it (ADR 7).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.errors import ShardLostError, ShoalError
from shoal.ids import RequestId
from shoal.runtime.frames import Failure, OpenedSequence, RequestTokens
from shoal.runtime.grammar import Bound, Grammars, Matcher, NoGrammars
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array, SampledToken, SamplingParams
from shoal.runtime.sampling import sample


@dataclass(slots=True)
class Sampler:
    """History of one request, as far as sampling needs it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    matcher: Matcher | None = None
    output: list[int] = field(default_factory=list)

    @property
    def bound(self) -> Bound:
        """What is to be said of the tokens so far."""
        if self.matcher is None:
            return Bound.FREE
        return Bound.COMPLETE if self.matcher.complete(self.output) else Bound.OPEN

    def take(self, logits: Array, position: int) -> SampledToken:
        """Sample the token at *position*; ids from there on are forgotten first (a step may be repeated)."""
        del self.output[max(0, position - len(self.prompt)) :]
        allowed = self.matcher.allowed(self.output) if self.matcher is not None else None
        token = sample(logits, self.params, prompt=self.prompt, output=self.output, position=position, allowed=allowed)
        self.output.append(token.token)
        return token


@dataclass(slots=True)
class LastStage:
    """Samplers by request.  Owned by one stage machine."""

    grammars: Grammars = field(default_factory=NoGrammars)
    samplers: dict[RequestId, Sampler] = field(default_factory=dict)

    def open(self, opened: OpenedSequence) -> None:
        matcher = self.grammars.matcher(opened.grammar) if opened.grammar is not None else None
        self.samplers[opened.request] = Sampler(opened.prompt, opened.sampling, matcher, list(opened.resume))

    def close(self, request: RequestId) -> None:
        self.samplers.pop(request, None)

    def sample_step(
        self, sequences: Iterable[SequenceStep], logits: Array, drafts: Mapping[RequestId, tuple[int, ...]]
    ) -> tuple[tuple[RequestTokens, ...], tuple[Failure, ...]]:
        """Tokens of the wanted rows: `logits [R, V]` holds them in the order of *sequences*; *drafts* as in the frame."""
        tokens: list[RequestTokens] = []
        failed: list[Failure] = []
        row = 0
        for step in sequences:
            rows = logits[row : row + step.logits]
            row += step.logits
            if not step.logits:
                continue
            sampler = self.samplers.get(step.request)
            if sampler is None:
                text = "this sequence was closed while it ran"
                failed.append(Failure(request=step.request, code=ShardLostError.code, text=text))
                continue
            try:
                tokens.append(_sample_rows(sampler, step, rows, drafts.get(step.request, ())))
            except ShoalError as error:
                failed.append(Failure(request=step.request, code=error.code, text=str(error)))
        return tuple(tokens), tuple(failed)


def _sample_rows(sampler: Sampler, step: SequenceStep, rows: Array, draft: tuple[int, ...]) -> RequestTokens:
    """One token per row, up to the first that the draft did not foresee: what follows was computed from a wrong id.

    Each draw sees the tokens before it, guessed rightly or not guessed at all: the answer is that of plain decoding (ADR 8).
    """
    first = step.start + step.count - step.logits + 1
    drawn: list[SampledToken] = []
    bound = Bound.FREE
    for i, row in enumerate(rows):
        drawn.append(sampler.take(row, first + i))
        bound = sampler.bound
        if bound is Bound.COMPLETE or (i < len(draft) and drawn[-1].token != draft[i]):
            break
    return RequestTokens(request=step.request, tokens=tuple(drawn), bound=bound)
