"""Passes whose blocks repeat: identical layers, or a few kinds in turn (attention, feed-forward, attention, ...).

A model is a first block (an embedding), `units` groups of `period` blocks, and a last block (a head); the first and the last may
be missing.  A cut lies in a unit and at a *phase* of it, 0 between two units.  A device's shard then costs

    opening + unit cost x units between its two cuts + part[phase of the second cut] - part[phase of the first]

which is linear although cuts at every phase are allowed: finer cuts than whole units are not given up, so that a proof holds for
the problem as it was stated.  Which ranges fit is a limit of the units for each pair of phases.

Where units differ a little, each number here is the kindest of them: what is proven with them is still a true bound, and `exact`
is false.  Read off a pass alone, so the same holds for joules, money, and searches under a cap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.plan.arrays import INF, Flags, Floats, Whole
from shoal.plan.tables import Pass

LONGEST_PERIOD = 4
"""A phase more multiplies the links that a search must weigh."""
SAME = 1e-9
ALIKE = 0.05
"""Units that differ by more have a bound that is not worth having."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Where units begin: cut `first` + unit x `period`; `last` blocks follow the last unit."""

    period: int
    first: int
    last: int
    units: int

    def cuts(self, phase: int) -> slice:
        """Cuts of one phase, in order of their units."""
        stop = self.first + self.units * self.period
        return slice(self.first + phase, stop + (phase == 0), self.period)

    def cut(self, unit: int, phase: int) -> int:
        return self.first + unit * self.period + phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Chains from one first device; costs beside those of its blocks."""

    device: int
    entry: float
    end: Floats
    """[M] of ending on a device; infinite: not there."""
    room: Whole
    """[p] most units of the first stage by the phase of its stop; -1: it may not stop there."""
    alone: float
    """Cost of all blocks on this device; infinite: not allowed."""
    again: Whole | None
    """[p, p] most units of the first and the last stage together on this device, by the phases of stop and start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Periodic:
    """What a circuit or knapsack needs to know; M devices, p phases."""

    rhythm: Rhythm
    opening: Floats
    """[M]"""
    unit: Floats
    """[M] cost of a whole unit"""
    part: Floats
    """[M, p] cost of a unit's blocks before a phase"""
    before: Floats
    """[M] cost of the blocks before the first unit"""
    after: Floats
    """[M] cost of the blocks after the last"""
    hop: Floats
    """[M, M, p]"""
    room: Whole
    """[M, p, p] most units of a stage in the middle, by the phases of its start and stop; -1: none"""
    room_last: Whole
    """[M, p] most units of a last stage, by the phase of its start"""
    ends: tuple[Ends, ...]
    exact: bool


def periodic(passes: Sequence[Pass]) -> Periodic | None:
    """The shortest exact rhythm of the passes of one search, else one that is nearly so; None where there is none."""
    costs = _costs(passes[0]) if passes else None
    if costs is None:
        return None
    kind = None
    for rhythm in _rhythms(passes[0].start.size - 1):
        spread = _spread(rhythm, costs[1], passes[0].hop)
        if spread <= SAME or (spread <= ALIKE and kind is None):
            form = _read(passes, rhythm, costs, even=spread <= SAME)
            if form.exact:
                return form
            kind = kind or form
    return kind


def in_step(passes: Sequence[Pass], rhythm: Rhythm) -> Periodic | None:
    """The same for a rhythm that is given; None where the passes do not follow it exactly."""
    costs = _costs(passes[0])
    if costs is None or _spread(rhythm, costs[1], passes[0].hop) > SAME:
        return None
    form = _read(passes, rhythm, costs, even=True)
    return form if form.exact else None


def _rhythms(blocks: int) -> Iterator[Rhythm]:
    for period in range(1, LONGEST_PERIOD + 1):
        for first, last in ((0, 0), (1, 0), (0, 1), (1, 1)):
            units, rest = divmod(blocks - first - last, period)
            if not rest and units >= (period > 1 or first + last == 0):
                yield Rhythm(period=period, first=first, last=last, units=units)


