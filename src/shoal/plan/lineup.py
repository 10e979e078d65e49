"""Devices that identical units may be dealt to: what crowds are solved on, with as many devices as are still in question.

Device 0 is the first stage's.  A chain costs what its devices cost and what its links cost:

    entry + unit cost x units of the first  +  for each other  link + opening + unit cost x units  +  the end of the last
"""

from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.found import Choice
from shoal.plan.periodic import Periodic
from shoal.plan.tables import Chain, Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineup:
    """M devices, the first one in front."""

    units: int
    devices: Whole
    """[M] as the tables number them"""
    hop: Floats
    """[M, M] infinite to a device itself, and to the first"""
    opening: Floats
    unit: Floats
    room: Whole
    """[M] most units of a stage in the middle"""
    room_last: Whole
    end: Floats
    """[M] of being last"""
    least_last: int
    start: Floats
    """[U+1] cost of the first stage by its units"""
    wanted: Whole
    """[M] 1: must take part"""
    stages: tuple[int, int]
    """Fewest and most"""

    def only(self, keep: Whole) -> "Lineup":
        """The same with these places of it alone; the first is among them."""
        return Lineup(
            units=self.units,
            devices=self.devices[keep],
            hop=self.hop[np.ix_(keep, keep)],
            opening=self.opening[keep],
            unit=self.unit[keep],
            room=self.room[keep],
            room_last=self.room_last[keep],
            end=self.end[keep],
            least_last=self.least_last,
            start=self.start,
            wanted=self.wanted[keep],
            stages=self.stages,
        )


Parts = tuple[tuple[int, int], ...]
"""Devices in the order of their stages, and their units."""


def lineup(tables: Tables, form: Periodic, choice: Choice) -> Lineup:
    """All devices that may take part; *form* has period 1, one first device, and no way back to it."""
    ends, first = form.ends[0], form.ends[0].device
    others = [device for device in range(len(tables.nodes)) if device != first and not choice.forbid >> device & 1]
    chosen = np.array([first, *others], np.int64)
    hop = form.hop[np.ix_(chosen, chosen)][:, :, 0].copy()
    hop[:, 0] = INF
    np.fill_diagonal(hop, INF)
    taken = np.arange(form.rhythm.units + 1)
    begin = ends.entry + form.opening[first] + form.before[first] + form.unit[first] * taken
    may = (taken >= int(not form.rhythm.first)) & (taken <= int(ends.room[0]))
    most = min(tables.stages_exactly or tables.max_stages, tables.max_stages, chosen.size)
    return Lineup(
        units=form.rhythm.units,
        devices=chosen,
        hop=hop,
        opening=form.opening[chosen],
        unit=form.unit[chosen],
        room=form.room[chosen, 0, 0],
        room_last=form.room_last[chosen, 0],
        end=form.after[chosen] + ends.end[chosen],
        least_last=int(not form.rhythm.last),
        start=np.where(may, begin, INF),
        wanted=np.array([choice.require >> int(device) & 1 for device in chosen], np.int64),
        stages=(max(2, tables.stages_exactly), most),
    )


def chain_from(form: Periodic, parts: Parts) -> Chain:
    """The stages in blocks, from devices as the tables number them."""
    chain: list[tuple[int, int, int]] = []
    unit, start = 0, 0
    for device, took in parts[:-1]:
        unit += took
        stop = form.rhythm.cut(unit, 0)
        chain.append((device, start, stop))
        start = stop
    blocks = form.rhythm.first + form.rhythm.units * form.rhythm.period + form.rhythm.last
    return (*chain, (parts[-1][0], start, blocks))
