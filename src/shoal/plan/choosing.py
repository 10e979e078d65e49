"""Throughput with micro-batches to choose: how many sequences in one, how many of them in flight.

More in flight hide the lap, larger ones share a step; both hold more cache, which takes memory from the blocks.  With the
batch given, a range of numbers in flight has a relaxation that the same solvers answer: the cache of the fewest, the pipeline of
the most.  Its bound holds for every number in the range, and its chain is a plan for some of them.  So branch and bound: ranges
by their bounds, the lowest first, halved until nothing can be better.  Where slots are fixed, memory does not depend on the
choice and the most in flight is never worse: the range is then one number.  Of numbers that give as much the least is taken.

Before anything is searched a batch has a bound by work alone: no fleet works it off quicker than all its devices together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

import msgspec
import numpy as np

from shoal.plan.arrays import INF
from shoal.plan.budget import Budget
from shoal.plan.cost import (
    ROUNDING,
    Priced,
    Span,
    barred,
    decode_times,
    free_bytes,
    meets,
    objective_value,
    owners,
    price,
    shard_memory,
)
from shoal.plan.found import Found
from shoal.plan.problem import Choose, Objective, Problem, RequestShape, Weighed
from shoal.plan.tables import Tables, build_tables

TRY = 0.5
"""Of what is left to plan, for one search."""

Search = Callable[[Problem, Tables, Budget], Found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The best choice, as a problem without one; the bound of `found` is that of all choices."""

    problem: Problem
    tables: Tables
    found: Found
    weighed: tuple[Weighed, ...]


@dataclass(frozen=True, slots=True, order=True)
class _Range:
    """Numbers in flight from `low` to `high`, and what no plan in it is better than, in seconds per token."""

    bound: float
    batch: int
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    problem: Problem
    found: Found
    priced: Priced
    value: float


@dataclass(slots=True, kw_only=True)
class _State:
    problem: Problem
    best: _Offer | None = None
    by_batch: dict[int, _Offer] = field(default_factory=dict)

    def hopeless(self, bound: float) -> bool:
        """Nothing with this bound is better than the best."""
        return bound == INF or (self.best is not None and bound >= self.best.value * (1 - ROUNDING))


def is_open(problem: Problem) -> bool:
    """Whether there is anything to choose."""
    return problem.objective is Objective.THROUGHPUT and problem.choose != Choose()


def shaped(problem: Problem, batch: int, in_flight: int, slots: int = 0) -> Problem:
    """The problem with this choice made; *slots* where they are not what the choice needs."""
    needed = slots or (batch * in_flight if problem.choose.slots else problem.shape.slots)
    shape = msgspec.structs.replace(problem.shape, batch=batch, in_flight=in_flight, slots=needed)
    return msgspec.structs.replace(problem, shape=shape, choose=Choose())


def as_chosen(problem: Problem, shape: RequestShape) -> Problem:
    """The problem with the choice made that a plan's *shape* tells; one that leaves nothing open stays as it is."""
    return shaped(problem, shape.batch, shape.in_flight) if is_open(problem) else problem


def smallest(problem: Problem) -> Problem:
    """The choice that takes the least memory."""
    found = _least(list(_ranges(problem)))
    return shaped(problem, found.batch, found.low)


def choose(problem: Problem, budget: Budget, search: Search) -> tuple[Chosen | None, bool]:
    """The best choice and its chain, or none; and whether that is proven, where there is none."""
    state, lowest = _State(problem=problem), INF
    waiting = list(_ranges(problem))
    least = _least(waiting)
    heapify(waiting)
    while waiting:
        first = heappop(waiting)
        if state.hopeless(first.bound):
            break
        if budget.spent():
            lowest = min(lowest, first.bound)
            if state.best is None and least in {first, *waiting}:  # what fits at all, fits there
                _searched(state, least, search, budget)
            break
        bound = _searched(state, first, search, budget)
        if state.hopeless(bound):
            continue
        middle = (first.low + first.high) // 2
        if first.low == first.high:
            lowest = min(lowest, bound)
        else:
            heappush(waiting, replace(first, bound=bound, high=middle))
            heappush(waiting, replace(first, bound=bound, low=middle + 1))
    return _chosen(state, lowest), lowest == INF


def _ranges(problem: Problem) -> Iterator[_Range]:
    asked, shape = problem.choose, problem.shape
    for batch in sorted(set(asked.batch or (shape.batch,))):
        most = (asked.slots or shape.slots) // batch
        if asked.in_flight:
            most = min(most, asked.in_flight)
            low = 1 if asked.slots else most
        else:
            low, most = shape.in_flight, min(most, shape.in_flight)
        if most >= max(1, low):
            yield _Range(_work_bound(problem, batch), batch, low, most)


