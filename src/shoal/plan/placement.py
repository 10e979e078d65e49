"""From a problem to a plan with its certificate, or to what is missing (ADR 10)."""

from shoal.plan.budget import Budget
from shoal.plan.check import check
from shoal.plan.cost import objective_value, price
from shoal.plan.explain import Case, alternatives, reasons, spans_of
from shoal.plan.infeasible import infeasible
from shoal.plan.problem import Answer, Objective, Plan, Problem
from shoal.plan.search import Found, solve
from shoal.plan.tables import Tables, build_tables


def place(problem: Problem, budget: Budget) -> Answer:
    """Choose devices and cuts; raises InvalidRequestError when the problem makes no sense.

    Exact (gap 0) for up to a dozen devices; beyond, or when the budget is spent, the best found with its gap stated.
    """
    check(problem)
    if len(problem.exclude) >= len(problem.devices) and all(
        device.node in problem.exclude for device in problem.devices
    ):
        return infeasible(problem, None, budget)
    tables = build_tables(problem)
    found = solve(tables, problem.objective, budget)
    if found.chain is None:
        return infeasible(problem, tables, budget)
    return _plan(problem, tables, found, budget)


def _plan(problem: Problem, tables: Tables, found: Found, budget: Budget) -> Plan:
    priced = price(problem, spans_of(tables, found.chain or ()))
    value = objective_value(problem.objective, priced.estimate)
    bound = value if found.bound >= found.cost else found.bound / _tokens(problem)
    return Plan(
        stages=priced.stages,
        objective=problem.objective,
        shape=problem.shape,
        estimate=priced.estimate,
        lower_bound=bound,
        gap=max(0.0, (value - bound) / value) if value else 0.0,
        solver=found.solver,
        reasons=reasons(Case(problem=problem, tables=tables, found=found, chosen=priced, budget=budget)),
        alternatives=alternatives(problem),
    )


def _tokens(problem: Problem) -> int:
    """A solver counts seconds per request; throughput is judged per token."""
    return problem.shape.tokens_out if problem.objective is Objective.THROUGHPUT else 1