def _costs(search: Pass) -> tuple[Floats, Floats] | None:
    """[M] openings and [M, N] block costs; None where runs are not sums of them.  Infinite: a block that never runs there."""
    run = search.sums
    if run is None:
        return None
    blocks = run.shape[1] - 1
    index = np.arange(blocks)
    one, two = run[:, index, index + 1], run[:, index[:-1], index[:-1] + 2]
    with np.errstate(invalid="ignore"):
        opening = one[:, :-1] + one[:, 1:] - two
    known = np.isfinite(opening)
    opening = np.where(known.any(axis=1), np.where(known, opening, INF).min(axis=1, initial=INF), 0.0)
    block = one - opening[:, None]
    sums = np.concatenate(
        [np.zeros((run.shape[0], 1)), np.cumsum(np.where(np.isfinite(block), block, 0.0), axis=1)], axis=1
    )
    finite = np.isfinite(run)
    told = opening[:, None, None] + sums[:, None, :] - sums[:, :, None]
    error = np.abs(np.where(finite, run, 0.0) - np.where(finite, told, 0.0)).max(axis=(1, 2))
    if (error > SAME * (np.abs(opening) + sums[:, -1]) + 1e-15).any():
        return None
    return opening, block


def _spread(rhythm: Rhythm, block: Floats, hop: Floats) -> float:
    """How much units differ, relative to the dearest."""
    worst = 0.0
    for phase in range(rhythm.period if rhythm.units else 0):
        worst = max(worst, _range(block[:, rhythm.cuts(phase)][:, : rhythm.units]))
    if worst > ALIKE:
        return worst
    for phase in range(rhythm.period):
        worst = max(worst, _range(hop[:, :, _inner(rhythm, phase, hop.shape[2] - 1)]))
    return worst


def _inner(rhythm: Rhythm, phase: int, blocks: int) -> NDArray[np.intp]:
    cuts = np.arange(blocks + 1)[rhythm.cuts(phase)]
    return cuts[(cuts > 0) & (cuts < blocks)]


def _range(values: Floats) -> float:
    if not values.shape[-1]:
        return 0.0
    low, high = values.min(axis=-1), values.max(axis=-1)
    if ((high == INF) & (low < INF)).any():
        high = np.where(np.isfinite(values), values, -INF).max(axis=-1)
    wide = np.subtract(high, low, out=np.zeros_like(high), where=high > low)
    return float((wide / np.where((high > 0) & (high < INF), high, 1.0)).max(initial=0.0))


def _read(passes: Sequence[Pass], rhythm: Rhythm, costs: tuple[Floats, Floats], *, even: bool) -> Periodic:
    search, (opening, block) = passes[0], costs
    blocks, low = block.shape[1], _least_units(rhythm)
    each = np.stack([_least(block[:, rhythm.cuts(a)][:, : rhythm.units]) for a in range(rhythm.period)], axis=1)
    part = np.concatenate([np.zeros((len(block), 1)), np.cumsum(each, axis=1)], axis=1)
    hop = np.stack([_kindest(search.hop[:, :, _inner(rhythm, a, blocks)]) for a in range(rhythm.period)], axis=2)
    fits = np.isfinite(search.run)
    room, agree = _rooms(rhythm, fits, low)
    room_last, agree_last = _last_rooms(rhythm, fits[:, :, -1])
    ends, agree_ends = _ends(passes, rhythm)
    return Periodic(
        rhythm=rhythm,
        opening=opening,
        unit=part[:, -1],
        part=part[:, :-1],
        before=_finite(block[:, : rhythm.first].sum(axis=1)),
        after=_finite(block[:, blocks - rhythm.last :].sum(axis=1)),
        hop=hop,
        room=room,
        room_last=room_last,
        ends=ends,
        exact=even and _masks_agree(rhythm, search.hop) and agree and agree_last and agree_ends,
    )


def _least_units(rhythm: Rhythm) -> Whole:
    """[p, p] fewest units of a stage that is not empty, by the phases of its start and stop."""
    phases = np.arange(rhythm.period)
    return (phases[:, None] >= phases[None, :]).astype(np.int64)


def _rooms(rhythm: Rhythm, fits: Flags, low: Whole) -> tuple[Whole, bool]:
    room = np.full((fits.shape[0], rhythm.period, rhythm.period), -1, np.int64)
    agree = True
    last = fits.shape[2] - 1
    for a in range(rhythm.period):
        for b in range(rhythm.period):
            starts, stops = rhythm.cuts(a), rhythm.cuts(b)
            part = fits[:, starts, stops].copy()
            rows = np.arange(last + 1)[starts]
            columns = np.arange(last + 1)[stops]
            inside = (rows > 0)[:, None] & (columns < last)[None, :]
            units = np.arange(columns.size)[None, :] - np.arange(rows.size)[:, None]
            possible = inside & (units >= low[a, b])
            part &= possible
            room[:, a, b] = np.where(part, units, -1).max(axis=(1, 2), initial=-1)
            agree &= bool((part == (possible & (units <= room[:, a, b][:, None, None]))).all())
    return room, agree


