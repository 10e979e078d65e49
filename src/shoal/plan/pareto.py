"""All plans that no other beats in every respect: what latency, throughput, joules and money cost each other.

Two objectives on a small fleet: every nondominated point, the unsupported ones too, which no weighted sum finds.  Weighted
sums first give points of the convex hull (dichotomy), then one label setting over both figures fills the triangles between
them; a label is dropped when it can reach into none of them.  That answers all epsilon-constraint problems at once, where
solving one after another repeats most of the work.  On larger fleets, and when the budget is spent, a ladder of
epsilon-constraint problems gives plans that are real and may not be all.

More objectives: the fronts of all pairs, and where few enough labels do, all nondominated points.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from math import inf

import msgspec
import numpy as np
from msgspec.structs import replace

from shoal.errors import InvalidRequestError
from shoal.plan.arrays import Flags, Floats
from shoal.plan.baselines import baseline_plans
from shoal.plan.budget import Budget
from shoal.plan.check import check
from shoal.plan.cost import ROUNDING, Priced, Span, barred, meets, objective_value, owners, price
from shoal.plan.ground import Ask, build_ground
from shoal.plan.infeasible import infeasible
from shoal.plan.limited import SMALL_FLEET, TIE, VECTORS, Aim, blocked, least
from shoal.plan.parts import MEASURE_OF, Measure, Parts, bounds_of, build_parts, mixture_passes, values_of
from shoal.plan.problem import Infeasible, Limits, Objective, Plan, Problem
from shoal.plan.search import cheapest, demanded
from shoal.plan.tables import build_tables, spans_of
from shoal.plan.vectors import Route, explore, nondominated

EPSILON = "epsilon-constraint"
RUNGS = 8
"""Bounds on one figure between its own best and what the other's best gives it, where not all points can be found."""
HULL_SEARCHES = 12
MANY_LABELS = 150_000
"""For more than two objectives: beyond it the fronts of pairs have to do."""
BEYOND = 0.1
"""The hypervolume's reference point lies this much of its value beyond the worst of each figure."""
ALL = "all nondominated plans"


class Front(msgspec.Struct, frozen=True, kw_only=True, tag="front"):
    """Plans of which none is at least as good as another by every objective."""

    objectives: tuple[Objective, ...]
    points: tuple[Plan, ...]
    """Best first by the first objective; each plan's bound and gap are about that objective alone."""
    complete: bool
    """Every nondominated plan is there, or one with the same figures: proven."""
    covers: str
    """What was searched, in words."""
    knee: int | None = None
    """For two objectives: the point farthest from the line between the ends, each figure scaled to its range."""
    hypervolume: float | None = None
    """For two objectives: the share of the rectangle between the best figures and `reference` that the points dominate."""
    reference: tuple[float, ...] = ()
    """In seconds, seconds per token, joules or money."""

    def values(self, index: int) -> tuple[float, ...]:
        """A point's figures, each the smaller the better."""
        return tuple(objective_value(objective, self.points[index].estimate) for objective in self.objectives)


def pareto(problem: Problem, budget: Budget, objectives: Sequence[Objective] = ()) -> Front | Infeasible:
    """The front over *objectives* (by default `worth_weighing`); raises InvalidRequestError when the problem makes no sense."""
    check(problem)
    chosen = tuple(dict.fromkeys(objectives)) or worth_weighing(problem)
    if len(chosen) < 2:
        raise InvalidRequestError(
            f"a front needs two objectives, {', '.join(chosen) or 'none'} given",
            hint="name two of latency, throughput, energy, price",
            param="objectives",
        )
    front = _searched(problem, budget, chosen)
    if isinstance(front, Infeasible) and problem.relay_if_needed and not problem.relay:
        relayed = _searched(replace(problem, relay=True), budget, chosen)
        return relayed if isinstance(relayed, Front) else front
    return front


def _searched(problem: Problem, budget: Budget, chosen: tuple[Objective, ...]) -> Front | Infeasible:
    out, wanted = barred(problem), {*owners(problem).values(), *problem.require}
    if all(device.node in out for device in problem.devices) or wanted & out.keys():
        return infeasible(problem, None, budget)
    search = _Search(problem, budget)
    for pair in combinations(chosen, 2):
        search.pair(pair)
    if not search.complete:
        search.ruled(chosen)
    if not search.found:
        tables = build_tables(problem)
        limits = blocked(problem, tables, budget) if problem.limits != Limits() else None
        return limits or infeasible(problem, tables, budget)
    if len(chosen) > 2 and search.complete:
        search.together(chosen)
    return _front(problem, chosen, search)


