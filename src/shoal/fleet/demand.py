"""Which of the models that are loaded on demand is to go, and when: several share the memory of a fleet, one at a time if need be.

One goes when nobody has asked for it for as long as it was declared to stay, and earlier when more is promised on a node than the
node has: then those that were used least recently go, and only as many as are needed.  What is answered for is never unloaded,
nor is what was not declared to be loaded on demand.

How much a model is asked for is known at its gateway, which says it with every heartbeat as an age: no two clocks are compared
(ADR 4), and another coordinator hears it anew.  Least *frequently* used was rejected: it keeps what was popular last week.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from shoal.fleet.deployment import Deployment, Drowsy
from shoal.fleet.losses import shard_of
from shoal.fleet.reconcile import Phase, crowded_bytes, heard, phase, resting_bytes
from shoal.fleet.report import NodeReport, Use
from shoal.fleet.sleep import FellAsleep, SleepBegun, SleepEvent, Woken
from shoal.fleet.state import FleetState, drained
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Plan

NEVER_S = float("-inf")
GIVE_UP_S = 10.0
"""What has no place yet is not looked for one any more when nobody has waited for that long."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is loaded on demand, serves, and may be made to go.  Times are the coordinator's."""

    deployment: DeploymentId
    plan_epoch: int
    since_s: float
    """When it began to serve, or when this coordinator saw it first."""
    last_use_s: float
    """When the last answer ended, as far as is known; `NEVER_S`: nobody has asked yet."""
    keep_alive_s: float | None
    busy: bool
    held: dict[NodeId, int]
    """Its bytes, by node."""

    @property
    def idle_since_s(self) -> float:
        """What its keep-alive counts from."""
        return max(self.since_s, self.last_use_s)


def idle_longest(models: Sequence[Loaded]) -> tuple[Loaded, ...]:
    """Those that may go, the least recently used first."""
    idle = (m for m in models if not m.busy)
    return tuple(sorted(idle, key=lambda m: (m.last_use_s, m.since_s, m.deployment)))


def expired(models: Sequence[Loaded], now_s: float) -> tuple[Loaded, ...]:
    """Those whose keep-alive is over."""
    return tuple(
        m for m in models if not m.busy and m.keep_alive_s is not None and now_s - m.idle_since_s >= m.keep_alive_s
    )


def fewest(models: Sequence[Loaded], missing: Mapping[NodeId, int]) -> tuple[Loaded, ...]:
    """Of *models*, in the order in which they should go, those that must for *missing* bytes to come free on each node.

    A node where even all of them would not do is left out of account: nobody goes in vain.
    """
    enough = {n: b for n, b in missing.items() if 0 < b <= sum(m.held.get(n, 0) for m in models)}
    chosen: list[Loaded] = []
    for model in models:
        lacking = [n for n, needed in enough.items() if not _covers(chosen, {n: needed})]
        if any(model.held.get(n, 0) for n in lacking):
            chosen.append(model)
    for model in reversed(chosen.copy()):  # who was taken early may not be needed beside who had to be taken later
        rest = [m for m in chosen if m is not model]
        if _covers(rest, enough):
            chosen = rest
    return tuple(chosen)


def due(state: FleetState, since_s: Mapping[DeploymentId, float], now_s: float) -> tuple[SleepEvent, ...]:
    """The steps that can be taken now; *since_s* tells since when each deployment stands as it does."""
    reports = heard(state, now_s)
    asked = {n: use_of(state, d) for n, d in state.deployments.items() if d.spec.on_demand and not d.asleep}
    steps = [
        step
        for name, use in asked.items()
        if (step := _step(state, state.deployments[name], reports, use, since_s.get(name, now_s), now_s)) is not None
    ]
    models = loaded(state, reports, since_s)
    over = expired(models, now_s)
    steps += [_begun(m, Drowsy(why=f"nobody has asked for it for {now_s - m.idle_since_s:.0f} s")) for m in over]
    resting = resting_bytes(state, reports)
    missing = {
        node: beyond - resting[node] - sum(m.held.get(node, 0) for m in over)
        for node, beyond in crowded_bytes(state, reports).items()
    }
    for model in fewest([m for m in idle_longest(models) if m not in over], missing):
        others = ", ".join(_coming(state, reports, missing.keys() & model.held.keys()))
        steps.append(_begun(model, Drowsy(why=f"its memory is needed for {others or 'others'}", for_room=True)))
    return tuple(steps)


def room_for(
    state: FleetState, name: DeploymentId, since_s: Mapping[DeploymentId, float], now_s: float
) -> tuple[tuple[frozenset[DeploymentId], ...], frozenset[DeploymentId]]:
    """Whose memory a plan for *name* may count on, from the fewest to the most of them; and who is in use besides."""
    others = {n: d for n, d in state.deployments.items() if d.spec.on_demand and n != name}
    leaving = frozenset(n for n, d in others.items() if d.asleep or d.drowsy is not None)
    models = loaded(state, heard(state, now_s), since_s)
    order = [m.deployment for m in idle_longest(models) if m.deployment in others.keys() - leaving]
    tries = tuple(leaving | frozenset(order[:count]) for count in range(len(order) + 1))
    return tries, frozenset(others) - tries[-1]


