"""Why each device takes part or not, and what one device alone would give: in words, with numbers (ADR 10).

A device left out is judged by the best plan that includes it, one in use by the best plan without it: both are
by-products of the exact search over sets of devices.  Where that search was not made, the reason claims less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.budget import Budget
from shoal.plan.chain import trace
from shoal.plan.cost import (
    Priced,
    Span,
    Wires,
    barred,
    battery_joules,
    breaches,
    free_bytes,
    objective_value,
    owners,
    price,
    shard_joules,
    shard_memory,
    wires_of,
)
from shoal.plan.figures import duration, share, size
from shoal.plan.found import Choice, Found
from shoal.plan.limited import VECTORS, best
from shoal.plan.problem import Alternative, DeviceSpec, Estimate, Limits, Objective, Problem, Reason, Stage
from shoal.plan.search import EXACT, best_final, demanded
from shoal.plan.tables import Tables, spans_of

EXPLAINED_DEVICES = 8
"""Above this, a throughput plan is not searched for again with and without each device."""
EXPLAINED_WITHIN_LIMITS = 6
"""The same for plans within limits: with a device that is of no use, each search has little to prune by."""
RIVAL_TOLERANCE = 0.01
RIVAL_PART = 0.4
"""Of what is left to explain, for one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What was asked, how it was searched, and what was chosen."""

    problem: Problem
    tables: Tables
    found: Found
    chosen: Priced
    proven: bool
    budget: Budget


def reasons(case: Case) -> tuple[Reason, ...]:
    """One reason per device of the problem, in its order."""
    out = barred(case.problem)
    return tuple(_reason(case, device, out) for device in case.problem.devices)


def alternatives(problem: Problem) -> tuple[Alternative, ...]:
    """The whole model on each device that may hold blocks."""
    out = barred(problem)
    wires = wires_of(problem)
    return tuple(_alone(problem, device, wires) for device in problem.devices if device.node not in out)


def _reason(case: Case, device: DeviceSpec, out: Mapping[NodeId, str]) -> Reason:
    stages = [stage for stage in case.chosen.stages if stage.node == device.node]
    if stages:
        text = f"runs {_part(case, stages)}; {_without(case, device.node)}{_company(device)}"
        return Reason(node=device.node, used=True, text=text)
    text = out.get(device.node) or _unable(case, device) or _with(case, device.node)
    return Reason(node=device.node, used=False, text=f"left out: {text}")


def _part(case: Case, stages: Sequence[Stage]) -> str:
    blocks = " and ".join(f"{stage.start}-{stage.stop - 1}" for stage in stages if not stage.is_relay)
    if not blocks:
        return f"no block: it relays ({duration(sum(stage.decode_s for stage in stages))} of a step)"
    decode_s = sum(stage.decode_s for stage in stages)
    part = share(decode_s, sum(stage.decode_s for stage in case.chosen.stages))
    also = ", and relays" if any(stage.is_relay for stage in stages) else ""
    return f"blocks {blocks} of {len(case.problem.blocks)}, {part} of a step's compute ({duration(decode_s)}){also}"


def _company(device: DeviceSpec) -> str:
    """What no trial can show: engines use all cores, and each was timed as if it had them to itself."""
    if not device.memory_promised_bytes:
        return ""
    held = size(device.memory_promised_bytes)
    return f"; other deployments hold {held} here, and while they answer too, it is slower than predicted"


def _without(case: Case, node: NodeId) -> str:
    if node in owners(case.problem).values():
        return "a block is pinned to it"
    if node in case.problem.require:
        return "it must take part, by request"
    rival = _rival(case, Choice(forbid=1 << case.tables.nodes.index(node)))
    match rival:
        case Priced(estimate=estimate):
            return f"the best plan without it takes {_compare(case.problem.objective, estimate, case.chosen.estimate)}"
        case str():
            return rival or f"no plan without it {_fits(case.problem)}"


def _fits(problem: Problem) -> str:
    return "fits" if problem.limits == Limits() else "fits and keeps to the limits"


def _limits(problem: Problem) -> str:
    return "" if problem.limits == Limits() else " within the limits"


def _with(case: Case, node: NodeId) -> str:
    rival = _rival(case, Choice(require=1 << case.tables.nodes.index(node)))
    match rival:
        case Priced(estimate=estimate):
            compared = _compare(case.problem.objective, estimate, case.chosen.estimate)
            return f"the best plan with it takes {compared}{_links(rival, node)}"
        case str():
            return (
                rival
                or f"no chain with it satisfies memory, links, pins and the number of stages{_limits(case.problem)}"
            )


def _rival(case: Case, choice: Choice) -> Priced | str:
    """The best plan under *choice*; an empty text when there is none, a remark when that was not searched."""
    choice = demanded(case.problem, case.tables, besides=choice)
    if case.found.finals:
        final = best_final(case.found.finals, choice)
        return price(case.problem, spans_of(case.tables, trace(final), final.found_in.via)) if final else ""
    if case.proven and case.found.solver not in {EXACT, VECTORS}:
        return "the chosen plan is proven best without trying every set of devices"
    most = EXPLAINED_DEVICES if case.problem.limits == Limits() else EXPLAINED_WITHIN_LIMITS
    if case.found.solver not in {EXACT, VECTORS} or len(case.tables.nodes) > most:
        return "other sets of devices were not all tried"
    part = case.budget.share(RIVAL_PART)
    rival = best(case.problem, case.tables, part, choice, RIVAL_TOLERANCE)
    if part.spent():
        return "the time to plan was up before other sets of devices were tried"
    return price(case.problem, rival.spans(case.tables)) if rival.chain else ""


def _compare(objective: Objective, rival: Estimate, chosen: Estimate) -> str:
    match objective:
        case Objective.THROUGHPUT:
            theirs, ours = (duration(objective_value(objective, estimate)) for estimate in (rival, chosen))
            return f"{theirs} per token of all streams against {ours}"
        case Objective.ENERGY:
            return f"{rival.joules:.3g} J per request against {chosen.joules:.3g} J"
        case Objective.PRICE:
            return f"{rival.price:.3g} per request against {chosen.price:.3g}"
        case Objective.LATENCY:
            pass
    token = f"{duration(rival.time_per_output_token_s)} per token against {duration(chosen.time_per_output_token_s)}"
    return f"{token} ({duration(rival.latency_s)} per request against {duration(chosen.latency_s)})"


def _links(rival: Priced, node: NodeId) -> str:
    stages = rival.stages
    index = next(i for i, stage in enumerate(stages) if stage.node == node)
    inbound_s = stages[index - 1].send_decode_s if len(stages) > 1 else 0.0
    links_s = inbound_s + (stages[index].send_decode_s if len(stages) > 1 else 0.0)
    return f"; there its links take {duration(links_s)} of a token and its blocks {duration(stages[index].decode_s)}"


def _unable(case: Case, device: DeviceSpec) -> str:
    """Why no plan at all can use it; empty where that is not plain."""
    index = case.tables.nodes.index(device.node)
    runs = np.isfinite(case.tables.run_s[index])
    if not runs.any():
        return _drained(case.problem, device) or "every block is pinned to another device"
    smallest = float(case.tables.need_bytes[index][runs].min())
    if smallest > case.tables.free_bytes[index]:
        promised = f" ({size(device.memory_promised_bytes)} are promised)" if device.memory_promised_bytes else ""
        return f"{size(free_bytes(device))} are free{promised}, its smallest possible shard needs {size(smallest)}"
    others = [i for i in range(len(case.tables.nodes)) if i != index]
    if (
        others
        and not np.isfinite(case.tables.hop_s[index, others]).any()
        and not np.isfinite(case.tables.hop_s[others, index]).any()
    ):
        return "no link joins it with another device"
    return ""


def _drained(problem: Problem, device: DeviceSpec) -> str:
    """That not even one block is within the device's battery, in numbers; empty where one is."""
    one = (Span(device.node, block, block + 1) for block in range(len(problem.blocks)))
    least = min(shard_joules(problem, device, span) for span in one)
    if least <= battery_joules(device):
        return ""
    return f"its battery gives {device.joules_limit:.4g} J for a request, its smallest shard draws {least:.4g} J"