def worth_weighing(problem: Problem) -> tuple[Objective, ...]:
    """Latency and throughput, and joules and money where devices or links say what they take of them."""
    watts = any(d.active_watts for d in problem.devices) or any(k.joules_per_byte for k in problem.links)
    money = any(d.price_per_hour for d in problem.devices) or any(k.price_per_byte for k in problem.links)
    found = [Objective.LATENCY, Objective.THROUGHPUT]
    return (*found, *([Objective.ENERGY] if watts else []), *([Objective.PRICE] if money else []))


def undominated(values: Sequence[Sequence[float]]) -> list[int]:
    """Indices of points that no other beats or equals in all figures; terms added in another order count as equal."""
    kept: list[int] = []
    for index in sorted(range(len(values)), key=lambda i: tuple(values[i])):
        mine = values[index]
        if not any(_covers(values[other], mine) for other in kept):
            kept = [other for other in kept if not _covers(mine, values[other])] + [index]
    return kept


def _covers(these: Sequence[float], those: Sequence[float]) -> bool:
    return all(a <= b * (1 + ROUNDING) + 1e-15 for a, b in zip(these, those, strict=True))


class _Search:
    """Chains found so far, and whether the searches were complete."""

    def __init__(self, problem: Problem, budget: Budget) -> None:
        self.problem, self.budget = problem, budget
        self.found: dict[tuple[Span, ...], Priced] = {}
        self.complete = True
        self.bounds: dict[Objective, float] = {}
        self.covers = ""
        self._limits = bounds_of(problem)

    def pair(self, pair: tuple[Objective, Objective]) -> None:
        """Points of two objectives."""
        one, other = (self._parts(objective) for objective in pair)
        ends = [
            self._least(parts, objective, self._limits) for parts, objective in zip((one, other), pair, strict=True)
        ]
        if None in ends:
            self.complete = False
            return
        if len(one.tables.nodes) <= SMALL_FLEET and not self.budget.spent():
            mixtures = self._hull(one, pair)
            if self._explore(one, pair, mixtures):
                return
        self.complete = False
        self._ladder(pair)

    def together(self, objectives: Sequence[Objective]) -> None:
        """All points of three and more objectives, if few enough labels do."""
        parts = self._parts(objectives[0])
        self.complete = self._explore(parts, objectives, [], MANY_LABELS)
        self.covers = "" if self.complete else "the fronts of all pairs of objectives"

    def ruled(self, objectives: Sequence[Objective]) -> None:
        """Note what the named baselines give by each objective: without a proof one of them may be better than all found."""
        for objective in objectives:
            problem = replace(self.problem, objective=objective)
            parts = self._parts(objective)
            for spans in baseline_plans(problem, parts.tables).values():
                self.keep(parts, spans)

    def keep(self, parts: Parts, spans: tuple[Span, ...]) -> Priced | None:
        """Note a chain if it is within the limits."""
        priced = self.found.get(spans) or price(parts.problem, spans)
        if not meets(self.problem.limits, priced.estimate):
            return None
        self.found[spans] = priced
        return priced

    def _parts(self, objective: Objective) -> Parts:
        problem = replace(self.problem, objective=objective)
        return build_parts(problem, build_tables(problem))

    def _least(self, parts: Parts, objective: Objective, bounds: dict[Measure, float]) -> Priced | None:
        """The best by one objective within *bounds*."""
        aim = Aim(target=MEASURE_OF[objective], bounds=bounds, choice=demanded(parts.problem, parts.tables))
        found = least(parts, aim, self.budget)
        if bounds is self._limits:
            self.bounds[objective] = found.bound
        return self.keep(parts, found.spans(parts.tables)) if found.chain else None

    def _hull(self, parts: Parts, pair: tuple[Objective, Objective]) -> list[dict[Measure, float]]:
        """Points that weighted sums find, and the weights: normals of the hull's edges."""
        measures = [MEASURE_OF[objective] for objective in pair]
        choice = demanded(parts.problem, parts.tables)
        tried: dict[tuple[float, ...], dict[Measure, float]] = {}
        for _ in range(HULL_SEARCHES):
            weights = next((w for w in self._normals(pair) if w not in tried), None)
            if weights is None or self.budget.spent():
                break
            tried[weights] = dict(zip(measures, weights, strict=True))
            passes = list(mixture_passes(parts, tried[weights]))
            found = cheapest(parts.tables, passes, self.budget, choice)
            if found.chain:
                self.keep(parts, found.spans(parts.tables))
        return list(tried.values())

    def _normals(self, pair: Sequence[Objective]) -> list[tuple[float, float]]:
        values = [[objective_value(o, p.estimate) for o in pair] for p in self.found.values()]
        points = sorted(tuple(values[i]) for i in undominated(values))
        steps = list(pairwise(points))
        steps.sort(key=lambda step: (step[0][0] - step[1][0]) * (step[0][1] - step[1][1]))
        return [(a[1] - b[1], b[0] - a[0]) for a, b in steps]

    def _explore(
        self,
        parts: Parts,
        objectives: Sequence[Objective],
        mixtures: list[dict[Measure, float]],
        most_labels: int | None = None,
    ) -> bool:
        """All nondominated chains of *objectives*; False when the search was cut short."""
        archive = _Archive(parts, objectives, mixtures, self)
        choice = demanded(parts.problem, parts.tables)
        ask = Ask(measures=archive.measures, mixtures=archive.mixtures, require=choice.require, forbid=choice.forbid)
        grounds = (build_ground(parts, ask, first) for first in parts.tables.firsts)
        return all(explore(ground, archive, self.budget, most_labels) for ground in grounds)

    def _ladder(self, pair: tuple[Objective, Objective]) -> None:
        """The best by each objective at several bounds on the other."""
        for goal, other in (pair, pair[::-1]):
            figures = [values_of(self.problem, p.estimate)[MEASURE_OF[other]] for p in self.found.values()]
            parts = self._parts(goal)
            for bound in np.linspace(min(figures), max(figures), RUNGS + 2)[1:-1]:
                if self.budget.spent():
                    return
                limit = min(float(bound), self._limits.get(MEASURE_OF[other], inf))
                self._least(parts, goal, {**self._limits, MEASURE_OF[other]: limit})


