"""Several pipelines at once: the most tokens per second of a fleet, with the bound that no set of pipelines exceeds.

Placement is a bounded heuristic (`shoal.plan.pipelines`), how requests are spread over it is exact (`shoal.plan.routes`), and the
bound holds for all placements in which a device serves one pipeline, but for devices that every pipeline passes
(`shoal.plan.columns`).  Between the two is the gap: what memory forbids several pipelines at once, which the bound knows by
totals only, and what the heuristic missed.  The best single pipeline is always a candidate.

Micro-batches are those of the best single plan, chosen or given; each pipeline has as many in flight, with the cache for them.
"""

from collections.abc import Sequence
from math import isfinite

import msgspec
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import Budget
from shoal.plan.choosing import as_chosen
from shoal.plan.columns import bounded
from shoal.plan.cost import Span, barred
from shoal.plan.figures import share
from shoal.plan.pipelines import MOST, families, most_at_once
from shoal.plan.placement import place
from shoal.plan.problem import Estimate, Infeasible, Objective, Plan, Problem, Reason, RequestShape, Stage
from shoal.plan.routes import Route, Spread, Way, costed, routes, spread

SINGLE, BOUND, PLACED = 0.3, 0.4, 0.8
"""Parts of what is left to plan: for the best single pipeline, for the bound, for sets of pipelines."""
WORTH = 1e-6
"""Relative; another pipeline is placed only for more than this."""


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A way through placed shards."""

    stages: tuple[Stage, ...]
    """Cache and memory are those of one pipeline; a shard that several use holds the cache of each."""
    estimate: Estimate
    """What it would give alone."""
    tokens_per_s: float
    """What it gives of the whole."""
    weight: float
    """Its share of the requests."""


class Replicas(msgspec.Struct, frozen=True, kw_only=True, tag="replicas"):
    """Pipelines that answer side by side, best first, with their certificate."""

    pipelines: tuple[Pipeline, ...]
    routes: tuple[Route, ...]
    """How requests go on from shard to shard."""
    shape: RequestShape
    """In flight: of each pipeline."""
    tokens_per_s: float
    upper_bound: float | None
    """Tokens per second that no set of pipelines exceeds, with these micro-batches; None: none is known."""
    gap: float | None
    """(upper bound - tokens per second) / upper bound."""
    single_tokens_per_s: float
    """Of the best single pipeline."""
    limited_by: tuple[str, ...]
    """What nothing is left of."""
    reasons: tuple[Reason, ...]


def replicate(problem: Problem, most: int, budget: Budget) -> Replicas | Infeasible:
    """Place up to *most* pipelines (0: as many as pay off); raises InvalidRequestError when the problem makes no sense."""
    goal_tokens_per_s = problem.limits.tokens_per_s
    problem = replace(problem, objective=Objective.THROUGHPUT, limits=replace(problem.limits, tokens_per_s=None))
    single = place(problem, budget.share(SINGLE))
    if isinstance(single, Infeasible):
        return single
    stated = as_chosen(problem, single.shape)
    first = tuple(Span(stage.node, stage.start, stage.stop) for stage in single.stages)
    count = most_at_once(stated, most)
    known = bounded(stated, [first], count, budget.share(BOUND))
    placed = budget.share(PLACED)
    best: tuple[tuple[Way, ...], Spread] | None = None
    for ways in families(stated, [first, *(way for way in known.ways if way != first)], min(count, MOST), placed):
        if not set(stated.require) <= {span.node for way in ways for span in way}:
            continue
        found = spread(stated, ways)
        if best is None or found.rate > best[1].rate * (1 + WORTH):
            best = ways, found
    assert best is not None  # the single pipeline is one of the sets
    answer = _answer(stated, single, best[1], known.bound)
    if goal_tokens_per_s is not None and answer.tokens_per_s < goal_tokens_per_s:
        return _too_slow(answer, goal_tokens_per_s)
    return answer


def _answer(problem: Problem, single: Plan, found: Spread, bound_rate: float) -> Replicas:
    tokens = problem.shape.batch * problem.shape.tokens_out
    total = found.rate * tokens
    bound = bound_rate * tokens
    if not isfinite(total):  # steps that take no time
        total, bound = single.estimate.tokens_per_s, float("inf")
    upper = max(bound, total) if isfinite(bound) else None
    used = [(way, rate) for way, rate in zip(found.ways, found.rates, strict=True) if rate > 0]
    used.sort(key=lambda entry: -entry[1])
    return Replicas(
        pipelines=tuple(_pipeline(problem, way, rate, found.rate) for way, rate in used),
        routes=routes(problem, found) if isfinite(found.rate) else (),
        shape=problem.shape,
        tokens_per_s=total,
        upper_bound=upper,
        gap=(upper - total) / upper if upper else None,
        single_tokens_per_s=single.estimate.tokens_per_s,
        limited_by=tuple(dict.fromkeys(_named(key) for key in found.binding)),
        reasons=_reasons(problem, used),
    )


def _pipeline(problem: Problem, way: Way, rate: float, total: float) -> Pipeline:
    cost = costed(problem, way)
    assert cost is not None  # it was costed to get its rate
    tokens = problem.shape.batch * problem.shape.tokens_out
    finite = isfinite(rate)
    return Pipeline(
        stages=cost.priced.stages,
        estimate=cost.priced.estimate,
        tokens_per_s=rate * tokens if finite else cost.priced.estimate.tokens_per_s,
        weight=rate / total if finite else 1.0,
    )


def _named(key: object) -> str:
    """A resource of `routes`, for people."""
    match key:
        case Span(node=node):
            return f"in flight through {node}"
        case ("medium", medium):
            return f"medium {medium}"
        case (source, target):
            return f"link {source} to {target}"
        case _:
            return f"device {key}"


def _reasons(problem: Problem, used: Sequence[tuple[Way, float]]) -> tuple[Reason, ...]:
    """What each device is used for, and how busy it is; or why it is left out."""
    busy: dict[NodeId, float] = {}
    serves: dict[NodeId, list[int]] = {}
    for index, (way, rate) in enumerate(used):
        cost = costed(problem, way)
        for node in dict.fromkeys(span.node for span in way):
            serves.setdefault(node, []).append(index + 1)
            busy[node] = busy.get(node, 0.0) + (cost.busy_s.get(node, 0.0) * rate if cost and isfinite(rate) else 0.0)
    out = barred(problem)
    return tuple(
        _reason(device.node, serves.get(device.node), busy.get(device.node, 0.0), out) for device in problem.devices
    )


def _reason(node: NodeId, serves: Sequence[int] | None, busy: float, out: dict[NodeId, str]) -> Reason:
    if serves:
        names = " and ".join(str(index) for index in serves)
        return Reason(node=node, used=True, text=f"serves pipeline {names}, busy {share(busy, 1.0)} of the time")
    said = out.get(node, "no further pipeline that fits on what the others leave gives more")
    return Reason(node=node, used=False, text=f"left out: {said}")


def _too_slow(answer: Replicas, goal_tokens_per_s: float) -> Infeasible:
    upper = answer.upper_bound
    beyond = upper is not None and upper < goal_tokens_per_s
    least = f"; no set of pipelines exceeds {upper:.4g}" if upper is not None and beyond else ""
    return Infeasible(
        reason=f"{goal_tokens_per_s:.4g} tok/s are out of reach: {len(answer.pipelines)} pipelines give {answer.tokens_per_s:.4g}"
        + (least or ", not proven that none give more"),
        needed_bytes=0,
        available_bytes=0,
        hint=f"set the limit to {answer.tokens_per_s:.4g}, or add devices",
    )
