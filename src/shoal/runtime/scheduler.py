"""Which rows enter the pipeline next: a pure function of the live sequences and of what is already in flight.

Policy of this release (another policy is another function, never a flag):

- A sequence is ready while the ids of further rows are known.  A decoding sequence is therefore in at most one frame; chunks of a
  prompt follow each other down the pipeline, which keeps all its stages busy during a prefill.
- Prefill and decode take turns while both are ready, and while anybody decodes only one chunk is in the pipeline: a
  long prompt delays the others by one chunk per turn, not by its length.
- While anybody decodes, chunks are so short that one takes about `stall_s`, as fast as chunks have gone through the pipeline so
  far: a fixed number of rows would be nothing on one machine and a second on another.
- Turns are by the step last served, oldest first (round robin).
- The sequences that decode are spread evenly over the frames that may be in flight, so that with n frames all n stages work; with
  one frame they all go together.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from shoal.ids import RequestId
from shoal.runtime.ports import SequenceStep
from shoal.runtime.sequence import LiveSequence


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`in_flight` frames with rows may be in the pipeline at once; a prompt enters in chunks of `chunk_rows`.

    While others decode, a chunk takes about `stall_s`, but has `LEAST_ROWS` at least.
    `queue_limit` requests may wait for a slot; interactive ones go before batch requests that have waited less than
    `batch_patience_s` longer, and wait about as long as an answer takes, or `queue_s` if that is longer.
    """

    in_flight: int = 4
    chunk_rows: int = 128
    stall_s: float = 0.1
    queue_limit: int = 64
    batch_patience_s: float = 30.0
    queue_s: float = 0.25
    replays_exactly: bool = True
    """The rows of a reproducible answer that goes on are computed one by one, as before; else in chunks, like those of others."""


LEAST_ROWS = 16
"""Shorter chunks cost more than they spare the others."""
_NEWEST = 0.3


@dataclass(slots=True)
class Pace:
    """How long a row of a prompt holds up a stage, by the newest chunks; 0 until one has come through."""

    row_s: float = 0.0

    def passed(self, rows: int, took_s: float) -> None:
        """A chunk is through; it took so long on a stage, if all take alike."""
        seen_s = took_s / rows
        self.row_s = seen_s if not self.row_s else self.row_s + _NEWEST * (seen_s - self.row_s)

    def rows(self, settings: SchedulerSettings) -> int:
        """Of a chunk while others decode."""
        if not self.row_s:
            return settings.chunk_rows
        return max(min(LEAST_ROWS, settings.chunk_rows), min(settings.chunk_rows, int(settings.stall_s / self.row_s)))


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """What the pipeline holds now: frames with rows, those of them that are prefill, and the kind that went last."""

    frames: int = 0
    prefill_frames: int = 0
    last_was_prefill: bool = False
    chunk_rows: int = 0
    """Of a chunk while others decode; 0: as the settings say."""


def next_batch(
    live: Collection[LiveSequence], pressure: Pressure, settings: SchedulerSettings
) -> tuple[SequenceStep, ...]:
    """The rows of the next frame; empty when nothing can or may run."""
    if pressure.frames >= settings.in_flight or not [s for s in live if s.ready]:
        return ()
    everyone = sorted(live, key=lambda s: s.last_step)
    prefilling = [s for s in everyone if s.in_prefill]
    decoding = [s for s in everyone if s.decodes]
    ready = [s for s in decoding if s.ready]
    crowded = bool(decoding) and pressure.prefill_frames > 0
    prefill_turn = not ready or not pressure.last_was_prefill
    if prefilling and prefill_turn and not crowded:
        return (next_chunk(prefilling[0], chunk_rows(live, pressure, settings), exactly=settings.replays_exactly),)
    width = -(-len(decoding) // settings.in_flight)
    return tuple(_rows(s, s.known - s.scheduled) for s in ready[:width])


def chunk_rows(live: Collection[LiveSequence], pressure: Pressure, settings: SchedulerSettings) -> int:
    """How long the next chunk of a prompt may be."""
    waits = any(s.decodes for s in live)
    return pressure.chunk_rows if waits and pressure.chunk_rows else settings.chunk_rows


def is_prefill(batch: Sequence[SequenceStep], live: Mapping[RequestId, LiveSequence]) -> bool:
    """Whether a batch made by `next_batch` carries a chunk of a prompt (asked before its rows are counted as scheduled)."""
    return any(live[step.request].in_prefill for step in batch)


def next_chunk(sequence: LiveSequence, chunk_rows: int, *, exactly: bool = True) -> SequenceStep:
    """The next rows of a prompt.  None is left alone: its bits would differ from those of a row in a chunk (`prefix`).

    Of an answer that goes on, a reproducible one has the rows of its tokens one by one, as they were computed before, if *exactly*.
    """
    prompt = len(sequence.request.prompt)
    one_by_one = exactly and sequence.request.reproducible and bool(sequence.request.resume)
    if one_by_one and sequence.scheduled >= prompt:
        return _rows(sequence, 1)
    left = (prompt if one_by_one else sequence.known) - sequence.scheduled
    count = min(chunk_rows, left)
    return _rows(sequence, count - 1 if left - count == 1 and count > 2 else count)


def _rows(sequence: LiveSequence, count: int) -> SequenceStep:
    start = sequence.scheduled
    wants_token = start + count == sequence.known
    return SequenceStep(
        request=sequence.request.request,
        slot=sequence.slot,
        start=start,
        count=count,
        logits=1 if wants_token else 0,
        exact=sequence.request.reproducible,
    )
