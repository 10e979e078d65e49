"""From a few timed steps to the time of any step.

A step of r rows for each of b sequences, after c cached positions, takes base(r, b) + slope(r, b) * c seconds.  Base
and slope are least-squares lines over the contexts timed at (r, b), never negative, and run straight from one timed r
(or b) to the next.  So data of the model t = a + b * rows + c * rows * context are met exactly, while the change of
kernels between one row and many is followed, where one global line over rows would split the difference (one row is
bound by memory, a chunk by arithmetic).

Outside the timed rows the nearest line goes on; after a single timed row count, rows cost in proportion (an upper
bound: more rows per call never cost more each).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

import msgspec

from shoal.profile.fleet import BlockTrial


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step with this many rows (or sequences): `base_s + slope_s * context`."""

    at: int
    base_s: float
    slope_s: float

    def time_s(self, context: float) -> float:
        return self.base_s + self.slope_s * context


class KindFit(msgspec.Struct, frozen=True, kw_only=True):
    """Time functions of one kind of block on one device."""

    kind: str
    by_rows: tuple[Line, ...]
    """One sequence, rising in rows."""
    by_batch: tuple[Line, ...]
    """One row for each sequence, rising in sequences."""
    residual: float
    """Median of |fitted - timed| / timed over the trials."""

    def step_s(self, rows: float, context: float) -> float:
        """One sequence: *rows* new positions after *context* cached ones."""
        return max(0.0, _between(self.by_rows, rows, context))

    def decode_s(self, context: float, batch: float = 1) -> float:
        """One new position for each of *batch* sequences with *context* cached positions each."""
        return max(0.0, _between(self.by_batch or self.by_rows[:1], batch, context))

    def prefill_s(self, tokens: int, chunk_tokens: int) -> float:
        """A prompt of *tokens*, in steps of at most *chunk_tokens* rows."""
        starts = range(0, tokens, chunk_tokens)
        return sum(self.step_s(min(chunk_tokens, tokens - start), start) for start in starts)


def fit(trials: Sequence[BlockTrial]) -> dict[str, KindFit]:
    """Time functions for each kind among *trials*; a kind without any trial of a single sequence is left out."""
    kinds: defaultdict[str, list[BlockTrial]] = defaultdict(list)
    for trial in trials:
        kinds[trial.kind].append(trial)
    fits = {kind: _fit_kind(kind, group) for kind, group in kinds.items()}
    return {kind: fitted for kind, fitted in fits.items() if fitted.by_rows}


def _fit_kind(kind: str, trials: Sequence[BlockTrial]) -> KindFit:
    by_rows = _lines((trial.rows, trial) for trial in trials if trial.batch == 1)
    by_batch = _lines((trial.batch, trial) for trial in trials if trial.rows == 1)
    bare = KindFit(kind=kind, by_rows=by_rows, by_batch=by_batch, residual=0.0)
    errors = sorted(_error(bare, trial) for trial in trials if by_rows)
    return msgspec.structs.replace(bare, residual=errors[len(errors) // 2] if errors else 0.0)


def _error(fitted: KindFit, trial: BlockTrial) -> float:
    one_row = trial.rows == 1 and fitted.by_batch
    time_s = fitted.decode_s(trial.context, trial.batch) if one_row else fitted.step_s(trial.rows, trial.context)
    return abs(time_s - trial.time_s) / trial.time_s if trial.time_s else abs(time_s)


def _lines(keyed: Iterable[tuple[int, BlockTrial]]) -> tuple[Line, ...]:
    groups: defaultdict[int, list[BlockTrial]] = defaultdict(list)
    for at, trial in keyed:
        groups[at].append(trial)
    slopes = {at: _slope_s(group) for at, group in groups.items()}
    known = [Line(at=at, base_s=slope, slope_s=0.0) for at, slope in sorted(slopes.items()) if slope is not None]
    return tuple(_line(at, group, _filled(slopes[at], known, at)) for at, group in sorted(groups.items()))


def _line(at: int, group: Sequence[BlockTrial], slope_s: float) -> Line:
    base_s = fmean(trial.time_s - slope_s * trial.context for trial in group)
    return Line(at=at, base_s=max(0.0, base_s), slope_s=slope_s)


def _slope_s(group: Sequence[BlockTrial]) -> float | None:
    """Least-squares seconds per cached position, at least 0; None where only one context was timed."""
    middle = fmean(trial.context for trial in group)
    spread = sum((trial.context - middle) ** 2 for trial in group)
    if not spread:
        return None
    rise = sum((trial.context - middle) * trial.time_s for trial in group)
    return max(0.0, rise / spread)


def _filled(slope_s: float | None, known: Sequence[Line], at: int) -> float:
    """A slope that was not timed, from its neighbours; 0 when none was."""
    if slope_s is not None:
        return slope_s
    return max(0.0, _between(known, at, 0.0)) if known else 0.0


def _between(lines: Sequence[Line], at: float, context: float) -> float:
    if len(lines) == 1:
        return lines[0].time_s(context) * at / lines[0].at
    upper = next((index for index, line in enumerate(lines) if line.at >= at), len(lines) - 1)
    right = max(1, upper)
    low, high = lines[right - 1], lines[right]
    part = (at - low.at) / (high.at - low.at)
    return low.time_s(context) + part * (high.time_s(context) - low.time_s(context))