def _alone(problem: Problem, device: DeviceSpec, wires: Wires) -> Alternative:
    blocks = len(problem.blocks)
    try:
        estimate = price(problem, [Span(device.node, 0, blocks)], wires).estimate
    except InfeasibleError:
        return Alternative(node=device.node, refused=f"no link joins it with the source {problem.source}")
    refused = _refusal(problem, device) or _beyond(problem.limits, estimate)
    return Alternative(node=device.node, estimate=estimate, refused=refused)


def _beyond(limits: Limits, estimate: Estimate) -> str:
    names = [name.removesuffix("_s").replace("_", " ") for name in breaches(limits, estimate)]
    return f"it breaks the limit on {' and '.join(names)}" if names else ""


def _refusal(problem: Problem, device: DeviceSpec) -> str:
    need = shard_memory(problem, device, 0, len(problem.blocks)).total
    if need > free_bytes(device):
        return f"the whole model needs {size(need)}, {size(free_bytes(device))} are free"
    if problem.pin_first and device.node != problem.source:
        return "the first block stays on the source"
    if problem.pin_last and device.node != problem.source:
        return "the last block stays on the source"
    if device.joules_limit is not None:
        drawn = shard_joules(problem, device, Span(device.node, 0, len(problem.blocks)))
        if drawn > battery_joules(device):
            return f"a request draws {drawn:.4g} J, its battery gives {device.joules_limit:.4g} J"
    foreign = next((pin for pin in problem.pins if pin.node != device.node), None)
    if foreign:
        return f"block {foreign.block} is pinned to {foreign.node}"
    other = next((node for node in problem.require if node != device.node), None)
    if other:
        return f"{other} must take part"
    return f"{problem.stages_exactly} stages are asked for" if problem.stages_exactly > 1 else ""
