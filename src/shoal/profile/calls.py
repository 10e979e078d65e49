"""What an engine call costs whatever it computes, told apart from the blocks in it.

A stage of thirty blocks is one call: its binding, its wake-up and its cold code are paid once, while a trial of one block pays
them whole.  For small blocks they are more than the work.  So beside one block of each kind a run of neighbours is timed as one
shard: with n blocks in the run, the times of its blocks alone hold n calls and the run holds one.  What is left over is
shared out by n - 1 (`step_overhead_s`), and at each shape of step the blocks are scaled so that call and blocks add up to the run:
stages are priced like what was timed in one piece.  Kinds that are not in the run only lose the call.

Shapes that the run was not timed at take the scale of the nearest one that it was (same batch, then nearest in rows).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from shoal.model.frontier import Block
from shoal.profile.fleet import BlockTrial

RUN_BLOCKS = 16
"""Enough that a tenth more or less in a block's time moves the cost of a call by a hundredth of it."""
LEAST_PART = 0.05
"""Of what a block took alone: what is left of it however dear the call seems."""
SCALES = (0.25, 4.0)
"""A run that is further from its blocks than this was disturbed."""


class SampleSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks [`start`, `stop`) to time as one shard; `kind` is that of a single block, empty for the run."""

    start: int
    stop: int
    kind: str = ""


class Apportioned(msgspec.Struct, frozen=True, kw_only=True):
    """Trials of blocks without their calls, and what a call costs."""

    trials: tuple[BlockTrial, ...]
    step_overhead_s: float


def sample_spans(blocks: Sequence[Block], *, run_bytes: int, most_bytes: int) -> tuple[SampleSpan, ...]:
    """What to time: a run of neighbours first, then one block of each kind, from the run where it is there.

    The run holds at most *run_bytes* of weights, or is the smallest pair of neighbours; no run where that exceeds *most_bytes*.
    """
    run = _run(blocks, run_bytes, most_bytes)
    inside = {block.kind: block.index for block in reversed(blocks[slice(*run)])}
    first = {block.kind: block.index for block in reversed(blocks)} | inside
    kinds = dict.fromkeys(block.kind for block in blocks)
    singles = tuple(SampleSpan(start=first[kind], stop=first[kind] + 1, kind=kind) for kind in kinds)
    return (SampleSpan(start=run[0], stop=run[1]), *singles) if run[1] > run[0] else singles


def apportion(alone: Sequence[BlockTrial], run: Sequence[BlockTrial], kinds: Sequence[str]) -> Apportioned:
    """Share out what was timed between calls and blocks; *kinds* are those of the run's blocks, in any order."""
    counts = Counter(kinds)
    by_shape = {(trial.kind, shape_of(trial)): trial.time_s for trial in alone}
    overhead_s = _overhead_s(by_shape, run, counts)
    scales = {
        shape_of(trial): _scale(by_shape, trial, counts, overhead_s)
        for trial in run
        if all((kind, shape_of(trial)) in by_shape for kind in counts)
    }
    return Apportioned(
        trials=tuple(_net(trial, overhead_s, scales if trial.kind in counts else {}) for trial in alone),
        step_overhead_s=overhead_s,
    )


def shape_of(trial: BlockTrial) -> tuple[int, int, int]:
    """Batch, rows and context of a trial's steps."""
    return trial.batch, trial.rows, trial.context


def _run(blocks: Sequence[Block], run_bytes: int, most_bytes: int) -> tuple[int, int]:
    """The longest, then lightest, span within the bound; else the lightest pair; (0, 0) where there is none."""
    weights = [block.weights_bytes for block in blocks]
    spans = [(i, j) for i in range(len(blocks)) for j in range(i + 2, min(i + RUN_BLOCKS, len(blocks)) + 1)]
    fitting = [span for span in spans if sum(weights[slice(*span)]) <= run_bytes]
    if fitting:
        return min(fitting, key=lambda span: (span[0] - span[1], sum(weights[slice(*span)])))
    pairs = [span for span in spans if span[1] - span[0] == 2 and sum(weights[slice(*span)]) <= most_bytes]
    return min(pairs, key=lambda span: sum(weights[slice(*span)]), default=(0, 0))


Times = Mapping[tuple[str, tuple[int, int, int]], float]


def _overhead_s(alone: Times, run: Sequence[BlockTrial], counts: Mapping[str, int]) -> float:
    """Of a call, by the smallest step that was timed both ways; 0 where none was."""
    n = sum(counts.values())
    shapes = [trial for trial in run if all((kind, shape_of(trial)) in alone for kind in counts)]
    smallest = min(shapes, key=shape_of, default=None)
    if n < 2 or smallest is None:
        return 0.0
    apart_s = sum(count * alone[kind, shape_of(smallest)] for kind, count in counts.items())
    cheapest_s = min(alone[kind, shape_of(smallest)] for kind in counts)
    return min(max(0.0, (apart_s - smallest.time_s) / (n - 1)), cheapest_s)


def _scale(alone: Times, run: BlockTrial, counts: Mapping[str, int], overhead_s: float) -> float:
    parts_s = sum(count * _without(alone[kind, shape_of(run)], overhead_s) for kind, count in counts.items())
    low, high = SCALES
    return min(max(low, (run.time_s - overhead_s) / parts_s), high) if parts_s else 1.0


def _without(time_s: float, overhead_s: float) -> float:
    return max(time_s - overhead_s, LEAST_PART * time_s)


def _net(trial: BlockTrial, overhead_s: float, scales: Mapping[tuple[int, int, int], float]) -> BlockTrial:
    nearest = min(scales, key=lambda shape: _distance(shape, shape_of(trial)), default=None)
    scale = scales[nearest] if nearest is not None else 1.0
    time_s = scale * _without(trial.time_s, overhead_s)
    return msgspec.structs.replace(trial, time_s=time_s, spread_s=scale * trial.spread_s)


def _distance(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return abs(one[0] - other[0]), abs(one[1] - other[1]), abs(one[2] - other[2])
