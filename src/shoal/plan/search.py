"""The portfolio: which solver answers, and what its answer proves.

Few devices: all sets of them (`chain.sweep`), exact.  More, and blocks that repeat: a circuit solved by CP-SAT (`circuit`),
exact, throughput included; for crowds a knapsack first, which is exact on stars and elsewhere leaves a smaller circuit
(`crowd`).  Else the relaxation, exact when its path happens to be a plan; else a beam, and from there moves, better bounds and
label setting (`elementary`) until it is proven or time is up, when the distance from the best bound known is stated.
Throughput is then a parametric search over latency problems (see `most_tokens`).
"""

import dataclasses
from collections.abc import Callable, Iterable
from math import nextafter

from shoal.plan.arrays import INF
from shoal.plan.beam import beam
from shoal.plan.budget import Budget
from shoal.plan.chain import Final, relax, sweep, trace
from shoal.plan.circuit import Scope, circuit, circuit_tokens, load_of
from shoal.plan.cpsat import installed
from shoal.plan.crowd import CROWD, crowd
from shoal.plan.elementary import elementary
from shoal.plan.found import FREE, Choice, Found, mask_of
from shoal.plan.periodic import Periodic, periodic
from shoal.plan.problem import Objective, Problem
from shoal.plan.star import period_bound_s
from shoal.plan.tables import LATENCY, Chain, Pass, Tables, Weights, busy_s, cost_passes

SWEEP_LIMIT = 16_384
"""Array operations that one exact search may take; about 25 us each at 70 blocks.  Throughput needs some 25 searches."""
BISECTED = 8
"""How many sweeps a circuit that minimises max(T, L / B) at once is worth; a bisection takes some 25 of them."""

EXACT = "exact-subsets"
RELAXATION = "layered-shortest-path"
BEAM = "beam"
WITHOUT = f"{BEAM}; the exact solver is not installed: pip install 'shoal[solver]'"
"""A circuit would have been drawn, and there was none to solve it."""


def demanded(problem: Problem, tables: Tables, *, besides: Choice = FREE) -> Choice:
    """Devices that the problem wants to take part, with those of *besides*."""
    require = besides.require
    for node in problem.require:
        require |= 1 << tables.nodes.index(node)
    return Choice(require=require, forbid=besides.forbid)


NOTHING = Found(cost=INF, chain=None, bound=INF, solver=EXACT)

PROVEN = 1e-9
"""Solvers add the terms of a price in another order."""


def solve(tables: Tables, objective: Objective, budget: Budget, choice: Choice = FREE, tolerance: float = 0.0) -> Found:
    """The best chain: cost in seconds of one request's latency or of the closed loop's period, in joules or in money.

    A throughput answer is optimal within *tolerance*; a latency answer is optimal when its bound equals its cost.
    """

    def find(cap_s: float = INF, weights: Weights = LATENCY) -> Found:
        return cheapest(tables, list(cost_passes(tables, cap_s, weights)), budget, choice)

    if objective is Objective.THROUGHPUT and len(tables.nodes) >= CROWD:
        return crowd_tokens(tables, budget, choice, tolerance)
    if objective is Objective.THROUGHPUT and (direct := _tokens_at_once(tables, budget, choice)):
        return direct if proven(direct) else _better(direct, _looped(tables, find()))
    match objective:
        case Objective.LATENCY:
            return find()
        case Objective.ENERGY:
            return find(weights=Weights(latency=0.0, joules=1.0))
        case Objective.PRICE:
            return find(weights=Weights(latency=0.0, price=1.0))
        case Objective.THROUGHPUT:
            return most_tokens(tables, find, tolerance)


def cheapest(tables: Tables, passes: list[Pass], budget: Budget, choice: Choice = FREE) -> Found:
    """The chain of least additive cost over all *passes*."""
    if _few(tables, len(passes)):
        swept = _swept(tables, passes, budget, choice)
        if not budget.spent():
            return swept
    return _many(tables, passes, budget, choice)


def _few(tables: Tables, passes: int) -> bool:
    devices = len(tables.nodes)
    return passes * devices * (1 << devices) // 4 <= SWEEP_LIMIT


def _many(tables: Tables, passes: list[Pass], budget: Budget, choice: Choice) -> Found:
    form = periodic(passes)
    circled = _circled(tables, passes, form, budget, choice) if form else None
    crowded = len(tables.nodes) >= CROWD  # a beam through them would take longer than all else
    if circled and (proven(circled) or (circled.chain and crowded)):
        return circled
    found = _bounded(tables, passes, budget, choice)
    if circled:
        found = _better(circled, found)
    if not proven(found) and not budget.spent():
        found = elementary(tables, passes, budget, choice, hint=found)
    return dataclasses.replace(found, solver=WITHOUT) if form and not installed() and found.solver == BEAM else found


def _circled(tables: Tables, passes: list[Pass], form: Periodic, budget: Budget, choice: Choice) -> Found | None:
    """Blocks that repeat: by knapsacks where devices are many or there is nothing to solve a circuit, else by a circuit."""
    draws = installed()
    if len(tables.nodes) >= CROWD or not draws:
        crowded = crowd(tables, passes, form, budget, choice)
        if crowded or not draws:
            return crowded
    return None if budget.spent() else circuit(tables, passes, form, budget, Scope(choice=choice))


def proven(found: Found) -> bool:
    """Whether nothing is better, or there is nothing."""
    return found.bound >= found.cost * (1 - PROVEN)


