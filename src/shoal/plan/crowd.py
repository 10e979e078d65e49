"""Many devices: a circuit on the promising ones, then on those that are not proven useless.

The knapsack of `shoal.plan.star` gives a bound, and the bound of every chain with a given device.  The circuit over the devices
with the lowest of these finds a chain soon.  Devices whose bound is above it are out, and so are links that cost more than their
ends by more than the distance between the chain and the bound; with fewer devices, prices rise and the bound with them.  What is
left is a small circuit, whose proof is one for all devices.
"""

import dataclasses

import numpy as np

from shoal.plan.budget import Budget
from shoal.plan.circuit import Scope, circuit
from shoal.plan.found import Choice, Found
from shoal.plan.periodic import Periodic
from shoal.plan.recut import cost_of
from shoal.plan.star import Filled, applies, chain_of, fill, prices
from shoal.plan.tables import INF, Pass, Tables

STAR = "star-knapsack"
CROWD = 60
"""Devices from which it pays."""
CORE = 48
CORE_EFFORT = 0.6
ROUNDS = 4
DRAWN = 120
"""More devices than this are too many for a circuit in seconds: the knapsack's bound stands."""
SURE = 1 - 1e-9


def crowd(tables: Tables, passes: list[Pass], form: Periodic, budget: Budget, choice: Choice) -> Found | None:
    """The best chain found and a bound; None where blocks do not repeat one by one from one first device."""
    if not applies(form) or len(passes) != 1:
        return None
    first = form.ends[0].device
    devices = [j for j in range(len(tables.nodes)) if j != first and not choice.forbid >> j & 1]
    charged = prices(form, devices)
    filled = fill(form, charged, devices, choice)
    best = _starred(tables, passes, form, filled) if filled.parts else None
    if best and charged.exact and form.exact and best.bound >= best.cost * SURE:
        return best
    core = sorted(devices, key=lambda j: (not choice.require >> j & 1, filled.forced[j]))[:CORE]
    found = circuit(
        tables, passes, form, budget, Scope(choice=_only(choice, [first, *core], len(tables.nodes)), effort=CORE_EFFORT)
    )
    best = min([found, *([best] if best else [])], key=lambda one: one.cost)
    for _ in range(ROUNDS):
        before = len(devices)
        devices = [j for j in devices if filled.forced[j] * SURE <= best.cost]
        charged = prices(form, devices)
        filled = fill(form, charged, devices, choice)
        if len(devices) == before:
            break
    bound = filled.bound  # of two devices or more; the first alone was weighed with the core
    drawn = len(devices) <= DRAWN or best.cost == INF
    if (
        drawn
        and filled.bound < INF
        and (best.cost == INF or (best.cost - bound) > best.cost * (1 - SURE))
        and not budget.spent()
    ):
        slack = best.cost - bound
        ends = charged.sends[:, None] + charged.receives[None, :]
        keep = form.hop[:, :, 0] <= ends + slack * (1 + 1e-6)
        last = circuit(
            tables, passes, form, budget, Scope(choice=_only(choice, [first, *devices], len(tables.nodes)), keep=keep)
        )
        bound = max(bound, min(last.bound, best.cost))
        best = min(best, last, key=lambda one: one.cost)
    return dataclasses.replace(best, bound=min(best.cost, bound))


def _starred(tables: Tables, passes: list[Pass], form: Periodic, filled: Filled) -> Found | None:
    chain = chain_of(form, filled.parts)
    cost = cost_of(passes[0], chain)
    alone = [ends.alone for ends in form.ends]
    counted = len(chain) <= tables.max_stages and tables.stages_exactly in {0, len(chain)}
    if not counted or not np.isfinite(cost) or min(alone) < cost:
        return None
    return Found(cost=cost, chain=chain, bound=min(filled.bound, cost), solver=STAR, via=passes[0].via)


def _only(choice: Choice, devices: list[int], count: int) -> Choice:
    others = (1 << count) - 1
    for device in devices:
        others &= ~(1 << device)
    return Choice(require=choice.require, forbid=choice.forbid | others)