class _Archive:
    """A wish for every chain that none known beats in all objectives."""

    def __init__(
        self, parts: Parts, objectives: Sequence[Objective], mixtures: list[dict[Measure, float]], search: _Search
    ) -> None:
        limits, wanted = bounds_of(search.problem), tuple(MEASURE_OF[objective] for objective in objectives)
        self.measures = (*wanted, *(measure for measure in limits if measure not in wanted))
        self.mixtures = tuple(mixtures)
        self._parts, self._search, self._count = parts, search, len(wanted)
        self._limits = np.array([limits.get(measure, inf) for measure in self.measures]) * (1 + ROUNDING)
        self._weights = np.array([[mixture[m] for m in wanted] for mixture in mixtures]).reshape(-1, len(wanted))
        known = [values_of(search.problem, priced.estimate) for priced in search.found.values()]
        self._points = np.array([[values[m] for m in wanted] for values in known]).reshape(-1, len(wanted))
        self._tidy()

    def hopeless(self, lower: Floats) -> Flags:
        """Breaks a limit, or reaches no place that the known points leave."""
        late = (lower[:, : len(self.measures)] > self._limits).any(axis=1)
        if self._count > 2:
            known = self._points[None, :MOST_COMPARED] * (1 - TIE)
            worse = np.all(known <= lower[:, None, : self._count], axis=2)
            return np.asarray(late | np.any(worse, axis=1))
        return np.asarray(late | ~self._reaches(lower))

    def offer(self, values: Floats, route: Callable[[int], Route]) -> None:
        """Note what no known point beats."""
        for index in nondominated(values[:, : self._count], np.zeros(len(values), np.int64)):
            mine = values[index]
            if (mine <= self._limits).all() and not self._beaten(mine[: self._count]):
                self._keep(mine[: self._count], route(int(index)))
        self._tidy()

    def _beaten(self, values: Floats) -> bool:
        return bool((self._points <= values * (1 + TIE)).all(axis=1).any())

    def _keep(self, values: Floats, route: Route) -> None:
        shape = self._parts.allowed.shape
        spans = spans_of(self._parts.tables, route.chain, route.via(shape[0], shape[1] - 1))
        self._search.keep(self._parts, spans)
        self._points = np.concatenate([self._points, values[None]])

    def _tidy(self) -> None:
        """Drop points that others beat; for two objectives note the corners of what they leave."""
        self._points = self._points[nondominated(self._points, np.zeros(len(self._points), np.int64))]
        if self._count == 2:
            points = self._points[np.argsort(self._points[:, 0])]
            self._corners = np.stack([np.r_[points[:, 0], inf], np.r_[inf, points[:, 1]]], axis=1) * (1 - TIE)

    def _reaches(self, lower: Floats) -> Flags:
        """Which labels may end below both figures of a corner, by their bounds and by those of weighted sums."""
        first = np.searchsorted(self._corners[:, 0], lower[:, 0], side="right")
        last = np.searchsorted(-self._corners[:, 1], -lower[:, 1], side="left")
        may = first < last
        sums = lower[:, len(self.measures) :]
        if not sums.shape[1] or not may.any() or may.sum() * len(self._corners) > MOST_COMPARED**2:
            return np.asarray(may)
        rows = np.flatnonzero(may)
        places = np.arange(len(self._corners))
        open_ = (places >= first[rows, None]) & (places < last[rows, None])
        for column, weights in enumerate(self._weights):
            open_ &= sums[rows, column, None] < np.nan_to_num(self._corners @ weights, nan=inf)
        may[rows] = open_.any(axis=1)
        return np.asarray(may)


