"""Many devices and blocks that repeat one by one: a knapsack where links are a star's, else bounds by site.

The knapsack of `shoal.plan.star` is exact on stars.  Elsewhere `shoal.plan.throng` narrows the devices down until a chain is proven
or time is up.  A circuit (`shoal.plan.circuit`) gets what is left when that is few devices: with links as irregular as a mesh's its
cuts prove more than bounds by site do.
"""

import dataclasses

import numpy as np

from shoal.plan.arrays import INF
from shoal.plan.budget import Budget
from shoal.plan.circuit import Scope, circuit
from shoal.plan.cpsat import installed
from shoal.plan.found import Choice, Found
from shoal.plan.lineup import chain_from, lineup
from shoal.plan.periodic import Periodic
from shoal.plan.recut import cost_of, recut_best
from shoal.plan.star import Filled, applies, chain_of, fill, prices
from shoal.plan.tables import Chain, Pass, Tables
from shoal.plan.throng import LEVELS, Throng, throng

STAR = "star-knapsack"
SITES = "site-knapsacks"
CROWD = 60
"""Devices from which it pays although a circuit could be drawn."""
DRAWN = 64
"""Devices up to which a circuit is solved in seconds."""
EFFORT = 0.6
"""Of a circuit, in deterministic seconds."""
EARLY = 4
"""Levels before a circuit is tried."""
SURE = 1 - 1e-9


def crowd(tables: Tables, passes: list[Pass], form: Periodic, budget: Budget, choice: Choice) -> Found | None:
    """The best chain found and a bound; None where blocks do not repeat one by one from one first device."""
    if not applies(form) or len(passes) != 1:
        return None
    best = _starred(tables, passes, form, choice)
    if best and form.exact and best.bound >= best.cost * SURE:
        return best
    alone = _alone(tables, passes, form, choice)
    state = Throng(
        line=lineup(tables, form, choice), cost=choice.below, any_will_do=choice.below < INF, near=choice.near
    )
    throng(state, budget, LEVELS[:EARLY])
    drawn = _drawn(tables, passes, form, (state, choice), budget)
    if not (drawn or state.done or budget.spent()):
        throng(state, budget, LEVELS[EARLY:])
    found = [one for one in (best, alone, _real(passes, form, state), drawn) if one]
    winner = min(found, key=lambda one: one.cost)
    bound = min(max(state.bound, best.bound if best else 0.0, drawn.bound if drawn else 0.0), alone.cost)
    return dataclasses.replace(winner, bound=min(winner.cost, bound))


def _drawn(
    tables: Tables, passes: list[Pass], form: Periodic, scope: tuple[Throng, Choice], budget: Budget
) -> Found | None:
    """The circuit over the devices that are left; its bound holds for all, as the others are out."""
    state, choice = scope
    few = state.line.devices.size <= DRAWN
    if state.done or not few or not installed() or budget.spent():
        return None
    others = (1 << len(tables.nodes)) - 1
    for device in state.line.devices:
        others &= ~(1 << int(device))
    narrow = dataclasses.replace(choice, forbid=choice.forbid | others)
    found = circuit(tables, passes, form, budget, Scope(choice=narrow, effort=EFFORT))
    return found if found.bound >= min(found.cost, state.cost) * SURE else None  # half a proof is none


def _real(passes: list[Pass], form: Periodic, state: Throng) -> Found:
    """The chain at the passes' own costs."""
    none = Found(cost=INF, chain=None, bound=state.bound, solver=SITES)
    if state.chain is None:
        return none
    chain = chain_from(form, state.chain)
    cost = min(cost_of(search, chain) for search in passes)
    if not (form.exact and np.isfinite(cost)):
        again = recut_best(passes, tuple(device for device, _, _ in chain))
        if again is None:
            return none
        cost, chain = again
    return Found(cost=cost, chain=chain, bound=min(cost, state.bound), solver=SITES, via=passes[0].via)


def _alone(tables: Tables, passes: list[Pass], form: Periodic, choice: Choice) -> Found:
    """All blocks on the first device, where that may be."""
    device, blocks = form.ends[0].device, passes[0].start.size - 1
    chain: Chain = ((device, 0, blocks),)
    cost = form.ends[0].alone if tables.stages_exactly in {0, 1} and choice.admits(1 << device) else INF
    there = cost < INF
    return Found(cost=cost, chain=chain if there else None, bound=cost, solver=SITES, via=passes[0].via)


def _starred(tables: Tables, passes: list[Pass], form: Periodic, choice: Choice) -> Found | None:
    """The knapsack's chain, if that is a star's and may be."""
    first = form.ends[0].device
    devices = [j for j in range(len(tables.nodes)) if j != first and not choice.forbid >> j & 1]
    charged = prices(form, devices)
    if not charged.exact:
        return None
    filled: Filled = fill(form, charged, devices, choice)
    if not filled.parts:
        return None
    chain = chain_of(form, filled.parts)
    cost = cost_of(passes[0], chain)
    counted = len(chain) <= tables.max_stages and tables.stages_exactly in {0, len(chain)}
    if not counted or not np.isfinite(cost) or min(ends.alone for ends in form.ends) < cost:
        return None
    return Found(cost=cost, chain=chain, bound=min(filled.bound, cost), solver=STAR, via=passes[0].via)