def _least(ranges: Sequence[_Range]) -> _Range:
    return min(ranges, key=lambda choice: (choice.batch * choice.low, choice.batch))


def _searched(state: _State, part: _Range, search: Search, budget: Budget) -> float:
    """Search the relaxation of a range, offer its chain, and give its bound per token."""
    fewest = shaped(state.problem, part.batch, part.low).shape.slots
    relaxed = shaped(state.problem, part.batch, part.high, fewest)
    tables = build_tables(relaxed)
    found = search(relaxed, tables, budget.share(TRY))
    if found.chain is not None:
        _offer(state, part, found, found.spans(tables))
    return max(part.bound, found.bound / (part.batch * relaxed.shape.tokens_out))


def _offer(state: _State, part: _Range, found: Found, spans: Sequence[Span]) -> None:
    """Note a chain with the most in flight that it holds, or the fewest that give as much."""
    numbers = range(1 if state.problem.choose.in_flight else part.low, part.high + 1)
    room = _first(numbers, lambda n: not _holds(shaped(state.problem, part.batch, n), spans))
    fitting = numbers if room is None else range(numbers.start, room)
    if not fitting:
        return
    most = _priced(state.problem, found, spans, (part.batch, fitting[-1]))
    if most is None:
        return
    enough = _first(fitting, lambda n: _as_good(_priced(state.problem, found, spans, (part.batch, n)), most))
    offer = _priced(state.problem, found, spans, (part.batch, enough)) if enough else None
    kept = offer or most
    known = state.by_batch.get(part.batch)
    if known is None or kept.value < known.value * (1 - ROUNDING):
        state.by_batch[part.batch] = kept
    if state.best is None or kept.value < state.best.value * (1 - ROUNDING):
        state.best = kept


def _first(numbers: range, holds: Callable[[int], bool]) -> int | None:
    """The first number with a property that is never lost again; None: no number has it."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(numbers[middle]) else (middle + 1, high)
    return numbers[low] if low < len(numbers) else None


def _as_good(offer: _Offer | None, most: _Offer) -> bool:
    return offer is not None and offer.value <= most.value * (1 + ROUNDING)


def _priced(problem: Problem, found: Found, spans: Sequence[Span], streams: tuple[int, int]) -> _Offer | None:
    """A chain at a choice; None where it breaks a limit."""
    stated = shaped(problem, *streams)
    priced = price(stated, spans)
    if not meets(problem.limits, priced.estimate):
        return None
    return _Offer(problem=stated, found=found, priced=priced, value=objective_value(problem.objective, priced.estimate))


def _holds(problem: Problem, spans: Sequence[Span]) -> bool:
    devices = {device.node: device for device in problem.devices}
    need = dict.fromkeys(devices, 0)
    for span in spans:  # a shard leaves room for what its device relays, so relays need no more
        if span.start < span.stop:
            need[span.node] += shard_memory(problem, devices[span.node], span.start, span.stop).total
    return all(size_bytes <= free_bytes(devices[node]) for node, size_bytes in need.items())


def _work_bound(problem: Problem, batch: int) -> float:
    """Seconds per token below which the devices cannot work it all off, whoever does what, memory and links forgotten.

    Let w be the least that a block takes anywhere.  In a second, a device works off no more of it than its best ratio of w to its
    own time; so the sum of w over the sum of these ratios is a bound.
    """
    shape, out, owned = problem.shape, barred(problem), owners(problem)
    devices = [device for device in problem.devices if device.node not in out]
    if not devices:
        return 0.0
    work = np.array(
        [
            batch * np.array(device.prefill_s) + (shape.tokens_out - 1) * np.array(decode_times(device, batch))
            for device in devices
        ]
    )
    for block, owner in owned.items():
        work[[index for index, device in enumerate(devices) if device.node != owner], block] = INF
    least = work.min(axis=0)
    heavy = least > 0
    if not heavy.any():
        return 0.0
    ratios = (least[heavy] / work[:, heavy]).max(axis=1)
    return float(least[heavy].sum() / ratios.sum()) * (1 - ROUNDING) / (batch * shape.tokens_out)


def _chosen(state: _State, lowest: float) -> Chosen | None:
    best = state.best
    if best is None:
        return None
    shape = best.problem.shape
    tokens = shape.batch * shape.tokens_out
    found = replace(best.found, cost=best.value * tokens, bound=min(best.value, lowest) * tokens, finals=())
    rows = (
        Weighed(
            batch=batch,
            in_flight=offer.problem.shape.in_flight,
            slots=offer.problem.shape.slots,
            tokens_per_s=offer.priced.estimate.tokens_per_s,
        )
        for batch, offer in sorted(state.by_batch.items())
    )
    return Chosen(problem=best.problem, tables=build_tables(best.problem), found=found, weighed=tuple(rows))
