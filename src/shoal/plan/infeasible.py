"""What stands in the way when nothing fits: computed by solving nearby problems, not guessed.

The memory that is missing is the least sum of overflows over all chains (the same search, its cost being the bytes by
which a stage exceeds its device).  The nearest setting is the largest context, or the most slots, with which a
placement exists.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.plan.arrays import INF
from shoal.plan.budget import Budget
from shoal.plan.chain import relax
from shoal.plan.cost import Span, barred, free_bytes, owners, shard_joules, shard_memory
from shoal.plan.figures import size
from shoal.plan.found import Found
from shoal.plan.problem import DeviceSpec, Infeasible, Problem, RequestShape, Residency
from shoal.plan.search import NOTHING, cheapest, demanded
from shoal.plan.tables import Tables, build_tables, cost_passes, missing_passes

CONTEXT_STEP_TOKENS = 64
MOST_TOLD = 4
"""Devices that one reason names."""
PART = 0.4
"""Of what is left to explain, for one question: the first hard one would leave nothing for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What is known when there is no plan: the least memory that is missing, and whether it is proven that there is none."""

    missing: Found
    proven: bool


def least_missing(problem: Problem, tables: Tables, budget: Budget) -> Found:
    """The chain whose stages overflow their devices least; its cost is in bytes.  Without time to look, its bound alone."""
    passes = list(missing_passes(tables))
    if budget.spent():
        bound = min((relax(tables, search).bound for search in passes), default=INF)
        return dataclasses.replace(NOTHING, bound=bound)
    return cheapest(tables, passes, budget.share(PART), demanded(problem, tables))


def infeasible(problem: Problem, tables: Tables | None, budget: Budget, searched: Searched | None = None) -> Infeasible:
    """Say what is missing; *tables* is None when no device is left at all, or one that is wanted may not take part."""
    if tables is None:
        return _barred(problem)
    missing = searched.missing if searched else least_missing(problem, tables, budget)
    proven = searched is not None and searched.proven
    if missing.chain is None and 0 < missing.bound < INF:
        return _at_least(missing.bound)
    if missing.chain is None:
        return _not_memory(problem, budget, proven=proven or missing.bound == INF)
    if missing.cost <= 0:
        return _undecided(problem)
    return _memory(problem, tables, Searched(missing=missing, proven=proven), budget)


def _barred(problem: Problem) -> Infeasible:
    out = barred(problem)
    wanted = {
        **{node: f"block {block}" for block, node in owners(problem).items()},
        **dict.fromkeys(problem.require, "a block"),
    }
    refused = next((node for node in wanted if node in out), None)
    if refused is None:
        said, hint = "every device is excluded or outside of the allowed regions", "allow at least one device"
    else:
        said = f"{wanted[refused]} belongs on {refused}, which may hold none: {out[refused]}"
        hint = "allow that region and trust, or let the block be elsewhere"
    return Infeasible(reason=said, needed_bytes=0, available_bytes=0, hint=hint)


def _memory(problem: Problem, tables: Tables, searched: Searched, budget: Budget) -> Infeasible:
    missing = searched.missing
    chain = missing.chain or ()
    needed = int(sum(tables.need_bytes[device, start, stop] for device, start, stop in chain))
    stages = ", ".join(
        f"{tables.nodes[device]} would need {size(tables.need_bytes[device, start, stop])} for blocks {start}-{stop - 1} "
        f"and has {size(tables.free_bytes[device])}"
        for device, start, stop in chain
    )
    least = missing.bound >= missing.cost
    about = "" if least else "about "
    proven = least or searched.proven or missing.bound > 0
    verdict = "the model does not fit" if proven else "no placement was found, not proven that none exists"
    return Infeasible(
        reason=f"{verdict}: {about}{size(missing.cost)} of memory are missing; {_too_large(problem)}"
        f"the nearest placement: {stages}",
        needed_bytes=needed,
        available_bytes=needed - int(missing.cost),
        hint=_nearest(problem, budget)
        or _more_stages(problem, budget)
        or f"add a device, or {about}{size(missing.cost)} of memory budget to those in the reason",
    )


def _too_large(problem: Problem) -> str:
    """The first block that no device holds even alone."""
    out = barred(problem)
    devices = [device for device in problem.devices if device.node not in out]
    for index, block in enumerate(problem.blocks):
        need = [(shard_memory(problem, device, index, index + 1).total, free_bytes(device)) for device in devices]
        if all(needed > free for needed, free in need):
            needed, free = min(need, key=lambda one: one[0] - one[1])
            return f"block {index} ({block.name}) alone needs {size(needed)}, no device has more than {size(free)} for it; "
    return ""


def _more_stages(problem: Problem, budget: Budget) -> str:
    """Whether the number of stages is what stands in the way."""
    free = replace(problem, max_stages=0, stages_exactly=0)
    if free == problem or not _fits(free, budget, problem.shape):
        return ""
    asked = f"exactly {problem.stages_exactly}" if problem.stages_exactly else f"at most {problem.max_stages}"
    return f"it fits with another number of stages (now {asked})"


def _at_least(missing_bytes: float) -> Infeasible:
    return Infeasible(
        reason=f"the model does not fit: at least {size(missing_bytes)} of memory are missing; where, was not searched in time",
        needed_bytes=int(missing_bytes),
        available_bytes=0,
        hint="allow more time to plan, add a device, or ask for a smaller context or fewer slots",
    )


def _nearest(problem: Problem, budget: Budget) -> str:
    shape = problem.shape
    found = []
    if tokens := _largest_context(problem, budget):
        found.append(f"a context of {tokens} tokens (now {shape.context_tokens})")
    live = shape.in_flight * shape.batch
    numbers = range(live, shape.slots)
    fit = _last_true(len(numbers), lambda index: _fits(problem, budget, replace(shape, slots=numbers[index])))
    slots = 0 if fit is None else numbers[fit]
    if slots:
        found.append(f"{slots} slot{'s' * (slots > 1)} (now {shape.slots})")
    if not found and shape.slots > live:
        fewest = replace(problem, shape=replace(shape, slots=live))
        if tokens := _largest_context(fewest, budget):
            found.append(f"a context of {tokens} tokens with {live} slot{'s' * (live > 1)}")
    return f"it fits with {' or with '.join(found)}" if found else ""


def _largest_context(problem: Problem, budget: Budget) -> int:
    """The largest context that fits, to the step; 0 when none does that still holds a typical request."""
    shape = problem.shape
    least = shape.tokens_in + shape.tokens_out
    steps = range(least, shape.context_tokens, CONTEXT_STEP_TOKENS)
    fit = _last_true(len(steps), lambda index: _fits(problem, budget, replace(shape, context_tokens=steps[index])))
    return 0 if fit is None else steps[fit]


def _last_true(count: int, holds: Callable[[int], bool]) -> int | None:
    """The last index at which a property holds that never comes back once lost."""
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if low >= 0 else None


def _fits(problem: Problem, budget: Budget, shape: RequestShape) -> bool:
    """Whether a chain is found; once the budget is spent nobody looks, and what was found so far is named."""
    if budget.spent():
        return False
    tables = build_tables(replace(problem, shape=shape))
    return cheapest(tables, list(cost_passes(tables)), budget.share(PART), demanded(problem, tables)).chain is not None


def _not_memory(problem: Problem, budget: Budget, *, proven: bool) -> Infeasible:
    """No chain exists even with endless memory: find the one demand without which one would."""
    links = f"no chain of links leads from {problem.source} through enough devices and back"
    untimed = tuple(device.node for device in problem.devices if not device.decode_s)
    eased = (
        (
            replace(problem, stages_exactly=0),
            _wrong_number(problem),
            "ask for another number of stages, or 0 to leave it to the planner",
        ),
        (replace(problem, max_stages=0), f"no chain has at most {problem.max_stages} stages", "allow more stages"),
        (replace(problem, relay=True), "no chain has direct links all the way", "allow relays, or connect the devices"),
        (
            replace(problem, pins=()),
            f"the pins contradict each other: a device runs one contiguous range of blocks{_torn(problem)}",
            "drop a pin",
        ),
        (replace(problem, require=()), "no chain uses every device that must take part", "demand fewer devices"),
        (replace(problem, devices=_charged(problem)), _drained(problem), "raise joules_limit"),
        (
            replace(problem, residency=Residency()),
            "no chain stays where activations may be",
            "allow more regions or trust classes",
        ),
        (replace(problem, exclude=untimed), "no chain avoids the excluded devices", "exclude fewer devices"),
        (replace(problem, pin_last=False), "no chain ends on the source", "let the last block run elsewhere"),
    )
    for nearby, reason, hint in eased:
        if nearby == problem:
            continue
        if budget.spent():
            return _unexplained(problem) if proven else _undecided(problem)
        if least_missing(nearby, build_tables(nearby), budget).chain is not None:
            return Infeasible(reason=reason, needed_bytes=0, available_bytes=0, hint=hint)
    if not proven:
        return _undecided(problem)
    return Infeasible(reason=links, needed_bytes=0, available_bytes=0, hint="connect the devices, or drop a demand")


def _torn(problem: Problem) -> str:
    """The first device whose pinned blocks have another device's between them."""
    owned = sorted(owners(problem).items())
    for index, (block, node) in enumerate(owned):
        later = [other for other, its in owned[index + 1 :] if its == node]
        between = next((entry for entry in owned if later and block < entry[0] < later[-1] and entry[1] != node), None)
        if between:
            return f", yet blocks {block} and {later[-1]} belong on {node}, block {between[0]} between them on {between[1]}"
    return ""


