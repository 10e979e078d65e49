"""From a graph problem to a plan with its certificate, or to what is missing (ADR 10).

Chains are what nodes run today, so a cut between blocks is chosen wherever it is as good as any cut.  The bound is that
of all cuts in either case: a chain that reaches it is proven best among them, one that does not shows what a cut
through a block would gain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.plan.budget import Budget
from shoal.plan.check import LARGEST
from shoal.plan.cost import ROUNDING
from shoal.plan.dag.chain import articulations, best_chain
from shoal.plan.dag.check import check_graph, owners
from shoal.plan.dag.cost import INF, Facts, Labels, facts, latency_s, memory_bytes, parts
from shoal.plan.dag.memory import Packed, pack
from shoal.plan.dag.problem import GraphAnswer, GraphPlan, GraphProblem, Part, WholeAlternative
from shoal.plan.figures import duration, share, size
from shoal.plan.problem import Infeasible, Reason

CHAIN = "chain"
CUT = "min-cut"
BRANCHED = "min-cut-branch-and-bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Tiers of all operators, and how good they are known to be."""

    labels: Labels
    value: float
    bound: float
    chain_s: float | None
    solver: str


def place_graph(problem: GraphProblem, budget: Budget, cuts: Sequence[int] | None = None) -> GraphAnswer:
    """Choose a tier for each operator; raises InvalidRequestError when the problem makes no sense.

    *cuts* are the positions of the operators' order between which a chain has its blocks; by default those that a single
    tensor crosses.  Exact where memory does not bind; else within the budget, the gap stated.
    """
    check_graph(problem)
    known = facts(problem)
    chain = best_chain(known, articulations(known) if cuts is None else cuts, budget)
    packed = pack(known, budget, chain)
    if packed.labels is None:
        return _infeasible(known, packed)
    return _plan(known, _chosen(known, packed, chain))


def _chosen(known: Facts, packed: Packed, chain: Labels | None) -> Chosen:
    assert packed.labels is not None
    chain_s = None if chain is None else latency_s(known, chain)
    as_good = chain is not None and chain_s is not None and chain_s <= packed.value * (1 + ROUNDING)
    labels = chain if chain is not None and as_good else packed.labels
    value = latency_s(known, labels)
    bound = value if packed.bound >= value * (1 - ROUNDING) else packed.bound
    solver = CHAIN if as_good else BRANCHED if packed.branched else CUT
    return Chosen(labels=labels, value=value, bound=bound, chain_s=chain_s, solver=solver)


def _plan(known: Facts, chosen: Chosen) -> GraphPlan:
    made = parts(known, chosen.labels)
    others = _alternatives(known.problem)
    return GraphPlan(
        parts=made,
        latency_s=chosen.value,
        lower_bound=chosen.bound,
        gap=(chosen.value - chosen.bound) / chosen.value if chosen.value else 0.0,
        solver=chosen.solver,
        chain_latency_s=chosen.chain_s,
        reasons=tuple(_reason(known, chosen, made, k) for k in range(len(known.op_s))),
        alternatives=others,
    )


def _reason(known: Facts, chosen: Chosen, made: Sequence[Part], k: int) -> Reason:
    node, problem = known.problem.tiers[k].node, known.problem
    if k >= len(made):
        return Reason(node=node, used=False, text=f"left out: {_unused(known, chosen, k)}")
    part = made[k]
    if not part.ops:
        return Reason(node=node, used=True, text=f"runs nothing: it passes frames on ({duration(part.compute_s)})")
    of_all = share(part.compute_s, sum(one.compute_s for one in made))
    told = f"runs {len(part.ops)} of {len(problem.ops)} operators, {of_all} of the compute ({duration(part.compute_s)})"
    pinned = sum(1 for _, owner in owners(problem) if owner == node)
    return Reason(node=node, used=True, text=f"{told}; {pinned} of them belong there" if pinned else told)


def _unused(known: Facts, chosen: Chosen, k: int) -> str:
    if all(cost == INF for cost in known.op_s[k]):
        return "no operator may be there: no link leads there and back, pins say otherwise, or it has no memory for any"
    if chosen.bound < chosen.value:
        return "no plan that was found uses it; not proven that none is better"
    return f"no cut that sends work there takes less than {duration(chosen.value)}"


def _alternatives(problem: GraphProblem) -> tuple[WholeAlternative, ...]:
    """The whole model on each tier, what stands in the way aside."""
    roomy = tuple(
        replace(tier, memory_budget_bytes=int(LARGEST) * 4, memory_promised_bytes=0) for tier in problem.tiers
    )
    free = facts(replace(problem, tiers=roomy, pins=(), pin_inputs=False))
    return tuple(_alone(problem, free, k) for k in range(len(problem.tiers)))


def _alone(problem: GraphProblem, free: Facts, k: int) -> WholeAlternative:
    node, everything = problem.tiers[k].node, tuple(range(len(problem.ops)))
    value = latency_s(free, (k,) * len(everything))
    if value == INF:
        return WholeAlternative(node=node, refused="no link leads there and back")
    return WholeAlternative(node=node, latency_s=value, refused=_refusal(problem, k, everything))


def _refusal(problem: GraphProblem, k: int, everything: Sequence[int]) -> str:
    tier = problem.tiers[k]
    need, there = memory_bytes(problem, k, everything), tier.memory_budget_bytes - tier.memory_promised_bytes
    if need > there:
        return f"the whole model needs {size(need)}, {size(max(0, there))} are free"
    foreign = next(((op, owner) for op, owner in owners(problem) if owner != tier.node), None)
    return f"operator {foreign[0]} ({problem.ops[foreign[0]].name}) stays on {foreign[1]}" if foreign else ""


def _infeasible(known: Facts, packed: Packed) -> Infeasible:
    if packed.nearest is None:
        return _nowhere(known)
    problem = known.problem
    used = [(k, [op for op, at in enumerate(packed.nearest) if at == k]) for k in range(len(known.op_s))]
    rows = [(problem.tiers[k], memory_bytes(problem, k, ops)) for k, ops in used]
    short = [(tier, need, tier.memory_budget_bytes - tier.memory_promised_bytes) for tier, need in rows]
    missing = sum(max(0, need - there) for _, need, there in short)
    told = ", ".join(
        f"{tier.node} would need {size(need)} and has {size(max(0, there))}" for tier, need, there in short
    )
    verdict = "the model does not fit" if packed.proven else "no placement was found, not proven that none exists"
    needed = sum(need for _, need in rows)
    return Infeasible(
        reason=f"{verdict}: of the placements tried the nearest misses {size(missing)}: {told}",
        needed_bytes=needed,
        available_bytes=needed - missing,
        hint=f"add {size(missing)} of memory to the tiers in the reason, or a tier",
    )


def _nowhere(known: Facts) -> Infeasible:
    problem = known.problem
    for op, spec in enumerate(problem.ops):
        if all(row[op] == INF for row in known.op_s):
            need = spec.weights_bytes + spec.workspace_bytes
            most = max(0, *known.free_bytes)
            return Infeasible(
                reason=f"operator {op} ({spec.name}) can be nowhere: it needs {size(need)}, the most that a tier has free "
                f"is {size(most)}; its pin, or a link that is missing, may leave it no other",
                needed_bytes=need,
                available_bytes=min(need, most),
                hint="add memory or a link to a tier, or drop its pin",
            )
    return Infeasible(
        reason="operators contradict each other: one must be on an earlier tier than what it reads, by pins, memory and links",
        needed_bytes=0,
        available_bytes=0,
        hint="drop a pin, or add memory to an earlier tier",
    )
