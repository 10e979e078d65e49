"""What a chain costs in a pass, and where to cut the model for devices in a given order."""

import numpy as np

from shoal.plan.arrays import INF
from shoal.plan.tables import Chain, Pass


def cost_of(search: Pass, chain: Chain) -> float:
    """Infinite where the pass does not allow it."""
    (device, start, stop), rest = chain[0], chain[1:]
    if device != search.first or start:
        return INF
    cost, last = float(search.start[stop]), search.start.size - 1
    for place, (there, cut, end) in enumerate(rest):
        cost += float(search.hop[device, there, cut])
        closes = search.close is not None and place == len(rest) - 1 and there == search.first
        cost += float(search.close[cut]) if closes and search.close is not None else float(search.run[there, cut, end])
        device, stop = there, end
    closed = search.close is not None and bool(rest) and device == search.first
    return INF if stop != last else cost + (0.0 if closed else float(search.end[device]))


def recut(search: Pass, order: tuple[int, ...]) -> tuple[float, Chain] | None:
    """The cheapest cuts for these devices in this order; the first again at the end is its second shard."""
    last = search.start.size - 1
    closes = search.close is not None and len(order) > 1
    if order[0] != search.first or closes != (len(order) > 1 and order[-1] == search.first):
        return None
    cost, cuts = search.start, []
    middle = order[1:-1] if closes else order[1:]
    for here, there in zip(order, middle, strict=False):
        through = (cost + search.hop[here, there])[:, None] + search.run[there]
        cuts.append(np.argmin(through, axis=0))
        cost = through.min(axis=0)
    stop, stops = last, [last]
    total = float(cost[last] + search.end[order[-1]])
    if closes and search.close is not None:
        closing = cost + search.hop[(*order[:1], *middle)[-1], search.first] + search.close
        stop = int(np.argmin(closing))
        total, stops = float(closing[stop]), [last, stop]
    for choice in reversed(cuts):
        stop = int(choice[stop])
        stops.append(stop)
    edges = (0, *reversed(stops))
    chain = tuple((device, edges[i], edges[i + 1]) for i, device in enumerate(order))
    return (total, chain) if np.isfinite(total) else None


def recut_best(passes: list[Pass], order: tuple[int, ...]) -> tuple[float, Chain] | None:
    """Over all passes of a search."""
    return min((found for search in passes if (found := recut(search, order))), default=None)
