"""Whether moving a deployment is worth it: `settle(state, current, candidate, now_s) -> (state, Keep | Move)`.

Both plans are priced on the same profile, the newest; nobody compares a price of today with one of yesterday.

The rule is that of the ski rental.  Nobody knows how long a link stays slow, so what staying costs is added up (*regret*: seconds
that requests have lost so far, against the candidate), and the deployment moves when that is as much as the move itself.  Whoever
knew the future would move at once or never, and so pays at least half of what this rule pays: twice the optimum at most, plus what
is said next.  On the way there and back it is three times the optimum, as for any rule without dice (two states of a metrical task
system).  Weighing the gain over a horizon instead was rejected: the horizon would be a guess, and a bad one moves to and fro.

Three things keep noise from moving anything.  A *band*: what is better by less counts as equal.  Regret falls while the current
plan is the better one, so that noise cancels itself.  A *dwell* time after each move, which doubles with each that came to nothing.

Regret grows with demand: requests under way, times the share of their time that the candidate would save.  By Little's law that is
requests per second times seconds lost by each.  An idle deployment regrets little, but something: somebody will ask.
"""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from shoal.ids import NodeId
from shoal.plan.cost import objective_value
from shoal.plan.problem import Estimate, LinkSpec, Objective, Plan, Problem
from shoal.plan.transition import Fetch, Load, Piece, Transition

START_S = 1.2
"""From an order to a worker that loads: a process with its interpreter, engine and fabric (two cores, measured: 1.0 to 1.4 s)."""
LOAD_BYTES_PER_S = 200e6
"""Weights packed by the engine; SmolLM2-135M (116 MB) was ready 1.8 s after its order, start included."""
DRAIN_S = 1.0
"""Until it is certain that a pipeline answers nobody any more; see `fleet.state.DRAINED_AFTER_S`."""


class MoveCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a move takes, in seconds of links, devices and requests."""

    fetch_s: float = 0.0
    """Chunks over the links from the source."""
    load_s: float = 0.0
    """The slowest node's."""
    rebuild_s: float = 0.0
    """Cache of answers that go on in the new pipeline, computed anew; 0 where they end in the old one."""
    gap_s: float = 0.0
    """During which requests wait because memory does not admit both pipelines."""
    fetch_bytes: int = 0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.fetch_s + self.load_s + self.rebuild_s + self.gap_s


DWELL_S = 30.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as noise, and how soon it may move again."""

    band: float = 0.1
    """A share of the current value; a candidate that is better by less counts as equal."""
    dwell_s: float = DWELL_S
    idle_requests: float = 0.02
    """Requests under way that are assumed at least."""
    unseen_s: float = 30.0
    """No more than this counts between two looks: nobody knows what was lost while nobody looked, or nothing served."""


RULES = Rules()


class Settling(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of one deployment between two looks at it."""

    regret_s: float = 0.0
    at_s: float | None = None
    """Of the last look."""
    since_s: float | None = None
    """When the current plan began to serve."""
    vain: int = 0
    """Moves in a row that came to nothing."""


class Current(msgspec.Struct, frozen=True, kw_only=True):
    """What serves, at the newest prices; `requests` were under way on average since the last look."""

    estimate: Estimate
    requests: float


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """Where it could move, and what that costs."""

    plan: Plan
    cost: MoveCost


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag="keep"):
    """Stay: *gain* is the share of the value that the candidate would save, *owed_s* what is missing until a move pays."""

    gain: float
    owed_s: float


class Move(msgspec.Struct, frozen=True, kw_only=True, tag="move"):
    """Go to *plan*; *why* in a line."""

    plan: Plan
    cost: MoveCost
    why: str


def settle(
    state: Settling, current: Current, candidate: Candidate, now_s: float, rules: Rules = RULES
) -> tuple[Settling, Keep | Move]:
    """Look at *candidate*, the best plan by the newest profile: add up regret, and move when it has paid for the move."""
    since_s = now_s if state.since_s is None else state.since_s
    passed_s = min(max(0.0, now_s - state.at_s), rules.unseen_s) if state.at_s is not None else 0.0
    gain = _gain(current.estimate, candidate.plan)
    counted = gain if gain > rules.band else min(0.0, gain)
    regret_s = max(0.0, state.regret_s + passed_s * max(current.requests, rules.idle_requests) * counted)
    cost_s = candidate.cost.total_s
    seen = msgspec.structs.replace(state, regret_s=regret_s, at_s=now_s, since_s=since_s)
    rested = now_s - since_s >= rules.dwell_s * 2.0 ** min(state.vain, 6)
    if gain > rules.band and regret_s >= cost_s and rested:
        why = explain(current.estimate, candidate)
        return Settling(at_s=now_s, since_s=now_s, vain=state.vain), Move(
            plan=candidate.plan, cost=candidate.cost, why=why
        )
    return seen, Keep(gain=gain, owed_s=max(0.0, cost_s - regret_s))


def in_vain(state: Settling, now_s: float) -> Settling:
    """The move that was begun came to nothing."""
    return msgspec.structs.replace(state, vain=state.vain + 1, since_s=now_s)