MOST_COMPARED = 1000
"""Points that a label is compared with, in bulk."""


def _front(problem: Problem, objectives: tuple[Objective, ...], search: _Search) -> Front:
    found = list(search.found.values())
    values = [[objective_value(objective, priced.estimate) for objective in objectives] for priced in found]
    chosen = sorted(undominated(values), key=lambda i: values[i])
    points = [values[i] for i in chosen]
    told = search.covers or (
        ALL if search.complete else f"the best at {RUNGS} bounds on each figure; there may be more"
    )
    bound = search.bounds.get(objectives[0], 0.0)
    plans = tuple(_plan(problem, objectives[0], found[i], (bound, search.complete)) for i in chosen)
    front = Front(objectives=objectives, points=plans, complete=search.complete, covers=told)
    if len(objectives) != 2:
        return front
    reference = tuple(max(point[axis] for point in points) * (1 + BEYOND) for axis in (0, 1))
    return replace(front, knee=knee(points), hypervolume=_hypervolume(points, reference), reference=reference)


def _plan(problem: Problem, objective: Objective, priced: Priced, known: tuple[float, bool]) -> Plan:
    value = objective_value(objective, priced.estimate)
    tokens = problem.shape.batch * problem.shape.tokens_out if objective is Objective.THROUGHPUT else 1
    bound = min(known[0] / tokens, value)
    return Plan(
        stages=priced.stages,
        objective=objective,
        shape=problem.shape,
        estimate=priced.estimate,
        lower_bound=bound if value - bound > ROUNDING * value else value,
        gap=max(0.0, (value - bound) / value) if value - bound > ROUNDING * value else 0.0,
        solver=VECTORS if known[1] else EPSILON,
    )


def knee(points: Sequence[Sequence[float]]) -> int | None:
    """Of points in order: the one farthest below the line between the ends; None when none is below it."""
    if len(points) < 3:
        return None
    values = np.array(points, dtype=np.float64)
    spread = values.max(axis=0) - values.min(axis=0)
    scaled = (values - values.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    below = 1 - scaled.sum(axis=1)
    best = int(np.argmax(below))
    return best if below[best] > ROUNDING else None


def _hypervolume(points: Sequence[Sequence[float]], reference: tuple[float, ...]) -> float | None:
    """The share of the rectangle between the best figures and *reference* that sorted *points* dominate."""
    ideal = [min(point[axis] for point in points) for axis in (0, 1)]
    whole = (reference[0] - ideal[0]) * (reference[1] - ideal[1])
    if whole <= 0:
        return None
    edges = [*(point[0] for point in points[1:]), reference[0]]
    area = sum((edge - point[0]) * (reference[1] - point[1]) for point, edge in zip(points, edges, strict=True))
    return area / whole
