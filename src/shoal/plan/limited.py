"""The best plan that keeps to limits, or which limit stands in the way.

Every limit bounds a measure (`shoal.plan.parts`).  First Lagrange: a limit's excess is priced into an additive search, which
gives a true lower bound at any price; the relaxation finds the prices of the highest one, and chains found at those prices
and around them are candidates when they keep to the limits.  On small fleets label setting (`shoal.plan.vectors`) then closes what
gap is left, or proves that nothing keeps to the limits; on larger ones, and when the budget is spent, the gap is stated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from shoal.plan.arrays import INF, Flags, Floats
from shoal.plan.budget import Budget
from shoal.plan.chain import relax
from shoal.plan.cost import ROUNDING, price
from shoal.plan.figures import duration
from shoal.plan.found import FREE, Choice, Found
from shoal.plan.ground import Ask, Mixture, build_ground, one_pass
from shoal.plan.parts import MEASURE_OF, Measure, Parts, bounds_of, build_parts, mixture_passes, values_of
from shoal.plan.problem import Infeasible, Limits, Objective, Problem
from shoal.plan.search import NOTHING, cheapest, demanded, most_tokens, solve
from shoal.plan.tables import Tables, build_tables
from shoal.plan.vectors import Route, explore

VECTORS = "exact-labels"
LAGRANGE = "lagrangian"
SMALL_FLEET = 14
"""Devices up to which label setting is tried: it goes through all sets of them."""
TRIES, FEW_TRIES = 8, 3
"""Searches for chains at different prices; the few are for each step of a search over periods."""
SECTIONS = 16
"""Steps of a golden section: a price to a thousandth of its range."""
FARTHEST = 2.0**10
"""How far a price is raised: a bound that still grows there has no chain to meet."""
TOLERANCE = 1e-4
TOLD_PART = 0.5
"""Of what is left to explain, for one limit."""
TIE = 1e-12
"""Relative; a chain this little better is the same chain added up in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """Keep *target* small, and other measures within *bounds*."""

    target: Measure
    bounds: Mapping[Measure, float]
    choice: Choice = FREE
    tolerance: float = TIE
    """Relative; what is better by less is not looked for."""

    def keeps(self, values: Mapping[Measure, float]) -> bool:
        """Whether a chain of these figures is within the bounds."""
        return all(values[measure] <= bound * (1 + ROUNDING) for measure, bound in self.bounds.items())


def best(problem: Problem, tables: Tables, budget: Budget, choice: Choice = FREE, tolerance: float = 0.0) -> Found:
    """The best chain of the problem's objective, limits kept."""
    if problem.limits == Limits():
        return solve(tables, problem.objective, budget, choice, tolerance)
    aim = Aim(
        target=MEASURE_OF[problem.objective], bounds=bounds_of(problem), choice=choice, tolerance=max(TIE, tolerance)
    )
    return least(build_parts(problem, tables), aim, budget)


def least(parts: Parts, aim: Aim, budget: Budget) -> Found:
    """The chain of least *target* within the bounds; its cost is the measure's value."""
    found, prices = _priced_out(parts, aim, budget)
    if found.bound >= found.cost * (1 - aim.tolerance) or budget.spent() or len(parts.tables.nodes) > SMALL_FLEET:
        return found
    slack = 0.0 if aim.tolerance == TIE else aim.tolerance
    wish = _Least(aim=aim, prices=prices, found=found, parts=parts)
    ask = Ask(measures=wish.measures, mixtures=wish.mixtures, require=aim.choice.require, forbid=aim.choice.forbid)
    complete = all(explore(build_ground(parts, ask, first), wish, budget) for first in parts.tables.firsts)
    bound = max(found.bound, wish.found.cost * (1 - slack)) if complete else found.bound
    return replace(wish.found, bound=bound, solver=VECTORS if complete else LAGRANGE)