def loaded(
    state: FleetState, reports: Mapping[NodeId, NodeReport], since_s: Mapping[DeploymentId, float]
) -> tuple[Loaded, ...]:
    """Models that are loaded on demand and serve, and are not on the move."""
    return tuple(_loaded(state, reports, since_s))


def use_of(state: FleetState, deployment: Deployment) -> tuple[Use, float] | None:
    """What the gateway of *deployment* said last of its use, and when that was heard; None when it says nothing."""
    member = state.members.get(deployment.spec.source)
    uses = member.report.uses if member is not None else ()
    found = next((u for u in uses if u.deployment == deployment.spec.deployment), None)
    return (found, member.heard_s) if found is not None and member is not None else None


def _loaded(
    state: FleetState, reports: Mapping[NodeId, NodeReport], since_s: Mapping[DeploymentId, float]
) -> Iterator[Loaded]:
    for name, deployment in state.deployments.items():
        plan, moves = deployment.answer, deployment.successor or deployment.former or deployment.held
        if not deployment.spec.on_demand or moves or not isinstance(plan, Plan):
            continue
        if phase(deployment, reports) is not Phase.SERVING or name not in since_s:
            continue
        held: dict[NodeId, int] = {}
        parts = [(s.node, s.memory_bytes) for s in plan.stages] + [
            (s.node, s.memory_bytes) for s in deployment.standbys
        ]
        for node, part_bytes in parts:
            held[node] = held.get(node, 0) + part_bytes
        yield Loaded(
            deployment=name,
            plan_epoch=deployment.plan_epoch,
            since_s=since_s[name],
            last_use_s=_last_use_s(use_of(state, deployment), NEVER_S),
            keep_alive_s=deployment.spec.keep_alive_s,
            busy=_asked(use_of(state, deployment)) or _answers(deployment, plan, reports),
            held=held,
        )


def _step(
    state: FleetState,
    deployment: Deployment,
    reports: Mapping[NodeId, NodeReport],
    use: tuple[Use, float] | None,
    since_s: float,
    now_s: float,
) -> SleepEvent | None:
    """The next step of one that is drowsy, or has no place."""
    name, drowsy = deployment.spec.deployment, deployment.drowsy
    is_drained = drained(state, name)
    stands = phase(deployment, reports, is_drained=is_drained)
    asleep = FellAsleep(deployment=name, plan_epoch=deployment.plan_epoch)
    if drowsy is not None and stands is Phase.DROWSY:
        if not drowsy.for_room and (_asked(use) or _last_use_s(use, since_s) > since_s):
            return Woken(deployment=name)
        return asleep if is_drained else None
    if _asked(use):
        return None
    if drowsy is not None:
        return asleep  # what it had to answer is broken off by what became of its plan
    homeless = stands in {Phase.PLANNING, Phase.REFUSED, Phase.RECOVERING}
    return asleep if homeless and now_s - _last_use_s(use, since_s) >= GIVE_UP_S else None


def _begun(model: Loaded, drowsy: Drowsy) -> SleepBegun:
    return SleepBegun(deployment=model.deployment, plan_epoch=model.plan_epoch, drowsy=drowsy)


def _coming(
    state: FleetState, reports: Mapping[NodeId, NodeReport], nodes: frozenset[NodeId] | set[NodeId]
) -> list[str]:
    """Deployments that are to be loaded on *nodes*."""
    return [
        name
        for name, d in state.deployments.items()
        if isinstance(d.answer, Plan)
        and phase(d, reports) is Phase.LOADING
        and any(stage.node in nodes for stage in d.answer.stages)
    ]


def _answers(deployment: Deployment, plan: Plan, reports: Mapping[NodeId, NodeReport]) -> bool:
    first = shard_of(deployment, plan, 0, reports)
    return first is not None and first.live_requests + first.waiting_requests > 0


def _asked(use: tuple[Use, float] | None) -> bool:
    return use is not None and use[0].in_flight > 0


def _last_use_s(use: tuple[Use, float] | None, at_least_s: float) -> float:
    """When the last answer ended that is known of; what was before *at_least_s* does not count."""
    idle_s = use[0].idle_s if use is not None else None
    return max(at_least_s, use[1] - idle_s) if use is not None and idle_s is not None else at_least_s


def _covers(models: Sequence[Loaded], missing: Mapping[NodeId, int]) -> bool:
    return all(sum(m.held.get(node, 0) for m in models) >= needed for node, needed in missing.items())
