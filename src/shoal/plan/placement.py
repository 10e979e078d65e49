"""From a problem to a plan with its certificate, or to what is missing (ADR 10)."""

import dataclasses

import numpy as np
from msgspec.structs import replace

from shoal.plan.arrays import INF
from shoal.plan.baselines import best_baseline, worth
from shoal.plan.budget import Budget
from shoal.plan.check import check
from shoal.plan.choosing import choose, is_open, smallest
from shoal.plan.cloud import cloud_alternative
from shoal.plan.cost import ROUNDING, barred, objective_value, owners, prefill_rounds, prefill_steps, price
from shoal.plan.explain import Case, alternatives, reasons
from shoal.plan.found import Found
from shoal.plan.infeasible import Searched, infeasible, least_missing
from shoal.plan.limited import best, blocked
from shoal.plan.problem import Answer, Infeasible, Limits, Objective, Plan, Problem
from shoal.plan.search import NOTHING, demanded, solve
from shoal.plan.tables import Tables, build_tables
from shoal.plan.written import written

SEARCH, WHY, WHY_NOT = 0.9, 0.4, 0.6
"""Parts of what is left to plan: for the plan itself, for the reasons of its devices, for what stands in the way of one."""
LEAST_MISSING = "least-overflow"
BASELINE = "baseline"
"""With its author: no solver had a better plan when time was up."""


def place(problem: Problem, budget: Budget) -> Answer:
    """Choose devices and cuts, and micro-batches where they are left open; raises InvalidRequestError for what makes no sense.

    Exact (gap 0) for up to a dozen devices, and for more where the budget allows; else, or when several chunks of a prompt are in
    flight (`shoal.plan.cost`), the best found with its gap stated; never worse than a named baseline (`shoal.plan.baselines`).
    Where relays are for need, it is the best without any, if there is one.  How activations are written is chosen last.
    """
    check(problem)
    answer = _place(problem, budget)
    if isinstance(answer, Infeasible) and problem.relay_if_needed and not problem.relay:
        relayed = _place(replace(problem, relay=True), budget)
        answer = relayed if isinstance(relayed, Plan) else answer
    return written(problem, answer) if isinstance(answer, Plan) else answer


def _place(problem: Problem, budget: Budget) -> Answer:
    out, wanted = barred(problem), {*owners(problem).values(), *problem.require}
    if all(device.node in out for device in problem.devices) or wanted & out.keys():
        return infeasible(problem, None, budget)
    if is_open(problem):
        return _choose(problem, budget)
    tables = build_tables(problem)
    found = _no_worse(problem, tables, _search(problem, tables, budget.share(SEARCH)))
    if found.chain is None:
        return why_not(problem, tables, found, budget.share(WHY_NOT))
    return _plan(problem, tables, found, budget.share(WHY))


def _choose(problem: Problem, budget: Budget) -> Answer:
    chosen, proven = choose(problem, budget.share(SEARCH), _search)
    if chosen is None:
        least = smallest(problem)
        tables = build_tables(least)
        found = dataclasses.replace(NOTHING, bound=INF if proven else 0.0)
        ruled = _no_worse(least, tables, found)  # what fits at all, fits there
        if ruled.chain is None:
            return why_not(least, tables, found, budget.share(WHY_NOT))
        return _plan(least, tables, ruled, budget.share(WHY))
    found = _no_worse(chosen.problem, chosen.tables, chosen.found)
    plan = _plan(chosen.problem, chosen.tables, found, budget.share(WHY))
    return replace(plan, weighed=chosen.weighed)


def why_not(problem: Problem, tables: Tables, found: Found, budget: Budget) -> Answer:
    """What stands in the way; or the plan after all, where looking for that finds one."""
    limits = blocked(problem, tables, budget) if problem.limits != Limits() else None
    if limits is not None:
        return limits
    missing = least_missing(problem, tables, budget)
    if missing.chain is None or missing.cost > 0:
        return infeasible(problem, tables, budget, Searched(missing=missing, proven=found.bound == INF))
    value = _value(problem, tables, missing) * _tokens(problem)
    bound = min(value, found.bound) if found.bound < INF else 0.0
    return _plan(problem, tables, dataclasses.replace(missing, cost=value, bound=bound, solver=LEAST_MISSING), budget)


def _search(problem: Problem, tables: Tables, budget: Budget) -> Found:
    """The better of two chains where chunks overlap: the bound's price is kind to few stages, that of no overlap to many."""
    found = best(problem, tables, budget, demanded(problem, tables))
    shape = problem.shape
    if problem.limits != Limits():
        return found
    if problem.objective in {Objective.ENERGY, Objective.PRICE}:
        return found
    if found.chain is None or prefill_rounds(shape) == prefill_steps(shape):
        return found
    in_turn = build_tables(replace(problem, shape=replace(shape, in_flight=1)))
    rival = solve(in_turn, problem.objective, budget, demanded(problem, in_turn))
    chosen = min((f for f in (found, rival) if f.chain), key=lambda f: _value(problem, tables, f))
    return dataclasses.replace(found, chain=chosen.chain, via=chosen.via)


def _no_worse(problem: Problem, tables: Tables, found: Found) -> Found:
    """What was found, or a named baseline's plan where that is better: what is proven needs no comparison."""
    value = _value(problem, tables, found) if found.chain else INF
    if found.bound / _tokens(problem) >= value * (1 - ROUNDING):
        return found
    rival = best_baseline(problem, tables)
    if rival is None or worth(problem, rival[1]) >= value:
        return found
    name, spans = rival
    return dataclasses.replace(
        found,
        chain=tuple((tables.nodes.index(span.node), span.start, span.stop) for span in spans),
        via=np.full(tables.hop_s.shape, -1),
        solver=f"{BASELINE}: {name}",
        finals=(),
    )


def _value(problem: Problem, tables: Tables, found: Found) -> float:
    return objective_value(problem.objective, price(problem, found.spans(tables)).estimate)


def _plan(problem: Problem, tables: Tables, found: Found, budget: Budget) -> Plan:
    priced = price(problem, found.spans(tables))
    value = objective_value(problem.objective, priced.estimate)
    bound = found.bound / _tokens(problem)
    if bound >= value * (1 - ROUNDING):
        bound = value
    return Plan(
        stages=priced.stages,
        objective=problem.objective,
        shape=problem.shape,
        estimate=priced.estimate,
        lower_bound=bound,
        gap=max(0.0, (value - bound) / value) if value else 0.0,
        solver=found.solver,
        reasons=reasons(
            Case(problem=problem, tables=tables, found=found, chosen=priced, proven=bound >= value, budget=budget)
        ),
        alternatives=alternatives(problem),
        cloud=cloud_alternative(problem),
    )


def _tokens(problem: Problem) -> int:
    """A solver counts seconds per micro-batch; throughput is judged per token."""
    return problem.shape.batch * problem.shape.tokens_out if problem.objective is Objective.THROUGHPUT else 1
