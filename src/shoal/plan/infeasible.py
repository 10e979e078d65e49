"""What stands in the way when nothing fits: computed by solving nearby problems, not guessed.

The memory that is missing is the least sum of overflows over all chains (the same search, its cost being the bytes by
which a stage exceeds its device).  The nearest setting is the largest context, or the most slots, with which a
placement exists.
"""

from collections.abc import Callable

from msgspec.structs import replace

from shoal.plan.budget import Budget
from shoal.plan.figures import size
from shoal.plan.problem import Infeasible, Problem, RequestShape
from shoal.plan.search import EXACT, Found, cheapest
from shoal.plan.tables import Tables, build_tables, missing_passes, time_passes

CONTEXT_STEP_TOKENS = 64


def infeasible(problem: Problem, tables: Tables | None, budget: Budget) -> Infeasible:
    """Say what is missing; *tables* is None when no device is left at all."""
    if tables is None:
        return Infeasible(
            reason="every device is excluded", needed_bytes=0, available_bytes=0, hint="allow at least one device"
        )
    missing = cheapest(tables, list(missing_passes(tables)), budget)
    if missing.chain is None:
        return _not_memory(problem, budget)
    if missing.cost <= 0:
        return _undecided(problem)
    return _memory(problem, tables, missing, budget)


def _memory(problem: Problem, tables: Tables, missing: Found, budget: Budget) -> Infeasible:
    chain = missing.chain or ()
    needed = int(sum(tables.need_bytes[device, start, stop] for device, start, stop in chain))
    stages = ", ".join(
        f"{tables.nodes[device]} would need {size(tables.need_bytes[device, start, stop])} for blocks {start}-{stop - 1} "
        f"and has {size(tables.free_bytes[device])}"
        for device, start, stop in chain
    )
    about = "" if missing.solver == EXACT else "about "
    verdict = (
        "the model does not fit" if missing.solver == EXACT else "no placement was found, not proven that none exists"
    )
    return Infeasible(
        reason=f"{verdict}: {about}{size(missing.cost)} of memory are missing; the nearest placement: {stages}",
        needed_bytes=needed,
        available_bytes=needed - int(missing.cost),
        hint=_nearest(problem, budget)
        or f"add a device, or {about}{size(missing.cost)} of memory budget to those in the reason",
    )


def _nearest(problem: Problem, budget: Budget) -> str:
    shape = problem.shape
    found = []
    if tokens := _largest_context(problem, budget):
        found.append(f"a context of {tokens} tokens (now {shape.context_tokens})")
    numbers = range(shape.in_flight, shape.slots)
    fit = _last_true(len(numbers), lambda index: _fits(problem, budget, replace(shape, slots=numbers[index])))
    slots = 0 if fit is None else numbers[fit]
    if slots:
        found.append(f"{slots} slot{'s' * (slots > 1)} (now {shape.slots})")
    if not found and shape.slots > shape.in_flight:
        fewest = replace(problem, shape=replace(shape, slots=shape.in_flight))
        if tokens := _largest_context(fewest, budget):
            found.append(f"a context of {tokens} tokens with {shape.in_flight} slot{'s' * (shape.in_flight > 1)}")
    return f"it fits with {' or with '.join(found)}" if found else ""


def _largest_context(problem: Problem, budget: Budget) -> int:
    """The largest context that fits, to the step; 0 when none does that still holds a typical request."""
    shape = problem.shape
    least = shape.tokens_in + shape.tokens_out
    steps = list(range(least, shape.context_tokens, CONTEXT_STEP_TOKENS))
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
    tables = build_tables(replace(problem, shape=shape))
    return cheapest(tables, list(time_passes(tables)), budget).chain is not None


def _not_memory(problem: Problem, budget: Budget) -> Infeasible:
    """No chain exists even with endless memory: find the one demand without which one would."""
    links = f"no chain of links leads from {problem.source} through enough devices and back"
    untimed = tuple(device.node for device in problem.devices if not device.decode_s)
    eased = (
        (
            replace(problem, stages_exactly=0),
            f"no chain has exactly {problem.stages_exactly} stages",
            "ask for another number of stages",
        ),
        (replace(problem, max_stages=0), f"no chain has at most {problem.max_stages} stages", "allow more stages"),
        (
            replace(problem, pins=()),
            "the pins contradict each other: a device runs one contiguous range of blocks",
            "drop a pin",
        ),
        (replace(problem, exclude=untimed), "no chain avoids the excluded devices", "exclude fewer devices"),
        (replace(problem, pin_last=False), "no chain ends on the source", "let the last block run elsewhere"),
    )
    for nearby, reason, hint in eased:
        tables = build_tables(nearby)
        if nearby != problem and cheapest(tables, list(missing_passes(tables)), budget).chain is not None:
            return Infeasible(reason=reason, needed_bytes=0, available_bytes=0, hint=hint)
    return Infeasible(reason=links, needed_bytes=0, available_bytes=0, hint="connect the devices, or drop a demand")


def _undecided(problem: Problem) -> Infeasible:
    return Infeasible(
        reason=f"no placement of {len(problem.blocks)} blocks on {len(problem.devices)} devices was found before the search ended; "
        "it is not proven that none exists",
        needed_bytes=0,
        available_bytes=0,
        hint="allow more time to plan, or exclude devices",
    )
