"""The relaxation again, remembering some of what it used: the bound that label setting prunes by.

Each device has neighbours that a path still remembers when it is there (ng-routes: Baldacci, Mingozzi, Roberti 2011): a device that
is used may be used again only after a device that does not know it.  Backward dynamic programming over (device, set of its
neighbours that are used, blocks done); with no neighbours this is `chain.relax`, where everybody knows everybody it is exact.
Between the two the bound rises, and the work doubles with each neighbour.  The neighbours are learnt from the repetitions of the
relaxation's own paths, which are local: within a site, or between two quick devices.

Remembering the same few devices everywhere (decremental state-space relaxation) was measured and raised the bound far less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.moves import finish
from shoal.plan.tables import Pass

PIECE = 1 << 16
"""Numbers that one array operation touches; more leave the processor's cache."""

Neighbours = tuple[tuple[int, ...], ...]
"""[M] the devices that are remembered at each; never itself, and never the first, which is not opened again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What remains to pay, by the set S of neighbours that are used (bit b: the device's neighbour b)."""

    neighbours: Neighbours
    to_go: Floats
    """[N+1, M, S] after device j has stopped at a cut."""
    to_open: Floats
    """[N+1, M, S] when device j is about to start at a cut."""
    onward: Whole
    """[M from, M to, S] the place [to, set] in a flat [M * S]; what may not be opened again leads to `M * S`"""
    bound: float
    """Of the pass."""


def learnt(neighbours: Neighbours, path: Sequence[int], most: int) -> Neighbours:
    """Neighbours that forbid the path's repetitions, as far as *most* for each device allows."""
    grown = [list(known) for known in neighbours]
    last: dict[int, int] = {}
    for position, device in enumerate(path):
        for between in path[last.get(device, position) + 1 : position]:
            if device not in grown[between] and len(grown[between]) < most:
                grown[between].append(device)
        last[device] = position
    return tuple(tuple(known) for known in grown)


def remember(search: Pass, neighbours: Neighbours) -> Remembered:
    """Bound a pass: bounded work, `work` says how much."""
    blocks, count = search.start.size - 1, len(neighbours)
    sets = 1 << max(len(known) for known in neighbours)
    onward, ends = _onward(neighbours, sets), finish(search)
    to_go = np.full((blocks + 1, count, sets), INF)
    to_open = np.full((blocks + 1, count, sets), INF)
    to_go[blocks] = ends[:, blocks, None]
    for cut in range(blocks - 1, 0, -1):
        _open(search, to_go, to_open[cut], cut)
        to_open[cut, search.first] = INF
        _leave(search.hop[:, :, cut], onward, to_open[cut], to_go[cut])
        np.minimum(to_go[cut], ends[:, cut, None], out=to_go[cut])
    bound = float((search.start + to_go[:, search.first, 0]).min())
    return Remembered(neighbours=neighbours, to_go=to_go, to_open=to_open, onward=onward, bound=bound)


def work(search: Pass, most: int) -> int:
    """Numbers that `remember` goes through, and about ten times those that it keeps."""
    blocks, count = search.start.size - 1, len(search.end)
    return blocks * count * (count + 20) << most


def path_of(search: Pass, table: Remembered) -> list[int] | None:
    """The devices of the path behind the bound, in order, a closing stage left out; None when nothing reaches the end."""
    if not np.isfinite(table.bound):
        return None
    count, sets = len(table.neighbours), table.to_go.shape[2]
    cut = int(np.argmin(search.start + table.to_go[:, search.first, 0]))
    device, used, path, ends = search.first, 0, [search.first], finish(search)
    while ends[device, cut] > table.to_go[cut, device, used]:
        places = table.onward[device, :, used]
        costs = search.hop[device, :, cut] + np.append(table.to_open[cut].ravel(), INF)[places]
        place = int(places[int(np.argmin(costs))])
        device, used = divmod(place, sets)
        cut = int(np.argmin(search.run[device, cut] + table.to_go[:, device, used]))
        path.append(device)
        assert len(path) <= count * search.start.size
    return path


def _onward(neighbours: Neighbours, sets: int) -> Whole:
    count = len(neighbours)
    knows = np.zeros((count, sets, count + 1), bool)
    index = np.arange(sets)
    table = np.full((count, max(1, *(len(known) for known in neighbours))), count)
    for device, known in enumerate(neighbours):
        knows[device, :, device] = True
        for bit, other in enumerate(known):
            knows[device, index >> bit & 1 == 1, other] = True
            table[device, bit] = other
    place = np.zeros((count, sets, count), np.int64)
    for bit in range(table.shape[1]):
        place |= knows[:, :, table[:, bit]].astype(np.int64) << bit
    place += np.arange(count) * sets
    place[knows[:, :, :count]] = count * sets
    return np.ascontiguousarray(place.transpose(0, 2, 1))


def _open(search: Pass, to_go: Floats, into: Floats, cut: int) -> None:
    """Fill [M, S]: the best shard of each device from *cut* on."""
    reach = np.isfinite(search.run[:, cut, :]).any(axis=0)
    last = int(np.flatnonzero(reach).max(initial=cut))
    if last == cut:
        return
    together = max(1, PIECE // (to_go.shape[2] * (last - cut)))
    for low in range(0, len(into), together):
        some = slice(low, low + together)
        runs = search.run[some, cut, cut + 1 : last + 1].T[:, :, None]
        into[some] = (runs + to_go[cut + 1 : last + 1, some]).min(axis=0)


def _leave(hop: Floats, onward: Whole, to_open: Floats, into: Floats) -> None:
    """Fill [M, S]: the best next device after each."""
    opened = np.append(to_open.ravel(), INF)
    together = max(1, PIECE // (to_open.size))
    for low in range(0, len(into), together):
        some = slice(low, low + together)
        into[some] = (hop[some, :, None] + opened[onward[some]]).min(axis=1)