class _Least:
    """A wish for the one best chain; holds the best so far."""

    def __init__(self, *, aim: Aim, prices: list[Mixture], found: Found, parts: Parts) -> None:
        self.found = found
        self.measures = (aim.target, *(m for m in aim.bounds if m is not aim.target))
        self.mixtures = tuple(prices)
        self._parts, self._tolerance = parts, aim.tolerance
        self._bounds = np.array([aim.bounds.get(measure, INF) for measure in self.measures]) * (1 + ROUNDING)
        self._paid = np.array([_paid(aim, mixture) for mixture in prices])

    def hopeless(self, lower: Floats) -> Flags:
        """Breaks a limit, or costs as much as what is known, by itself or at Lagrange's prices."""
        count, cost = len(self.measures), self.found.cost * (1 - self._tolerance)
        late = (lower[:, :count] > self._bounds).any(axis=1) | (lower[:, 0] >= cost)
        return np.asarray(late | (lower[:, count:] - self._paid >= cost).any(axis=1))

    def offer(self, values: Floats, route: Callable[[int], Route]) -> None:
        """Keep a chain that is better than the best."""
        cost = np.where((values <= self._bounds).all(axis=1), values[:, 0], INF)
        if cost.size and cost.min() < self.found.cost * (1 - self._tolerance):
            index, shape = int(np.argmin(cost)), self._parts.allowed.shape
            won = route(index)
            self.found = replace(
                self.found, cost=float(cost[index]), chain=won.chain, via=won.via(shape[0], shape[1] - 1)
            )


def _paid(aim: Aim, mixture: Mixture) -> float:
    """What the prices of a mixture come to at the limits themselves."""
    of_limits = {m: weight - (m is aim.target) for m, weight in mixture.items()}
    return sum(weight * aim.bounds[m] for m, weight in of_limits.items() if m in aim.bounds)


def _priced_out(parts: Parts, aim: Aim, budget: Budget) -> tuple[Found, list[Mixture]]:
    """Lagrange's answer, and the mixture that gave its bound."""
    limit_s = aim.bounds.get(Measure.PERIOD, INF) * (1 + ROUNDING)
    answer, mixtures = _Lagrange(parts=parts, aim=aim, cap_s=limit_s, budget=budget).answer()
    if aim.target is not Measure.PERIOD or answer.chain is None or len(parts.tables.nodes) <= SMALL_FLEET:
        return answer, mixtures

    def find(cap_s: float) -> Found:
        """The least lap, times what is in flight, of chains that keep nothing busy for longer than *cap_s*."""
        capped = _Lagrange(
            parts=parts, aim=aim, cap_s=min(cap_s, limit_s), budget=budget, laps_only=True, tries=FEW_TRIES
        )
        found, streams = capped.answer()[0], parts.problem.shape.in_flight
        return replace(found, cost=found.cost * streams, bound=found.bound * streams)

    looped = most_tokens(parts.tables, find, TOLERANCE)
    better = looped if looped.cost <= answer.cost else answer
    bound = min(better.cost, max(looped.bound, answer.bound))
    return replace(better, bound=bound, solver=LAGRANGE), mixtures