def _drained(problem: Problem) -> str:
    """What each battery gives, and what the smallest shard on that device draws."""
    limited = [device for device in problem.devices if device.joules_limit is not None and device.decode_s]
    least = [
        min(shard_joules(problem, device, Span(device.node, b, b + 1)) for b in range(len(problem.blocks)))
        for device in limited
    ]
    told = [
        f"{device.node} gives {device.joules_limit:.4g} J and draws {joules:.4g} J or more for its smallest shard"
        for device, joules in zip(limited, least, strict=True)
    ]
    more = f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return f"no chain keeps within the devices' batteries: {', '.join(told[:MOST_TOLD])}{more}"


def _charged(problem: Problem) -> tuple[DeviceSpec, ...]:
    return tuple(replace(device, joules_limit=None) for device in problem.devices)


def _wrong_number(problem: Problem) -> str:
    wanted, there = problem.stages_exactly, len([d for d in problem.devices if d.node not in problem.exclude])
    most = min(there, len(problem.blocks))
    if wanted <= most:
        return f"no chain has exactly {wanted} stages"
    what, verb = ("node", "can run") if most == there else ("block", "can make")
    plural = "s" * (most != 1)
    return f"{most} {what}{plural} {verb} {most} stage{plural} at most, {wanted} are asked for"


def _undecided(problem: Problem) -> Infeasible:
    return Infeasible(
        reason=f"no placement of {len(problem.blocks)} blocks on {len(problem.devices)} devices was found before the search ended; "
        "it is not proven that none exists",
        needed_bytes=0,
        available_bytes=0,
        hint="allow more time to plan, or exclude devices",
    )


def _unexplained(problem: Problem) -> Infeasible:
    return Infeasible(
        reason=f"no placement of {len(problem.blocks)} blocks on {len(problem.devices)} devices keeps to all demands, "
        "whatever the memory; which demand stands in the way was not found before the search ended",
        needed_bytes=0,
        available_bytes=0,
        hint="allow more time to plan, or drop a demand: number of stages, pins, devices that must take part",
    )
