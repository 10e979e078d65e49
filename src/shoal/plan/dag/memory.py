"""The cheapest tiers for all operators where memory is short: least cuts under prices on memory, then branch and bound.

A price per byte on a full tier keeps the problem a cut, and the cut less the price of all that is there bounds every
placement that fits (Lagrange).  Along one price the bound is concave and made of straight pieces: the best price lies
where the pieces of a too low and of a too high one meet, again and again until the bound reaches that point.  What is
left between the bound and the best placement that fits is closed by deciding operators one at a time, most weights
first: before, on, or after the tier that is too full.  Of open branches the best bound is next, but a branch just made
is followed down, because placements that fit are found at the bottom.

When the budget is spent, the least bound of what is open is still true: the gap is stated.  Workspace and weights
that several operators share are not sums; a price sees the part of them that is, placements are held against all.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.plan.budget import Budget
from shoal.plan.cost import ROUNDING
from shoal.plan.dag.cost import INF, Facts, Labels, latency_s, on_tiers, overflow_bytes, worst_s
from shoal.plan.dag.cut import Cut, cheapest_cut

ROOT_STEPS = 24
"""Cuts for the price of one tier at the root; far fewer are needed."""
BRANCH_STEPS = 4
ROUNDS = 3
"""Over all tiers that are too full, at the root."""

Range = tuple[int, int]
"""First and last tier of an operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The best tiers found that fit, and what bounds all that fit; `nearest` misses the fewest bytes."""

    value: float
    labels: Labels | None
    bound: float
    proven: bool
    """That there is nothing better, or that nothing fits."""
    nearest: Labels | None
    branched: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """A cut under prices: `bound` holds for all placements within its branch's ranges that fit."""

    bound: float
    labels: Labels
    excess: tuple[float, ...]
    """Of bytes that a price sees, by tier."""
    prices: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Ranges that operators are confined to, with the best cut known there."""

    ranges: tuple[Range, ...]
    relaxed: Relaxed


@dataclass(slots=True)
class Search:
    """What is known so far; `best` only falls."""

    known: Facts
    budget: Budget
    held: tuple[tuple[float, ...], ...]
    """[tier][op] bytes that add up to no more than what the tier needs."""
    worst_s: float
    best: float = INF
    labels: Labels | None = None
    nearest: Labels | None = None
    missing: float = INF
    spent: bool = False

    def offer(self, labels: Labels) -> bool:
        """Weigh a placement; whether it fits."""
        missing = sum(overflow_bytes(self.known, labels))
        if missing < self.missing:
            self.missing, self.nearest = missing, labels
        if not missing and (value := latency_s(self.known, labels)) < self.best:
            self.best, self.labels = value, labels
        return not missing

    def proven(self, bound: float) -> bool:
        """Whether nothing from *bound* on is better than what was found, or fits at all: no placement takes `worst_s`."""
        return bound >= self.best * (1 - ROUNDING) or bound > self.worst_s


def pack(known: Facts, budget: Budget, hint: Labels | None = None) -> Packed:
    """Minimise latency within memory; *hint* is a placement to begin with."""
    search = Search(known=known, budget=budget, held=_held(known), worst_s=2 * worst_s(known))
    for placement in (hint, _filled(known)):
        if placement is not None:
            search.offer(placement)
    tiers = len(known.op_s)
    ranges = ((0, tiers - 1),) * len(known.order)
    root = _relax(search, ranges, (0.0,) * tiers)
    if root is None:
        return Packed(value=INF, labels=None, bound=INF, proven=True, nearest=None, branched=False)
    if search.proven(root.bound):
        return _packed(search, root.bound, branched=False)
    for _ in range(ROUNDS):
        for tier in _full(root):
            root = _climb(search, ranges, root, (tier, ROOT_STEPS))
    bound = root.bound if search.proven(root.bound) else _explore(search, Branch(ranges=ranges, relaxed=root))
    return _packed(search, bound, branched=True)


def _filled(known: Facts) -> Labels | None:
    """Operators in their order, each on the first tier with room that no earlier one has left; to have something early."""
    problem, labels = known.problem, [0] * len(known.order)
    tier, stored, workspace = 0, 0.0, 0
    for op in known.order:
        spec = problem.ops[op]
        while tier < len(problem.tiers):
            most = max(workspace, spec.workspace_bytes)
            packed = problem.tiers[tier].weights_factor * (stored + spec.weights_bytes)
            if math.ceil(packed) + most <= known.free_bytes[tier] and known.op_s[tier][op] < INF:
                break
            tier, stored, workspace = tier + 1, 0.0, 0
        if tier == len(problem.tiers):
            return None
        labels[op], stored, workspace = tier, stored + spec.weights_bytes, max(workspace, spec.workspace_bytes)
    return tuple(labels)


def _packed(search: Search, bound: float, *, branched: bool) -> Packed:
    return Packed(
        value=search.best,
        labels=search.labels,
        bound=min(bound, search.best),
        proven=search.proven(bound),
        nearest=search.nearest,
        branched=branched,
    )


def _held(known: Facts) -> tuple[tuple[float, ...], ...]:
    """Weights as a sum: of what several operators share, each counts its part."""
    problem = known.problem
    part = [float(op.weights_bytes) for op in problem.ops]
    for shared in problem.shared:
        for op in shared.ops:
            part[op] -= shared.size_bytes * (1 - 1 / len(shared.ops))
    return tuple(tuple(tier.weights_factor * size for size in part) for tier in problem.tiers)


def _relax(search: Search, ranges: Sequence[Range], prices: Sequence[float]) -> Relaxed | None:
    """The least cut under *prices*; None when the ranges contradict each other."""
    known, held = search.known, search.held
    costs = [
        [
            seconds + price * size if first <= k <= last else INF
            for seconds, size, (first, last) in zip(known.op_s[k], held[k], ranges, strict=True)
        ]
        for k, price in enumerate(prices)
    ]
    cut = cheapest_cut(known, costs)
    if cut is None:
        return None
    search.offer(cut.labels)
    return _relaxed(search, cut, tuple(prices))


def _relaxed(search: Search, cut: Cut, prices: tuple[float, ...]) -> Relaxed:
    free = [max(0, size) for size in search.known.free_bytes]
    by_tier = on_tiers(search.known, cut.labels)
    excess = tuple(sum(search.held[k][op] for op in ops) - free[k] for k, ops in enumerate(by_tier))
    bound = cut.bound - sum(price * size for price, size in zip(prices, free, strict=True))
    return Relaxed(bound=bound, labels=cut.labels, excess=excess, prices=prices)


def _full(relaxed: Relaxed) -> list[int]:
    """Tiers with too much on them, or with a price already; the fullest first."""
    tiers = range(len(relaxed.excess))
    return sorted((k for k in tiers if relaxed.excess[k] > 0 or relaxed.prices[k]), key=lambda k: -relaxed.excess[k])


def _climb(search: Search, ranges: Sequence[Range], start: Relaxed, step: tuple[int, int]) -> Relaxed:
    """Raise the bound along the price of one tier, in at most so many cuts."""
    tier, steps = step
    best = start
    low, high = (start, None) if start.excess[tier] > 0 else (None, start)
    for _ in range(steps):
        price, promised = _next_price(search, tier, low, high)
        if price is None or search.proven(best.bound) or _stops(search):
            break
        found = _relax(search, ranges, [price if k == tier else old for k, old in enumerate(start.prices)])
        if found is None:
            break
        best = max(best, found, key=lambda one: one.bound)
        if found.bound >= promised - ROUNDING * abs(promised):
            break
        low, high = (found, high) if found.excess[tier] > 0 else (low, found)
    return best


def _next_price(search: Search, tier: int, low: Relaxed | None, high: Relaxed | None) -> tuple[float | None, float]:
    """Where the lines of a too low and a too high price meet, and the height, which no price reaches beyond.

    Without a too low price none at all is next, without a too high one twice the price.
    """
    if low is None:
        return (0.0 if high and high.prices[tier] > 0 else None), INF
    if high is None:
        return 2 * low.prices[tier] or _first_price(search, tier), INF
    rise, fall = low.excess[tier], high.excess[tier]
    at_low, at_high = low.prices[tier], high.prices[tier]
    step = (high.bound - low.bound + fall * (at_low - at_high)) / (rise - fall)
    meets = at_low + step
    return (meets if at_low < meets < at_high else None), low.bound + rise * step


def _first_price(search: Search, tier: int) -> float:
    """Seconds per byte of the model on that tier."""
    seconds = sum(cost for cost in search.known.op_s[tier] if cost < INF)
    return (seconds or 1.0) / max(1.0, sum(search.held[tier]))


def _stops(search: Search) -> bool:
    search.spent = search.spent or search.budget.spent()
    return search.spent


def _explore(search: Search, root: Branch) -> float:
    """Branch until nothing open can be better, or the budget is spent; the bound of what is left."""
    number, waiting = 0, list[tuple[float, int, Branch]]()
    here: Branch | None = root
    floor = INF
    while here or waiting:
        if here is None:
            here = heapq.heappop(waiting)[2]
        if search.proven(here.relaxed.bound):
            floor, here = min(floor, here.relaxed.bound), None
            continue
        if _stops(search):
            return min([floor, here.relaxed.bound, *(bound for bound, _, _ in waiting)])
        children = sorted(_children(search, here), key=lambda child: -child.relaxed.bound)
        here = children.pop() if children else None
        for child in children:
            number += 1
            heapq.heappush(waiting, (child.relaxed.bound, number, child))
    return floor


def _children(search: Search, parent: Branch) -> Iterator[Branch]:
    chosen = _undecided(search, parent)
    if chosen is None:
        return
    op, k = chosen
    first, last = parent.ranges[op]
    for span in ((first, k - 1), (k, k), (k + 1, last)):
        if span[0] > span[1]:
            continue
        ranges = (*parent.ranges[:op], span, *parent.ranges[op + 1 :])
        relaxed = parent.relaxed if _stops(search) else _relax(search, ranges, parent.relaxed.prices)
        if relaxed is None:
            continue
        full = [] if search.spent or search.proven(relaxed.bound) else _full(relaxed)
        if full:
            relaxed = _climb(search, ranges, relaxed, (full[0], BRANCH_STEPS))
        yield Branch(ranges=ranges, relaxed=_raised(relaxed, parent.relaxed.bound))


def _raised(relaxed: Relaxed, bound: float) -> Relaxed:
    """What held for a branch holds for its parts."""
    if relaxed.bound >= bound:
        return relaxed
    return Relaxed(bound=bound, labels=relaxed.labels, excess=relaxed.excess, prices=relaxed.prices)


def _undecided(search: Search, branch: Branch) -> tuple[int, int] | None:
    """The operator to decide on, and its tier: of the fullest tier the one with most weights; None when nothing is open.

    A tier on which everything is decided and that is too full stays so, whatever comes.
    """
    labels, relaxed = branch.relaxed.labels, branch.relaxed
    missing = overflow_bytes(search.known, labels)
    is_open = [op for op, (first, last) in enumerate(branch.ranges) if first < last]
    for k in sorted(range(len(missing)), key=lambda k: -missing[k]):
        if not missing[k]:
            break
        there = [op for op in is_open if labels[op] == k]
        if not there:
            return None
        return max(there, key=lambda op: search.held[k][op]), k
    if not is_open:
        return None
    op = max(is_open, key=lambda op: max(p * h[op] for p, h in zip(relaxed.prices, search.held, strict=True)))
    return op, labels[op]