def _better(one: Found, other: Found) -> Found:
    """The cheaper chain under the higher bound: both are true."""
    best = min(one, other, key=lambda found: found.cost)
    return dataclasses.replace(best, bound=min(best.cost, max(one.bound, other.bound)))


def _tokens_at_once(tables: Tables, budget: Budget, choice: Choice) -> Found | None:
    """The circuit that minimises max(T, L / B) itself; None where it does not apply."""
    passes = list(cost_passes(tables))
    if _few(tables, BISECTED * len(passes)) or not installed():
        return None
    form = periodic(passes)
    return circuit_tokens(tables, passes, form, budget, Scope(choice=choice)) if form and form.exact else None


def most_tokens(tables: Tables, find: Callable[[float], Found], tolerance: float) -> Found:
    """Least max(T, L / B): T the busiest device or link, L the latency, B micro-batches in flight.

    *find*(cap) gives the least L among chains with T <= cap.  Bisection keeps `lower` <= optimum <= best: no chain with
    T <= mid and L / B <= mid means that the optimum is above mid.  A last search just below the best closes the gap.
    """
    best = _looped(tables, find(INF))
    lower = best.bound
    while best.chain and lower < best.cost * (1 - tolerance):
        near = best.cost - lower < 1e-7 * best.cost
        cap_s = nextafter(best.cost, 0) if near else (lower + best.cost) / 2
        found = find(cap_s)
        rival = _looped(tables, found)
        proven = found.bound / tables.in_flight > cap_s
        if proven:
            lower = best.cost if near else cap_s
        if rival.cost < best.cost:
            best = rival
        elif not proven:
            break
    return dataclasses.replace(best, bound=min(lower, best.cost))


ROUGH = 0.02
"""Gap of the first search for throughput through a crowd: the lap may not be what binds."""


def crowd_tokens(tables: Tables, budget: Budget, choice: Choice, tolerance: float) -> Found:
    """Least max(T, L / B) through a crowd: the shortest lap where that binds, else by halves between what is known.

    Whether a chain has T and L / B below a limit is a search under a cap for any chain of less than a lap: most are soon denied.
    """

    def find(cap_s: float) -> Found:
        if cap_s == INF:
            return _with_period(tables, _lap(tables, budget, choice), choice)
        if budget.spent():
            return Found(cost=INF, chain=None, bound=0.0, solver=BEAM)
        below = dataclasses.replace(choice, below=cap_s * tables.in_flight * (1 + PROVEN))
        return cheapest(tables, list(cost_passes(tables, cap_s)), budget, below)

    return most_tokens(tables, find, tolerance)


def _lap(tables: Tables, budget: Budget, choice: Choice) -> Found:
    """The shortest lap: roughly where it does not bind."""
    passes = list(cost_passes(tables))
    if tables.in_flight > 1:
        rough = cheapest(tables, passes, budget, dataclasses.replace(choice, near=ROUGH))
        if rough.chain is None or proven(rough) or _looped(tables, rough).cost > rough.cost / tables.in_flight:
            return rough
    return cheapest(tables, passes, budget, choice)


def _with_period(tables: Tables, found: Found, choice: Choice) -> Found:
    """The bound raised by what the busiest device or link must do, in seconds of a lap."""
    passes = list(cost_passes(tables))
    form = periodic(passes)
    load = load_of(tables, passes, form) if form and form.exact and not choice.require else None
    bound_s = period_bound_s(load.busy) * tables.in_flight if load else 0.0
    return dataclasses.replace(found, bound=max(found.bound, bound_s))


def _looped(tables: Tables, found: Found) -> Found:
    if found.chain is None:
        return Found(cost=INF, chain=None, bound=found.bound / tables.in_flight, solver=found.solver)
    assert found.via is not None
    cost = max(busy_s(tables, found.chain, found.via), found.cost / tables.in_flight)
    return dataclasses.replace(found, cost=cost, bound=found.bound / tables.in_flight, finals=())


def _swept(tables: Tables, passes: list[Pass], budget: Budget, choice: Choice) -> Found:
    best: dict[int, Final] = {}
    for search in passes:
        for final in sweep(tables, search, budget):
            if final.mask not in best or final.cost < best[final.mask].cost:
                best[final.mask] = final
    finals = tuple(best.values())
    winner = best_final(finals, choice)
    if winner is None:
        return NOTHING
    chain, via = trace(winner), winner.found_in.via
    return Found(cost=winner.cost, chain=chain, bound=winner.cost, solver=EXACT, finals=finals, via=via)


def best_final(finals: Iterable[Final], choice: Choice) -> Final | None:
    """The cheapest of the sets that *choice* admits."""
    return min((final for final in finals if choice.admits(final.mask)), key=lambda final: final.cost, default=None)


def _bounded(tables: Tables, passes: list[Pass], budget: Budget, choice: Choice) -> Found:
    bound, solver = INF, BEAM
    best: tuple[float, Chain | None] = (INF, None)
    for search in passes:
        relaxed = relax(tables, search)
        bound = min(bound, relaxed.bound)
        if relaxed.bound >= best[0]:
            continue
        chosen = relaxed.chain if relaxed.chain and choice.admits(mask_of(relaxed.chain)) else None
        found = (relaxed.bound, chosen) if chosen else beam(tables, search, relaxed, budget)
        if found and found[0] < best[0] and choice.admits(mask_of(found[1])):
            best, solver = found, RELAXATION if chosen else BEAM
    via = passes[0].via if passes else None
    return Found(cost=best[0], chain=best[1], bound=min(bound, best[0]), solver=solver, via=via)
