"""The frames that are in the pipeline, as its first stage counts them: whom each serves, and whether anything still comes out.

Frames are answered in order, so that whatever is skipped was lost; where nothing follows, a probe finds that out.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from shoal.ids import RequestId
from shoal.runtime.frames import InferStep
from shoal.runtime.scheduler import Pressure


@dataclass(slots=True)
class Flight:
    """A frame in the pipeline: whom it serves, and since when."""

    requests: tuple[RequestId, ...]
    sent_s: float
    """When it was sent; once our own part is done, when that was."""
    prefill: bool = False
    infer: InferStep | None = None
    probe: bool = False
    wants: tuple[RequestId, ...] = ()
    """Those of `requests` that a token must come for."""
    drafts: Mapping[RequestId, tuple[int, ...]] = field(default_factory=dict)
    """Ids that were guessed for them."""
    rows: int = 0
    begun_s: float = 0.0
    """When our own part began."""
    assisted: bool = False
    """A draft model was at work when it began."""


@dataclass(slots=True)
class Flights:
    """By step.  Owned by the first stage."""

    lost_s: float
    probe_s: float
    out: dict[int, Flight] = field(default_factory=dict)
    now_s: float = 0.0
    answered_s: float = 0.0
    stuck: bool = False
    """Nothing has come out of the pipeline for `lost_s` although something should."""

    def begin(self, step: int, flight: Flight) -> None:
        """A frame enters the pipeline."""
        flight.begun_s = self.now_s
        self.out[step] = flight

    def ran(self, step: int) -> None:
        """Our own part of a step is done: from now on the others are waited for."""
        if step in self.out:
            self.out[step].sent_s = self.now_s

    def answer(self, step: int) -> tuple[Flight | None, list[Flight]]:
        """The frame that was answered, None for one that nobody waits for, and those before it, which were lost."""
        self.answered_s, self.stuck = self.now_s, False
        if step not in self.out:
            return None, []
        lost = [self.out.pop(s) for s in [s for s in self.out if s < step]]
        return self.out.pop(step), lost

    def infers(self) -> list[InferStep]:
        """Inferences among them."""
        return [flight.infer for flight in self.out.values() if flight.infer]

    def pressure(self, *, last_was_prefill: bool, chunk_rows: int) -> Pressure:
        """What the scheduler asks about them."""
        flights = [f for f in self.out.values() if not f.probe]
        prefill = sum([f.prefill for f in flights])
        return Pressure(
            frames=len(flights), prefill_frames=prefill, last_was_prefill=last_was_prefill, chunk_rows=chunk_rows
        )

    def watch(self) -> None:
        """Notice when nothing comes out of the pipeline any more."""
        if self.out and self.now_s - max(self._oldest_s(), self.answered_s) > self.lost_s:
            self.stuck = True

    def probe_due(self, unacked: Container[int]) -> bool:
        """Whether to send a frame that only wants to be answered: one with work has been out for long, and no probe is on its way.

        Also while the pipeline is stuck: what was out is given up by then, nothing new is let in, and so nothing else would
        ever show that answers come again.
        """
        probes = [(step, f.sent_s) for step, f in self.out.items() if f.probe]
        idle = len(probes) == len(self.out)
        due_s = max([self._oldest_s(), *(sent_s for _, sent_s in probes)]) + self.probe_s
        early = bool(self.out) and self.now_s < due_s
        if early or (idle and not self.stuck) or any(step in unacked for step, _ in probes):
            return False
        if idle:
            self.out.clear()  # one probe is enough: whichever is answered, even one of these, ends it
        return True

    def _oldest_s(self) -> float:
        return min((f.sent_s for f in self.out.values()), default=self.now_s)
