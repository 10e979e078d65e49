"""Cheapest chains where devices are too many for `chain.sweep`, blocks unequal or not: proven where time allows.

A chain is an elementary path: no device twice.  In turn, each step with a better plan and a better bound to start from:

1. Local moves on the plan that is given (`shoal.plan.moves`): few at first, all once there is a bound to state with it.
2. A price for each device, found by subgradient steps on the relaxation that lets devices repeat (`shoal.plan.multipliers`).
3. The same relaxation made to remember more and more of what it used (`shoal.plan.memory`).  Its path is often a chain by then,
   which gives a better plan too.
4. Labels with all they used (`shoal.plan.labels`), pruned by that bound; twice as many and more each time, until none is dropped.

It stops as soon as the bound reaches the plan.  Every step between two questions to the budget is of bounded work.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF
from shoal.plan.budget import Budget
from shoal.plan.chain import relax
from shoal.plan.found import FREE, Choice, Found, mask_of
from shoal.plan.labels import ROUNDING, Search, run
from shoal.plan.memory import remember, work
from shoal.plan.moves import Rules, chain_cost, cut_best, improve
from shoal.plan.multipliers import Asked, Effort, Priced, limits_of, priced, tighten
from shoal.plan.tables import Chain, Pass, Tables

LABELS = "label-setting"
MOVES = "local-moves"

LEVELS = ((80, 0, 64), (30, 2, 256), (40, 4, 1024), (40, 6, 4096), (40, 8, 16384), (30, 10, 65536))
"""Subgradient steps, how many neighbours each device may learn during them, and how many labels may go on from each cut then."""
FIRST_MOVES = 100
"""Questions that the first moves may ask; with hundreds of devices all of them take longer than the bound."""
WORK = 1 << 26
"""Numbers that one relaxation may go through, 0.1 s or so."""


@dataclass(slots=True)
class _State:
    """The best so far, over all passes."""

    tables: Tables
    choice: Choice
    budget: Budget
    cost: float = INF
    chain: Chain | None = None
    solver: str = LABELS

    def offer(self, cost: float, chain: Chain, solver: str) -> bool:
        """Take a chain that is better and may be."""
        better = cost < self.cost and self.choice.admits(mask_of(chain))
        if better:
            self.cost, self.chain, self.solver = cost, chain, solver
        return better

    def proves(self, bound: float) -> bool:
        """Can nothing with this bound be better?"""
        return bound >= self.cost - ROUNDING * abs(self.cost) if np.isfinite(self.cost) else bound == INF


@dataclass(slots=True)
class _Share:
    """A part of a budget."""

    whole: Budget
    steps: int

    def spent(self) -> bool:
        self.steps -= 1
        return self.steps < 0 or self.whole.spent()

    def share(self, part: float) -> Budget:
        return self.whole.share(part)


def elementary(
    tables: Tables, passes: list[Pass], budget: Budget, choice: Choice = FREE, *, hint: Found | None = None
) -> Found:
    """The cheapest chain over all *passes*, or the best found when the budget runs out; *hint* is a plan to start from."""
    passes = [_without(search, choice.forbid) for search in passes if not choice.forbid >> search.first & 1]
    bounds = [relax(tables, search).bound for search in passes]
    state = _State(tables=tables, choice=choice, budget=budget)
    if hint is not None and hint.chain is not None:
        state.offer(hint.cost, hint.chain, hint.solver)
        _polish(state, passes, _Share(budget, FIRST_MOVES))
    known: Priced | None = None
    for index in sorted(range(len(passes)), key=lambda index: bounds[index]):
        if state.proves(bounds[index]) or budget.spent():
            continue
        known, bound = _prove(state, passes[index], known)
        bounds[index] = max(bounds[index], bound)
    bound = min(bounds, default=INF)
    proven = state.proves(bound)
    return Found(
        cost=state.cost,
        chain=state.chain,
        bound=state.cost if proven else min(bound, state.cost),
        solver=LABELS if proven else state.solver,
        via=passes[0].via if passes else None,
    )


def _prove(state: _State, search: Pass, known: Priced | None) -> tuple[Priced, float]:
    """Search one pass; *known* is what was learnt in another one."""
    devices = len(state.tables.nodes)
    limits = limits_of(state.tables, search, state.choice)
    asked = Asked(tables=state.tables, search=search, limits=limits)
    prices = limits.clip(known.prices) if known else np.zeros(devices + 1)
    best = priced(asked, prices, known.neighbours if known else ((),) * devices)
    bound = best.bound
    for steps, most, width in LEVELS:
        if work(search, most) <= WORK:
            best = _tightened(state, asked, best, (steps, most))
            bound = max(bound, best.bound)
        if state.solver == MOVES and not state.proves(bound):
            _polish(state, [search], state.budget)
        if not state.proves(bound) and not state.budget.spent():
            bound = max(bound, _labelled(state, asked, best, width))
        if state.proves(bound) or state.budget.spent():
            break
    return best, bound


def _tightened(state: _State, asked: Asked, best: Priced, level: tuple[int, int]) -> Priced:
    neighbours = best.neighbours
    effort = Effort(steps=level[0], neighbours=level[1], best_cost=state.cost)
    for tried in tighten(best, asked, effort):
        neighbours = tried.neighbours
        if tried.path and len(set(tried.path)) == len(tried.path):
            _offer_order(state, asked.search, tuple(tried.path))
        best = tried if tried.bound > best.bound else best
        if state.proves(best.bound) or state.budget.spent():
            return best
    return best if neighbours == best.neighbours else priced(asked, best.prices, neighbours)


def _labelled(state: _State, asked: Asked, best: Priced, width: int) -> float:
    """A lower bound from labels, no more than *width* at each cut."""
    search = Search(asked=asked, priced=best, table=remember(best.search, best.neighbours), best_cost=state.cost)
    run(search, width, state.budget)
    if search.order:
        _offer_order(state, asked.search, search.order)
    return min(search.dropped, state.cost)


def _offer_order(state: _State, search: Pass, order: tuple[int, ...]) -> None:
    """Offer what moves make of a chain with these devices in this order."""
    rules = Rules(tables=state.tables, search=search, choice=state.choice)
    cost, chain = cut_best(search, order)
    if rules.admit(order) and state.offer(cost, chain, LABELS):
        cost, chain = improve(rules, chain, state.budget)
        state.offer(cost, chain, LABELS)


def _polish(state: _State, passes: list[Pass], budget: Budget) -> None:
    """Improve the plan that was given by moves, within the pass that it belongs to."""
    assert state.chain is not None
    start = state.chain
    search = min(passes, key=lambda search: chain_cost(search, start), default=None)
    if search is not None and np.isfinite(chain_cost(search, start)):
        rules = Rules(tables=state.tables, search=search, choice=state.choice)
        cost, chain = improve(rules, start, budget)
        state.offer(cost, chain, MOVES)


def _without(search: Pass, forbid: int) -> Pass:
    """The pass in which no stage is on a forbidden device."""
    if not forbid:
        return search
    run_s = search.run.copy()
    run_s[[device for device in range(len(run_s)) if forbid >> device & 1]] = INF
    return dataclasses.replace(search, run=run_s)