def _last_rooms(rhythm: Rhythm, fits: Flags) -> tuple[Whole, bool]:
    """From the fits [M, N+1] of stages that end with the model, by their start."""
    room = np.full((fits.shape[0], rhythm.period), -1, np.int64)
    agree, last = True, fits.shape[1] - 1
    for a in range(rhythm.period):
        starts = np.arange(last + 1)[rhythm.cuts(a)]
        possible = (starts > 0) & (starts < last)
        units = rhythm.units - np.arange(starts.size)
        part = fits[:, starts] & possible
        room[:, a] = np.where(part, units, -1).max(axis=1, initial=-1)
        agree &= bool((part == (possible & (units <= room[:, a][:, None]))).all())
    return room, agree


def _ends(passes: Sequence[Pass], rhythm: Rhythm) -> tuple[tuple[Ends, ...], bool]:
    found, agree = [], True
    for first in dict.fromkeys(search.first for search in passes):
        mine = [search for search in passes if search.first == first]
        ends, fine = _end(mine, rhythm)
        found.append(ends)
        agree &= fine
    return tuple(found), agree


def _end(mine: list[Pass], rhythm: Rhythm) -> tuple[Ends, bool]:
    plain = next(search for search in mine if search.close is None)
    closing = [search for search in mine if search.close is not None]
    start = plain.start.copy()
    together, agree = None, True
    for search in closing:
        start = np.minimum(start, search.start)
    first, last = plain.first, start.size - 1
    open_ended = np.isfinite(plain.start).any() and not closing
    if closing:
        pairs = np.zeros((last + 1, last + 1), bool)
        for search in closing:
            assert search.close is not None
            pairs |= np.isfinite(search.start)[:, None] & np.isfinite(search.close)[None, :]
        together, agree = _joint(rhythm, pairs)
    room = np.full(rhythm.period, -1, np.int64)
    for phase in range(rhythm.period):
        cuts = np.arange(last + 1)[rhythm.cuts(phase)]
        possible = (cuts > 0) & (cuts < last)
        part = np.isfinite(start)[cuts] & possible
        units = np.arange(cuts.size)
        room[phase] = np.where(part, units, -1).max(initial=-1)
        agree &= bool((part == (possible & (units <= room[phase]))).all())
    known = np.isfinite(start) & np.isfinite(plain.run[first, 0])
    entry = float((start[known] - plain.run[first, 0][known]).min(initial=INF))
    alone = float(plain.start[last] + plain.end[first])
    end = plain.end if open_ended else np.full(plain.end.size, INF)
    return Ends(device=first, entry=entry, end=end, room=room, alone=alone, again=together), agree


def _joint(rhythm: Rhythm, pairs: Flags) -> tuple[Whole, bool]:
    """From the fits [N+1 stop, N+1 start] of a first and a last stage on one device."""
    room = np.full((rhythm.period, rhythm.period), -1, np.int64)
    agree, last = True, pairs.shape[0] - 1
    cuts = np.arange(last + 1)
    apart = cuts[None, :] > cuts[:, None]
    for b in range(rhythm.period):
        for a in range(rhythm.period):
            stops, starts = cuts[rhythm.cuts(b)], cuts[rhythm.cuts(a)]
            possible = apart[stops][:, starts] & (stops > 0)[:, None] & (starts < last)[None, :]
            units = np.arange(stops.size)[:, None] + rhythm.units - np.arange(starts.size)[None, :]
            part = pairs[stops][:, starts] & possible
            room[b, a] = np.where(part, units, -1).max(initial=-1)
            agree &= bool((part == (possible & (units <= room[b, a]))).all())
    return room, agree


def _masks_agree(rhythm: Rhythm, hop: Floats) -> bool:
    last = hop.shape[2] - 1
    return all(
        bool((finite.all(axis=2) == finite.any(axis=2)).all())
        for phase in range(rhythm.period)
        for finite in (np.isfinite(hop[:, :, _inner(rhythm, phase, last)]),)
        if finite.shape[2]
    )


def _least(values: Floats) -> Floats:
    """[M] the cheapest block of a kind; 0 where none may run, which the rooms forbid."""
    return _finite(values.min(axis=1, initial=INF))


def _kindest(values: Floats) -> Floats:
    return np.asarray(values.min(axis=2, initial=INF))


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 0.0)