def move_cost(
    problem: Problem,
    change: Transition,
    on_disk: Mapping[NodeId, Collection[int]],
    *,
    answer_s: float = 0.0,
    rebuilt_tokens: int = 0,
) -> MoveCost:
    """Price *change*, towards a plan of *problem*.  *on_disk*: blocks whose chunks a node has; the source has all.

    A gap begins with the answer under way, of *answer_s*, that is half done on average.
    """
    wires = {(link.source, link.target): link for link in problem.links}
    fetched = [a.piece for a in change.actions if isinstance(a, Fetch)]
    missing = {p: _missing_bytes(problem, p, on_disk) for p in fetched if p.node != problem.source}
    loads = [a.piece for a in change.actions if isinstance(a, Load)]
    late = [a.piece for a in change.actions[change.gap.begin :] if isinstance(a, Load)] if change.gap else []
    return MoveCost(
        fetch_s=sum(_carry_s(wires, problem.source, p.node, size_bytes) for p, size_bytes in missing.items()),
        load_s=_load_s(problem, loads),
        rebuild_s=_rebuild_s(problem, loads, rebuilt_tokens),
        gap_s=answer_s / 2 + DRAIN_S + _load_s(problem, late) if change.gap else 0.0,
        fetch_bytes=sum(missing.values()),
    )


def alike(one: Problem, other: Problem, within: float = 0.05) -> bool:
    """Whether the same plan may be assumed for both: the same but for times and rates, and those within a share."""
    if _bare(one) != _bare(other):
        return False
    return all(abs(a - b) <= within * max(abs(a), abs(b)) for a, b in zip(_figures(one), _figures(other), strict=True))


def explain(now: Estimate, candidate: Candidate) -> str:
    """`51 -> 31 ms per token, move costs 3.1 s`: the figure that the plan is judged by, and the price."""
    then, gap_s = candidate.plan.estimate, candidate.cost.gap_s
    match candidate.plan.objective:
        case Objective.LATENCY:
            what = f"{now.time_per_output_token_s * 1e3:.0f} -> {then.time_per_output_token_s * 1e3:.0f} ms per token"
        case Objective.THROUGHPUT:
            what = f"{now.tokens_per_s:.1f} -> {then.tokens_per_s:.1f} tokens per second"
        case Objective.ENERGY:
            what = f"{now.joules:.3g} -> {then.joules:.3g} J per request"
        case Objective.PRICE:
            what = f"{now.price:.3g} -> {then.price:.3g} per request"
    waits = f", {gap_s:.1f} s of them without service" if gap_s else ""
    return f"{what}, move costs {candidate.cost.total_s:.1f} s{waits}"


def _gain(now: Estimate, plan: Plan) -> float:
    """The share of the current value that *plan* saves; negative when it is worse."""
    value, better = objective_value(plan.objective, now), objective_value(plan.objective, plan.estimate)
    return (value - better) / value if value > 0 else 0.0


def _missing_bytes(problem: Problem, piece: Piece, on_disk: Mapping[NodeId, Collection[int]]) -> int:
    there = on_disk.get(piece.node, ())
    return sum(problem.blocks[i].weights_bytes for i in range(piece.start, piece.stop) if i not in there)


def _carry_s(wires: Mapping[tuple[NodeId, NodeId], LinkSpec], source: NodeId, target: NodeId, size_bytes: int) -> float:
    """Seconds on the source's link; nodes without one fetch from each other, at the slowest rate that was measured."""
    slowest = min((link.bytes_per_s for link in wires.values()), default=1.0)
    link = wires.get((source, target))
    return size_bytes / (link.bytes_per_s if link else slowest)


def _load_s(problem: Problem, pieces: Iterable[Piece]) -> float:
    return max((START_S + _weights_bytes(problem, p) / LOAD_BYTES_PER_S for p in pieces), default=0.0)


def _rebuild_s(problem: Problem, pieces: Iterable[Piece], tokens: int) -> float:
    """Rows of running answers through the new stages, at the pace of a prompt."""
    devices = {device.node: device for device in problem.devices}
    prompt_s = sum(sum(devices[p.node].prefill_s[p.start : p.stop]) for p in pieces) if tokens else 0.0
    return tokens / problem.shape.tokens_in * prompt_s


def _weights_bytes(problem: Problem, piece: Piece) -> int:
    return sum(block.weights_bytes for block in problem.blocks[piece.start : piece.stop])


def _bare(problem: Problem) -> Problem:
    """*problem* without what `_figures` compares."""
    replace = msgspec.structs.replace
    devices = tuple(
        replace(device, decode_s=(), prefill_s=(), batched=(), step_overhead_s=0.0) for device in problem.devices
    )
    links = tuple(replace(link, latency_s=0.0, bytes_per_s=1.0) for link in problem.links)
    return replace(problem, devices=devices, links=links)


def _figures(problem: Problem) -> list[float]:
    """Of each device its pace in both phases, of each link delay and rate: sums, for noise in single blocks decides nothing."""
    paces = [
        time_s
        for d in problem.devices
        for time_s in (sum(d.decode_s), sum(d.prefill_s), d.step_overhead_s, *(sum(b.decode_s) for b in d.batched))
    ]
    return paces + [figure for link in problem.links for figure in (link.latency_s, link.bytes_per_s)]
