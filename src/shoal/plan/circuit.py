"""Exact for blocks that repeat: CP-SAT on a circuit through the devices (`shoal.plan.drawing`).

A proof holds for the problem as stated, cuts inside of a unit included: they are part of the programme.  Where the programme
is kinder than the problem (units alike but not the same, pins in the middle of the model), its bound is true, its devices are
kept in their order, the model is cut anew for the real costs, and the gap is stated.

Rounding: costs are rounded down to multiples of 1 / scale (`cpsat.Programme`), so the bound is never too high; scale makes the sum
of all roundings less than `ROUNDING` of what the whole model takes on the quickest device, and so of any plan.  That is below
the tolerance at which a plan counts as proven (`search.PROVEN`); where integers are too small for that, the gap says so.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Flags
from shoal.plan.budget import Budget
from shoal.plan.cpsat import EFFORT, Outcome, minimise
from shoal.plan.drawing import Drawing, Load, Task, draw
from shoal.plan.found import FREE, Choice, Found
from shoal.plan.periodic import Periodic, in_step
from shoal.plan.recut import cost_of, recut_best
from shoal.plan.star import period_bound_s
from shoal.plan.tables import Chain, Pass, Tables, busy_s

CIRCUIT = "cp-sat-circuit"
ROUNDING = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which devices and links a circuit may have, and what it may cost to solve."""

    choice: Choice = FREE
    keep: Flags | None = None
    """[M, M] links; None: all."""
    effort: float = EFFORT


EVERYTHING = Scope()


def circuit(tables: Tables, passes: list[Pass], form: Periodic, budget: Budget, scope: Scope = EVERYTHING) -> Found:
    """The chain of least additive cost; *form* is what the passes have in common."""
    choice = scope.choice
    drawing = _drawn(tables, form, scope, None)
    outcome = _solved(drawing, budget, scope.effort)
    alone = _alone(tables, form, choice)
    chains = [chain for chain in (_chain(drawing, outcome), *alone) if chain]
    priced = [_priced(passes, chain, exact=form.exact) for chain in chains]
    cost, chain = min((found for found in priced if found), default=(INF, None))
    bound = min([outcome.bound, *(min(cost_of(search, chain) for search in passes) for chain in alone)])
    via = passes[0].via if chain else None
    return Found(cost=cost, chain=chain, bound=min(bound, cost), solver=CIRCUIT, via=via)


def circuit_tokens(
    tables: Tables, passes: list[Pass], form: Periodic, budget: Budget, scope: Scope = EVERYTHING
) -> Found | None:
    """The chain of least max(T, L / in flight) in one programme; None where hops may go through relays."""
    load = load_of(tables, passes, form)
    if load is None:
        return None
    drawing = _drawn(tables, form, scope, load)
    outcome = _solved(drawing, budget, scope.effort)
    chains = [chain for chain in (_chain(drawing, outcome), *_alone(tables, form, scope.choice)) if chain]
    via = passes[0].via
    looped = [(_period_s(tables, passes, chain), chain) for chain in chains]
    cost, chain = min(looped, default=(INF, None))
    alone = [cost for cost, chain in looped if len(chain) == 1]
    bound = min([max(outcome.bound, period_bound_s(load.busy)), *alone])
    return Found(cost=cost, chain=chain, bound=min(bound, cost), solver=CIRCUIT, via=via if chain else None)


def _period_s(tables: Tables, passes: list[Pass], chain: Chain) -> float:
    lap_s = min(cost_of(search, chain) for search in passes)
    return max(busy_s(tables, chain, passes[0].via), lap_s / tables.in_flight)


def _drawn(tables: Tables, form: Periodic, scope: Scope, load: Load | None) -> Drawing | None:
    choice = scope.choice
    least, most = max(2, tables.stages_exactly), min(tables.stages_exactly or tables.max_stages, tables.max_stages)
    if least > most or choice.require & choice.forbid:
        return None
    return draw(Task(form=form, stages=(least, most), choice=choice, load=load, keep=scope.keep))


def _solved(drawing: Drawing | None, budget: Budget, effort: float) -> Outcome:
    if drawing is None or not drawing.links:
        return Outcome(values=None, bound=INF)
    form = drawing.task.form
    roles = {role.device for role in drawing.roles}
    quickest = min(float(form.unit[device]) for device in roles)
    lower = form.rhythm.units * quickest / (drawing.task.load.in_flight if drawing.task.load else 1)
    return minimise(drawing.programme, drawing.programme.scale(lower, ROUNDING), budget, effort)


def _alone(tables: Tables, form: Periodic, choice: Choice) -> Sequence[Chain]:
    if tables.stages_exactly not in {0, 1}:
        return ()
    blocks = form.rhythm.first + form.rhythm.units * form.rhythm.period + form.rhythm.last
    devices = [ends.device for ends in form.ends if np.isfinite(ends.alone) and choice.admits(1 << ends.device)]
    return [((device, 0, blocks),) for device in devices]


def _chain(drawing: Drawing | None, outcome: Outcome) -> Chain | None:
    """The stages of a solution, in order."""
    if drawing is None or outcome.values is None:
        return None
    values, rhythm = outcome.values, drawing.task.form.rhythm
    onward = {here: (there, phase) for (here, there, phase), variable in drawing.links.items() if values[variable]}
    node = next(role.node for role in drawing.roles if role.enters is None and values[role.variable])
    chain, unit, start = [], 0, 0
    while node in onward:
        following, phase = onward[node]
        unit += values[drawing.units[node]]
        chain.append((drawing.device(node), start, rhythm.cut(unit, phase)))
        node, start = following, rhythm.cut(unit, phase)
    blocks = rhythm.first + rhythm.units * rhythm.period + rhythm.last
    return (*chain, (drawing.device(node), start, blocks))


def _priced(passes: list[Pass], chain: Chain, *, exact: bool) -> tuple[float, Chain] | None:
    cost = min(cost_of(search, chain) for search in passes)
    if exact and np.isfinite(cost):
        return cost, chain
    return recut_best(passes, tuple(device for device, _, _ in chain))


def load_of(tables: Tables, passes: list[Pass], form: Periodic) -> Load | None:
    """Seconds of occupation in the rhythm of the costs; None where hops may go through relays, or another rhythm."""
    if (passes[0].via >= 0).any():
        return None
    run = np.where(np.isfinite(passes[0].run), tables.run_s, INF)
    hop = np.where(np.isfinite(passes[0].hop), tables.wire_s, INF)
    taken = [dataclasses.replace(search, run=run, hop=hop, sums=tables.run_s) for search in passes]
    busy = in_step(taken, form.rhythm)
    return Load(busy=busy, occupies=tables.occupies, in_flight=tables.in_flight) if busy else None