@dataclass(slots=True, kw_only=True)
class _Lagrange:
    """The best bound by prices on limits, and the best chain found near those prices."""

    parts: Parts
    aim: Aim
    cap_s: float
    budget: Budget
    tries: int = TRIES
    laps_only: bool = False
    """The target is the period; leave out of it what is busiest."""
    cost: float = INF
    bound: float = 0.0
    chosen: Found = NOTHING

    def answer(self) -> tuple[Found, list[Mixture]]:
        """Find the prices first, by the relaxation alone, which is quick; then chains at those prices and around them."""
        prices = self._ascend()
        mixture = self._mixture(prices)
        if self.bound < INF:
            self._descend(prices)
        bound = self.cost if self.bound >= self.cost * (1 - ROUNDING) else self.bound
        solver = self.chosen.solver if self.chosen.chain and bound == self.cost else LAGRANGE
        return replace(self.chosen, cost=self.cost, bound=bound, solver=solver, finals=()), [mixture]

    def _ascend(self) -> dict[Measure, float]:
        """Prices of the highest bound, one limit at a time: the bound is concave in each (golden section)."""
        prices = dict.fromkeys(self.aim.bounds, 0.0)
        self._dual(prices)
        for measure in (*prices, *prices) if len(prices) > 1 else tuple(prices):
            if self.bound == INF or self.budget.spent():
                break
            scale = max(self.bound, 1e-9) / (self.aim.bounds[measure] or 1.0)
            high, best = scale, self._dual({**prices, measure: scale})
            while self.bound < INF and not self.budget.spent() and high < scale * FARTHEST:
                further = self._dual({**prices, measure: 2 * high})
                high *= 2
                if further <= best:
                    break
                best = further
            prices[measure] = self._golden(prices, measure, high)
        return prices

    def _golden(self, prices: Mapping[Measure, float], measure: Measure, high: float) -> float:
        low, ratio = 0.0, (5**0.5 - 1) / 2
        places = [high - ratio * high, ratio * high]
        values = [self._dual({**prices, measure: place}) for place in places]
        # Label setting does well with rough prices; without it the bound is all there is.
        for _ in range(SECTIONS if len(self.parts.tables.nodes) > SMALL_FLEET else SECTIONS // 3):
            if self.budget.spent() or self.bound == INF:
                break
            if values[0] >= values[1]:
                high, fresh = places[1], 0
                places, values = [high - ratio * (high - low), places[0]], [0.0, values[0]]
            else:
                low, fresh = places[0], 1
                places, values = [places[1], low + ratio * (high - low)], [values[1], 0.0]
            values[fresh] = self._dual({**prices, measure: places[fresh]})
        return places[0] if values[0] >= values[1] else places[1]

    def _dual(self, prices: Mapping[Measure, float]) -> float:
        """What no chain within the bounds goes below, devices repeated or not; noted when it is the best."""
        mixture, firsts = self._mixture(prices), self.parts.tables.firsts
        passes = (one_pass(self.parts, mixture, first, self.cap_s) for first in firsts)
        value = min(relax(self.parts.tables, search).bound for search in passes) - self._paid(prices)
        self.bound = max(self.bound, value)
        return value

    def _descend(self, prices: Mapping[Measure, float]) -> None:
        """Chains at *prices* and, as long as they break limits, at higher ones; then between the two."""
        low, high, factor = 0.0, INF, 1.0
        for _ in range(self.tries):
            scaled = {m: factor * price_ for m, price_ in prices.items()} if any(prices.values()) else dict(prices)
            values = self._at(scaled)
            if self.bound >= self.cost * (1 - TIE) or self.budget.spent() or values is None:
                return
            low, high = (low, factor) if self.aim.keeps(values) else (factor, high)
            factor = 3 * factor if high == INF else (low + high) / 2
        for measure in self.aim.bounds:
            if self.chosen.chain is None and not self.budget.spent():
                self._search({measure: 1.0})

    def _at(self, prices: Mapping[Measure, float]) -> dict[Measure, float] | None:
        """Figures of the cheapest chain at *prices*."""
        found = self._search(self._mixture(prices))
        self.bound = max(self.bound, found.bound - self._paid(prices))
        return self._figures(found) if found.chain else None

    def _search(self, mixture: Mixture) -> Found:
        """The cheapest chain of a mixture; kept when it is within the bounds."""
        passes = list(mixture_passes(self.parts, mixture, self.cap_s))
        found = cheapest(self.parts.tables, passes, self.budget, self.aim.choice)
        if found.chain:
            values = self._figures(found)
            if self.aim.keeps(values) and values[self.aim.target] < self.cost:
                self.cost, self.chosen = values[self.aim.target], found
        return found

    def _mixture(self, prices: Mapping[Measure, float]) -> dict[Measure, float]:
        mixture = {self.aim.target: 1.0}
        for measure, price_ in prices.items():
            mixture[measure] = mixture.get(measure, 0.0) + price_
        return mixture

    def _paid(self, prices: Mapping[Measure, float]) -> float:
        return sum(price_ * self.aim.bounds[measure] for measure, price_ in prices.items())

    def _figures(self, found: Found) -> dict[Measure, float]:
        problem = self.parts.problem
        estimate = price(problem, found.spans(self.parts.tables)).estimate
        values = values_of(problem, estimate)
        if self.laps_only:
            shape = problem.shape
            laps_s = (shape.tokens_out - 1) * estimate.time_per_output_token_s
            values[Measure.PERIOD] = (shape.batch * estimate.time_to_first_token_s + laps_s) / shape.in_flight
        return values


def blocked(problem: Problem, tables: Tables, budget: Budget) -> Infeasible | None:
    """Which limit stands in the way, and the best that is reachable; None when it is something else."""
    free = msgspec.structs.replace(problem, limits=Limits())
    if solve(tables, problem.objective, budget.share(TOLD_PART), demanded(problem, tables)).chain is None:
        return None
    bounds = bounds_of(problem)
    for measure in bounds:
        if told := _told(free, measure, {}, bounds[measure], budget):
            return told
    kept: dict[Measure, float] = {}
    for measure, limit in bounds.items():
        if kept and (told := _told(free, measure, kept, limit, budget)):
            return told
        kept[measure] = limit
    return Infeasible(
        reason="no plan within the limits was found before the search ended; it is not proven that none exists",
        needed_bytes=0, available_bytes=0, hint="allow more time to plan, or wider limits",
    )  # fmt: skip


def _told(
    problem: Problem, measure: Measure, kept: Mapping[Measure, float], limit: float, budget: Budget
) -> Infeasible | None:
    """The least of *measure* within *kept*, in words, when that is beyond *limit*."""
    objective = next((goal for goal, its in MEASURE_OF.items() if its is measure), Objective.LATENCY)
    nearby = msgspec.structs.replace(problem, objective=objective)
    tables = build_tables(nearby)
    aim = Aim(target=measure, bounds=kept, choice=demanded(nearby, tables))
    found = least(build_parts(nearby, tables), aim, budget.share(TOLD_PART))
    if found.chain is None or found.bound <= limit * (1 + ROUNDING):
        return None
    return Infeasible(
        reason=_reason(problem, measure, kept, (limit, found.bound, found.cost)),
        needed_bytes=0,
        available_bytes=0,
        hint=f"set the limit to {shown(problem, measure, _outward(found.cost))}, or drop it",
    )


def _reason(
    problem: Problem, measure: Measure, kept: Mapping[Measure, float], values: tuple[float, float, float]
) -> str:
    limit, bound, cost = values
    name, most = LIMIT_NAMES[measure], "at least" if measure is Measure.PERIOD else "at most"
    within = " and ".join(f"{LIMIT_NAMES[m]} of {shown(problem, m, value)}" for m, value in kept.items())
    asked = f"{name} of {most} {shown(problem, measure, limit)} is out of reach" + (f" with {within}" if within else "")
    if cost <= bound * (1 + ROUNDING):
        return f"{asked}: the best is {shown(problem, measure, cost)}"
    return f"{asked}: the best found is {shown(problem, measure, cost)}, nothing beyond {shown(problem, measure, bound)} exists"


LIMIT_NAMES = {
    Measure.LATENCY: "a request's latency",
    Measure.FIRST_TOKEN: "time to first token",
    Measure.PERIOD: "throughput",
    Measure.JOULES: "energy",
    Measure.PRICE: "price",
}


def shown(problem: Problem, measure: Measure, value: float) -> str:
    """A measure's value with its unit, for people."""
    match measure:
        case Measure.LATENCY | Measure.FIRST_TOKEN:
            return f"{value:.4g} s" if value >= 1 else duration(value)
        case Measure.PERIOD:
            tokens = problem.shape.batch * problem.shape.tokens_out
            return f"{tokens / value:.4g} tok/s" if value else "any number of tok/s"
        case Measure.JOULES:
            return f"{value:.4g} J"
        case Measure.PRICE:
            return f"{value:.4g}"


def _outward(value: float) -> float:
    """A little more, so that what is shown with four digits is reachable."""
    return value * 1.001
