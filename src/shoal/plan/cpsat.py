"""The one door to OR-tools: integer programmes with a circuit, solved by CP-SAT.

OR-tools is an extra (`pip install 'shoal[solver]'`): it is looked for when the first programme arrives, and `installed` says
whether it is there.

No presolve: with integers above 1e9 that of OR-tools 9.15 called worse solutions optimal in 1 of 70 small programmes with a
period (none without it, none below 1e9), and it gains nothing here.

One worker with full linearisation: on circuits its cuts prove more per second than a portfolio of several workers does, and
the answer is the same on every run.  A `Budget` has no clock, so effort is counted in the solver's own deterministic time and
given in slices, each twice as long as the one before; between slices, and whenever a bound improves, the budget is asked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from shoal.plan.budget import Budget

if TYPE_CHECKING:
    from ortools.sat.python.cp_model import CpModel, CpSolver, LinearExpr

EFFORT = 30.0
"""Deterministic seconds in all; one is about three of the clock."""
FIRST_SLICE = 1.0
WIDEST = 2.0**50
"""Sums of integer costs stay below this, so that they fit everywhere in the solver."""
IN_COSTS = -1
"""As a variable's upper limit: it is a cost itself, and is minimised with the others."""


@dataclass(frozen=True, slots=True)
class Row:
    """lower <= sum of coefficient x variable <= upper, where all variables of *when* are 1."""

    terms: Sequence[tuple[int, float]]
    lower: float = -math.inf
    upper: float = math.inf
    when: tuple[int, ...] = ()


@dataclass(slots=True)
class Programme:
    """Minimise the sum of costs.  `limited` rows say sum of coefficient x variable <= variable, in units of cost.

    Costs are real numbers, rounded down to whole multiples of 1 / scale: with variables of 0 or more, what is minimised is never
    above the truth, so its bound is a bound of the truth.
    """

    uppers: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    limited: list[tuple[Sequence[tuple[int, float]], int, int]] = field(default_factory=list)
    """(terms, variable, times): the sum of terms is at most *times* x the variable."""
    arcs: list[tuple[int, int, int]] = field(default_factory=list)
    """(tail, head, variable) of the circuit."""

    def variable(self, upper: int = 1, cost: float = 0.0) -> int:
        self.uppers.append(upper)
        self.costs.append(cost)
        return len(self.uppers) - 1

    def total(self) -> float:
        """An upper bound of every sum of costs."""
        rows = [list(enumerate(self.costs)), *(terms for terms, _, _ in self.limited)]
        return max(sum(c * self.uppers[v] for v, c in terms if c > 0 and self.uppers[v] > 0) for terms in rows)

    def scale(self, lower: float, rounding: float) -> float:
        """Integer costs per cost: rounding takes less than *rounding* of any sum of at least *lower*, or what integers allow."""
        times = max([1, *(times for _, _, times in self.limited)])
        widest = WIDEST / (times * max(self.total(), 1e-12))
        units = sum(upper for upper in self.uppers if upper > 1)
        terms = 3 * len(self.arcs) ** 0.5 + units
        return min(widest, terms / (rounding * lower)) if lower > 0 else widest


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`values` of the best solution found, or None; `bound` is infinite when it is proven that there is none."""

    values: tuple[int, ...] | None
    bound: float


def installed() -> bool:
    """Whether OR-tools is there."""
    return find_spec("ortools") is not None


def minimise(programme: Programme, scale: float, budget: Budget, most: float = EFFORT) -> Outcome:
    """Solve as far as the budget and *most* deterministic seconds go."""
    from ortools.sat.python import cp_model  # noqa: PLC0415 - an extra, and a third of a second to import

    model = _model(cp_model.CpModel(), programme, scale)
    best = Outcome(values=None, bound=0.0)
    spent, effort = 0.0, FIRST_SLICE
    while spent < most and not (spent and budget.spent()):
        model.clear_hints()
        for variable, value in enumerate(best.values or ()):
            model.add_hint(model.get_int_var_from_proto_index(variable), value)
        solver = _solver(cp_model.CpSolver(), min(effort, most - spent), budget)
        status = solver.solve(model)
        found = status in {cp_model.OPTIMAL, cp_model.FEASIBLE}
        values = tuple(solver.response_proto.solution) if found else best.values
        bound = math.inf if status == cp_model.INFEASIBLE else max(best.bound, solver.best_objective_bound / scale)
        best = Outcome(values=values, bound=bound)
        if status in {cp_model.OPTIMAL, cp_model.INFEASIBLE}:
            break
        spent, effort = spent + effort, 2 * effort
    return best


def _solver(solver: "CpSolver", effort: float, budget: Budget) -> "CpSolver":
    parameters = solver.parameters
    parameters.num_workers, parameters.random_seed = 1, 1
    parameters.linearization_level = 2
    parameters.cp_model_presolve = False
    parameters.max_deterministic_time = effort

    def ask(_: float) -> None:
        if budget.spent():
            solver.stop_search()

    solver.best_bound_callback = ask
    return solver


def _model(model: "CpModel", programme: Programme, scale: float) -> "CpModel":
    widest = math.ceil(programme.total() * scale) + 1
    variables = [model.new_int_var(0, widest if upper == IN_COSTS else upper, "") for upper in programme.uppers]
    for row in programme.rows:
        constraint = model.add_linear_constraint(_sum(variables, row.terms, int), *_whole(row.lower, row.upper))
        if row.when:
            constraint.only_enforce_if(*[variables[index] for index in row.when])
    down = _rounded(scale)
    for terms, index, times in programme.limited:
        model.add(_sum(variables, terms, down) <= times * variables[index])
    if programme.arcs:
        model.add_circuit([(tail, head, variables[index]) for tail, head, index in programme.arcs])
    counted = [
        (index, cost) for index, cost in enumerate(programme.costs) if cost and programme.uppers[index] != IN_COSTS
    ]
    whole = sum(variable for variable, upper in zip(variables, programme.uppers, strict=True) if upper == IN_COSTS)
    model.minimize(_sum(variables, counted, down) + whole)
    return model


def _sum(
    variables: Sequence["LinearExpr"], terms: Sequence[tuple[int, float]], number: Callable[[float], int]
) -> "LinearExpr":
    from ortools.sat.python import cp_model  # noqa: PLC0415 - see minimise

    chosen = [variables[index] for index, _ in terms]
    return cp_model.LinearExpr.weighted_sum(chosen, [number(coefficient) for _, coefficient in terms])


def _rounded(scale: float) -> Callable[[float], int]:
    return lambda value: math.floor(value * scale)


def _whole(lower: float, upper: float) -> tuple[int, int]:
    far = 2**40
    return int(max(lower, -far)), int(min(upper, far))
