"""What no number of replicas gives more than: a linear programme over all pipelines, by column generation.

Give each resource a price per second of its use, and each micro-batch in flight one for the time it takes.  With c the least
that any pipeline costs at these prices, no set of pipelines works off more micro-batches per second than the price of all
resources / c: the dual of a packing programme.  So any prices give a true bound, and the single-pipeline solvers find c, with
their own bound where they cannot finish.  Prices come from the programme over the pipelines known so far; the cheapest pipeline at
these prices joins it until none pays.

Memory is looked at within one pipeline only, so the bound may be far above what fits together: the gap says how far.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats
from shoal.plan.budget import Budget
from shoal.plan.cost import ROUNDING
from shoal.plan.packing import Packing, pack
from shoal.plan.problem import Problem
from shoal.plan.routes import Costed, Way, costed
from shoal.plan.search import cheapest
from shoal.plan.tables import Tables, build_tables, cost_passes

ROUNDS = 40
PART = 0.3
"""Of what is left to plan, for one pipeline."""
PAYS = 1e-7

_IN_FLIGHT = ("in flight",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Pipelines that the programme knows, best first, and the most micro-batches per second; infinite: none was proven."""

    ways: tuple[Way, ...]
    bound: float


def bounded(problem: Problem, known: Sequence[Way], most: int, budget: Budget) -> Columns:
    """Bound all sets of *most* pipelines; *known* are some to begin with."""
    tables, ways = build_tables(problem), list(dict.fromkeys(known))
    bound = INF
    for _ in range(ROUNDS):
        columns = [(way, cost) for way in ways if (cost := costed(problem, way)) is not None]
        if not all(cost.lap_s for _, cost in columns):  # takes no time
            return Columns(ways=tuple(ways), bound=INF)
        packed, prices = _packed(problem, [cost for _, cost in columns], most)
        ways = [way for way, _ in columns]
        repriced = _repriced(tables, prices)
        found = cheapest(repriced, list(cost_passes(repriced)), budget.share(PART))
        whole = sum(
            price * (most * problem.shape.in_flight if key == _IN_FLIGHT else 1) for key, price in prices.items()
        )
        if found.bound > 0:
            bound = min(bound, whole / found.bound)
        way = found.spans(tables)
        if not way or found.cost >= 1 - PAYS or way in ways or budget.spent():
            break
        ways.append(way)
    amounts = packed.amounts
    order = np.argsort(-amounts[: len(columns)], kind="stable")
    return Columns(ways=tuple(columns[i][0] for i in order if amounts[i] > 0), bound=bound * (1 + ROUNDING))


def _packed(problem: Problem, costs: Sequence[Costed], most: int) -> tuple[Packing, dict[object, float]]:
    keys = list(dict.fromkeys(key for cost in costs for key, busy_s in cost.busy_s.items() if busy_s > 0))
    rows = [[cost.busy_s.get(key, 0.0) for cost in costs] for key in keys]
    limits = [1.0 for _ in keys]
    rows.append([cost.lap_s for cost in costs])
    limits.append(float(most * problem.shape.in_flight))
    keys.append(_IN_FLIGHT)
    packed = pack(np.array(rows).reshape(len(keys), len(costs)), np.array(limits))
    return packed, dict(zip(keys, packed.prices.tolist(), strict=True))


def _repriced(tables: Tables, prices: dict[object, float]) -> Tables:
    """Tables whose latency is what a micro-batch costs at *prices*."""
    lap = prices.get(_IN_FLIGHT, 0.0)
    device = np.array([prices.get(node, 0.0) for node in tables.nodes])
    wire = np.array([[prices.get(key, 0.0) if key else 0.0 for key in row] for row in tables.occupies])
    return dataclasses.replace(
        tables,
        pass_s=_sum((device[:, None, None], tables.run_s), (lap, tables.pass_s)),
        hop_s=_sum((wire[:, :, None], tables.wire_s), (lap, tables.hop_s)),
        relay_s=_sum((device + lap, tables.relay_s)),
        entry_s=_sum((lap, tables.entry_s)),
        return_s=_sum((lap, tables.return_s)),
    )


def _sum(*terms: tuple[Floats | float, Floats]) -> Floats:
    """Sums of products, infinite where a value is: a price of 0 does not make a forbidden thing free."""
    total = np.zeros(())
    for weight, values in terms:
        finite = np.isfinite(values)
        total = total + np.where(finite, weight * np.where(finite, values, 0.0), INF)
    return total
