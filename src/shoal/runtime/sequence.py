"""A request while the first stage serves it."""

from dataclasses import dataclass, field

from shoal.runtime.prefix import Cached, Reuse
from shoal.runtime.request import FinishReason, GenerateRequest


@dataclass(slots=True)
class LiveSequence:
    """Token ids are the ground truth (ADR 9); `scheduled` of them have been handed to the pipeline as rows.

    While guessed ids are in the pipeline, `scheduled` counts them too and may be beyond what is known.
    `last_step` is the newest step that it took part in: the scheduler's turn order.
    """

    request: GenerateRequest
    reply_to: str
    slot: int
    stop_ids: frozenset[int]
    output: list[int] = field(default_factory=list)
    scheduled: int = 0
    last_step: int = -1
    opened: bool = False
    began_s: float = 0.0
    """When it was given its slot."""
    deadline_s: float = float("inf")
    """When its time has passed."""
    own: Cached | None = None
    """What its slot held when it got it."""
    reused: int = 0
    """It began behind so many positions that were in the cache."""
    exact: int = 0
    """So many of its first positions have the bits of rows in chunks, once they are computed."""
    began_step: int = -1
    """Failures of older steps are none of its: it began again."""

    @property
    def known(self) -> int:
        """How many token ids are known: prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def given(self) -> int:
        """Positions whose ids came with the request."""
        return len(self.request.prompt) + len(self.request.resume)

    @property
    def in_prefill(self) -> bool:
        return self.scheduled < self.given

    @property
    def decodes(self) -> bool:
        """Whether it waits for a lap for each of its tokens."""
        return bool(self.output) and not self.in_prefill

    @property
    def ready(self) -> bool:
        """Whether the ids of further rows are known.  Chunks of a prompt may follow each other without waiting for an answer."""
        return self.scheduled < self.known

    def ids(self, start: int, count: int) -> tuple[int, ...]:
        """Token ids of positions [start, start + count)."""
        prompt, stop = self.request.prompt, start + count
        output = self.output[max(0, start - len(prompt)) : max(0, stop - len(prompt))]
        return (*prompt[start:stop], *output)

    def held(self, since_s: float = 0.0) -> Cached:
        """What its slot holds, once the pipeline is through with what was sent."""
        count = min(self.scheduled, self.known)
        return Cached(self.slot, self.request.request, self.ids(0, count), min(self.exact, count), since_s)

    def begin(self, reuse: Reuse | None) -> None:
        """The pipeline is about to hear of it: it begins behind what is there."""
        self.reused = self.scheduled = reuse.count if reuse else 0
        self.exact = len(self.request.prompt)
        if reuse is not None and reuse.exact < reuse.count:
            self.exact = reuse.exact
        elif reuse is not None and self.known - reuse.count == 1:  # the one row that is left is computed alone
            self.exact = reuse.count

    def again(self, step: int) -> None:
        """What it began behind is not everywhere: it begins at its first position, with *step* or a later one."""
        self.opened, self.own, self.began_step = False, None, step
        self.begin(None)

    def settle(self) -> None:
        """Guesses were answered: rows of wrong ones are to be run again, with the right ids."""
        self.scheduled = min(self.scheduled, self.known - 1)

    def accept(self, token: int, context_tokens: int) -> FinishReason | None:
        """Take a sampled token; the reason if it ends the answer.  A stop token is not kept."""
        if token in self.stop_ids:
            return FinishReason.STOP
        self.output.append(token)
        full = self.known >= context_tokens
        return FinishReason.LENGTH if full or len(self.output) >= self.request.max_tokens else None
