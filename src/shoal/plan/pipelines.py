"""Which pipelines to place at once: a bounded heuristic over single-pipeline plans.

One after another, each the best on what the others have left; a pipeline that takes all quick devices leaves crumbs, so this is
tried with the number of stages limited to a fair share for two, three, ... pipelines as well.  A device serves one pipeline, but
for those that a block is pinned to: every pipeline passes them.  The source is one of them wherever prompts stay with it, and
its shard should be the same for all, or it would hold blocks several times: a few lengths of it are tried.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import Budget
from shoal.plan.cost import Span, barred, free_bytes, kv_positions, owners, repeated_bytes, shard_memory
from shoal.plan.limited import best
from shoal.plan.problem import Pin, Problem
from shoal.plan.routes import Way, costed, fits_together, shards
from shoal.plan.search import demanded
from shoal.plan.tables import build_tables

PART = 0.25
"""Of what is left to plan, for one pipeline."""
MOST = 16
"""Pipelines at once."""
FAIR = 6
"""Numbers of pipelines whose fair shares of devices are tried."""
LENGTHS = 4
"""Of the first shard, where all pipelines begin on one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """How pipelines are cut: the blocks of the shared first shard (0: no matter), and the most devices of each (0: any)."""

    first: int
    devices: int


def families(problem: Problem, known: Sequence[Way], most: int, budget: Budget) -> Iterator[tuple[Way, ...]]:
    """Sets of pipelines that fit together, *most* in each; the first of *known* alone to begin with."""
    yield (known[0],)
    if kept := _kept(problem, known, most):
        yield kept
    local = _local(problem)
    for course in _courses(problem, known, most):
        if budget.spent():
            return
        found = _in_turn(problem, course, most, budget)
        yield found
        if local is not None and local not in found and (with_local := _kept(problem, [local, *found], most)):
            yield with_local


def shared_devices(problem: Problem) -> frozenset[NodeId]:
    """Devices that every pipeline passes."""
    return frozenset(owners(problem).values())


def most_at_once(problem: Problem, most: int) -> int:
    """*most* (0: any number), or the fewer that there are devices and memory for.

    What the devices of all pipelines cannot hold of the model must be held anew by each pipeline, on devices of its own.
    """
    out, common = barred(problem), shared_devices(problem)
    devices = [device for device in problem.devices if device.node not in out]
    own = [device for device in devices if device.node not in common]
    factor = min((device.weights_factor for device in devices), default=1.0)
    stored = sum(block.weights_bytes for block in problem.blocks) - repeated_bytes(problem, 0, len(problem.blocks))
    cache = sum(block.kv_bytes_per_token for block in problem.blocks) * kv_positions(problem.shape)
    outside = factor * stored + cache - sum(free_bytes(device) for device in devices if device.node in common)
    count = len(own) + 2  # those without a device of their own: the best plan, and the whole model on one device
    if outside > 0:
        count = min(len(own), int(sum(free_bytes(device) for device in own) / outside))
    return max(1, min(most or count, count))


def _courses(problem: Problem, known: Sequence[Way], most: int) -> Iterator[_Course]:
    free = len({device.node for device in problem.devices} - {*problem.exclude} - shared_devices(problem))
    fair = dict.fromkeys(math.ceil(free / count) for count in range(2, min(most, free, FAIR) + 1))
    for first in _lengths(problem, known):
        for devices in (0, *fair):
            yield _Course(first=first, devices=devices)


def _lengths(problem: Problem, known: Sequence[Way]) -> tuple[int, ...]:
    """Lengths of the first shard to try where it is on one device: that of the best plans, and the least."""
    owner = owners(problem).get(0)
    if owner is None:
        return (0,)
    pinned = 1
    while pinned < len(problem.blocks) and owners(problem).get(pinned) == owner:
        pinned += 1
    seen = [way[0].stop for way in known if way[0].node == owner and pinned <= way[0].stop < len(problem.blocks)]
    return tuple(dict.fromkeys([*seen[:1], min(pinned, len(problem.blocks) - 1), *seen]))[:LENGTHS]


def _in_turn(problem: Problem, course: _Course, most: int, budget: Budget) -> tuple[Way, ...]:
    """Pipelines one after another, until there is no further one."""
    found: list[Way] = []
    taken: set[NodeId] = set()
    while len(found) < most:
        stated = _left(problem, course, taken)
        if stated is None:
            break
        tables = build_tables(stated)
        way = best(stated, tables, budget.share(PART), demanded(stated, tables)).spans(tables)
        if not way or not fits_together(problem, [*found, way]) or costed(problem, way) is None:
            break
        found.append(way)
        fresh = {span.node for span in way} - shared_devices(problem)
        if not fresh or budget.spent():
            break
        taken |= fresh
    return tuple(found)


def _left(problem: Problem, course: _Course, taken: set[NodeId]) -> Problem | None:
    """The problem of the next pipeline: without devices that are taken, the first shard as it must be."""
    source = owners(problem).get(0)
    shards_most = course.devices + len(shared_devices(problem)) if course.devices else 0
    stages = min((count for count in (shards_most, problem.max_stages) if count), default=0)
    stated = replace(problem, exclude=(*problem.exclude, *sorted(taken - {*problem.exclude})), max_stages=stages)
    stated = replace(stated, require=(), limits=replace(problem.limits, tokens_per_s=None))
    if len(barred(stated)) == len(problem.devices):
        return None
    if not course.first or source is None:
        return stated
    owned = {pin.block: pin for pin in problem.pins}
    owned |= {block: Pin(block=block, node=source) for block in range(course.first) if block not in owned}
    if any(owned[block].node != source for block in range(course.first)):
        return None
    return replace(_cut_after(stated, source, course.first), pins=tuple(owned.values()))


def _cut_after(problem: Problem, source: NodeId, first: int) -> Problem:
    """The problem in which the source has just the room for so many blocks, and for the last one where that is pinned to it."""
    blocks = len(problem.blocks)
    changed = []
    for device in problem.devices:
        if device.node == source:
            need = shard_memory(problem, device, 0, first).total
            if owners(problem).get(blocks - 1) == source and first < blocks:
                need += shard_memory(problem, device, blocks - 1, blocks).total
            changed.append(replace(device, memory_budget_bytes=need, memory_promised_bytes=0))
        else:
            changed.append(device)
    return replace(problem, devices=tuple(changed))


def _local(problem: Problem) -> Way | None:
    """The whole model on the device that every pipeline begins on, if it may and can."""
    owner = owners(problem).get(0)
    if owner is None:
        return None
    tables = build_tables(problem)
    alone = [index for index, node in enumerate(tables.nodes) if node == owner]
    blocks = len(problem.blocks)
    fits = alone and bool(tables.need_bytes[alone[0], 0, blocks] <= tables.free_bytes[alone[0]])
    allowed = fits and bool(tables.run_s[alone[0], 0, blocks] < float("inf")) and problem.stages_exactly in {0, 1}
    spans = (Span(owner, 0, blocks),)
    return spans if allowed and costed(problem, spans) is not None else None


def _kept(problem: Problem, ways: Sequence[Way], most: int) -> tuple[Way, ...]:
    """Of *ways* in their order those that fit together, each with a device of its own."""
    found: list[Way] = []
    taken: set[NodeId] = set()
    common = shared_devices(problem)
    for way in ways:
        fresh = {span.node for span in way} - common
        alone = not fresh and len(shards(way)) == 1 and way not in found
        if (fresh & taken) or not (fresh or alone) or len(found) == most:
            continue
        if fits_together(problem, [*found, way]):
            found.append(way)
            taken |= fresh
    return tuple(found)
