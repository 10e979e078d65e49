"""The planner against its bounds and against named baselines, on generated fleets (`bench.planner.instances`)."""

import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from bench.measure import Cell, Finding, Options, Values, quantile, values_of
from bench.planner.suite import Batch, full, quick, solved
from shoal.plan.baselines import BASELINES
from shoal.plan.problem import Objective

NAME = "planner"
TITLE = "Planner: certified placement against named baselines, two cores"
_EXACT = 1e-9
"""Relative difference that rounding explains; a gap up to this is none."""
Rows = list[Values]


def cells(options: Options) -> list[Cell]:
    batches = quick() if options.quick else full()
    return [Cell(name=batch.name, measure=lambda batch=batch: solved(batch)) for batch in batches]  # type: ignore[misc]


def findings(results: Mapping[str, Values]) -> list[Finding]:
    measured = [(batch, values) for batch in full() if (values := values_of(results, batch.name))]
    if not measured:
        return []
    rows = [_of(batch) | json.loads(row) for batch, values in measured for row in values["rows"]]
    return [*_goals(rows), *_answers(rows), *_rivals(rows), *_sizes(measured, rows)]


def _of(batch: Batch) -> Values:
    family = batch.family
    size = {"layers": family.layers, "devices": family.devices, "blocks": family.blocks}
    return size | {"network": family.network, "objective": family.objective.value}


def _goals(rows: Rows) -> list[Finding]:
    found = [_beaten(rows)]
    for objective in (Objective.LATENCY, Objective.THROUGHPUT):
        of = [row for row in rows if row["layers"] == "uniform" and row["objective"] == objective.value]
        found += _proven(
            [row for row in of if row["devices"] == 20],
            f"20 devices x 80 identical blocks, {objective.value}",
            (0.5, 1),
        )
        found += _proven(
            [row for row in of if row["devices"] == 50], f"50 devices x 80 identical blocks, {objective.value}", (5, 5)
        )
        found += _near([row for row in of if row["devices"] == 300], f"300 devices x 80 blocks, {objective.value}")
    uneven = [row for row in rows if row["layers"] == "uneven" and row["devices"] == 12]
    return found + _proven(uneven, "12 devices, blocks +-50 %, latency", (2, 2))


def _beaten(rows: Rows) -> Finding:
    """A plan of a baseline that is better than ours, or that exists where we say that none does."""
    rivals = [(row, value) for row in rows for value in row["baselines"].values() if value is not None]
    better = sum(row["said"] == "plan" and value < row["value"] * (1 - _EXACT) for row, value in rivals)
    refuted = sum(row["said"] == "infeasible" for row, _ in rivals)
    missed = sum(row["said"] == "unproven" for row, _ in rivals)
    said = f"**{better + refuted + missed}** of {len(rivals)} plans ({better} better than ours, {missed} where we found none, "
    said += f"{refuted} where we said that none exists)"
    beaten = better + refuted + missed
    return Finding(what="plans of baselines that beat ours", goal="0", measured=said, met=beaten == 0)


def _is_proven(row: Values) -> bool:
    return bool(row["said"] == "infeasible" or (row["said"] == "plan" and row["gap"] <= _EXACT))


def _proven(rows: Rows, what: str, limits: tuple[float, float]) -> list[Finding]:
    """Judged by the median and the 95th percentile of the times, and by every answer being proven."""
    if not rows:
        return []
    half, most = limits
    took = [row["took_s"] for row in rows]
    p50, p95, proven = quantile(took, 0.5), quantile(took, 0.95), sum(map(_is_proven, rows))
    goal = f"proven, p50 < {half} s, p95 < {most} s" if half < most else f"proven in < {most} s"
    gaps = [row.get("gap", 1.0) for row in rows if not _is_proven(row)]
    rest = f"; the others' gaps up to {max(gaps):.2%}" if gaps else ""
    said = f"**p50 {p50:.2f} s, p95 {p95:.2f} s** of CPU ({_clock(rows)}), proven {proven} of {len(rows)}{rest}"
    return [Finding(what=what, goal=goal, measured=said, met=p50 < half and p95 < most and proven == len(rows))]


def _clock(rows: Rows) -> str:
    clock = [row["clock_s"] for row in rows]
    return f"by the clock {quantile(clock, 0.5):.2f} s and {quantile(clock, 0.95):.2f} s"


def _near(rows: Rows, what: str) -> list[Finding]:
    if not rows:
        return []
    gap = max(row.get("gap", 1.0) for row in rows)
    longest_s, stages = max(row["took_s"] for row in rows), min(row.get("stages", 0) for row in rows)
    each = ", ".join(f"{name} {max(gaps):.2%}" for name, gaps in _by_network(rows).items())
    time = f"{longest_s:.1f} s of CPU at most ({_clock(rows)})"
    said = f"**gap {gap:.2%}** at most ({each}), {time}, {stages} stages at least, {len(rows)} instances"
    met = gap < 0.02 and longest_s <= 5
    return [Finding(what=what, goal="gap < 2 % in 5 s, 20 stages or more", measured=said, met=met)]


def _by_network(rows: Rows) -> dict[str, list[float]]:
    gaps: dict[str, list[float]] = {}
    for row in rows:
        gaps.setdefault(row["network"], []).append(row.get("gap", 1.0))
    return gaps


def _answers(rows: Rows) -> list[Finding]:
    count = Counter(row["said"] for row in rows)
    plans = [row for row in rows if row["said"] == "plan"]
    said = f"plan {count['plan']}, none exists {count['infeasible']}, undecided {count['unproven']}, of {len(rows)}"
    optimal = sum(map(_is_proven, plans))
    gaps = [row["gap"] for row in plans]
    mean, largest = statistics.fmean(gaps or [0]), max(gaps, default=0)
    share = f"{optimal / max(1, len(plans)):.1%} of plans; mean gap {mean:.2%}, largest {largest:.2%}"
    return [_told("answers", said), _told("proven optimal", share)]


def _rivals(rows: Rows) -> list[Finding]:
    """Each baseline on its own: where it has a plan, and how far that is from the best known and from the bound."""
    found: list[Finding] = []
    for objective in (Objective.LATENCY, Objective.THROUGHPUT):
        of = [row for row in rows if row["said"] == "plan" and row["objective"] == objective.value]
        for name in BASELINES:
            asked = [row for row in of if name in row["baselines"]]
            had = [row for row in asked if row["baselines"][name] is not None]
            if had:
                found.append(_told(f"{name}, {objective.value}", _excesses(name, asked, had)))
    return found


def _excesses(name: str, asked: Rows, had: Rows) -> str:
    best = [row["baselines"][name] / _best(row) - 1 for row in had]
    bound = [row["baselines"][name] / row["bound"] - 1 for row in had if row["bound"] > 0]
    low, high = _interval(best)
    networks = {row["network"]: [] for row in had}  # type: dict[str, list[float]]
    for row, excess in zip(had, best, strict=True):
        networks[row["network"]].append(excess)
    each = ", ".join(f"{network} {statistics.fmean(values):+.1%}" for network, values in networks.items())
    return (
        f"has a plan for {len(had) / len(asked):.0%} of {len(asked)}; over the best known {statistics.fmean(best):+.1%} on average "
        f"(95 % interval {low:+.1%} to {high:+.1%}), median {statistics.median(best):+.1%}, worst {max(best):+.0%}; "
        f"over the bound {statistics.fmean(bound or [0]):+.1%}; {each}"
    )


def _best(row: Values) -> float:
    return min([row["value"], *(value for value in row["baselines"].values() if value is not None)])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap over instances, of the mean."""
    draw = random.Random(0)
    means = [statistics.fmean(draw.choices(values, k=len(values))) for _ in range(400)]
    return quantile(means, 0.025), quantile(means, 0.975)


def _sizes(measured: Sequence[tuple[Batch, Values]], rows: Rows) -> list[Finding]:
    """Time and memory by size."""

    def grouped(of: Callable[[Values], object]) -> dict[object, Rows]:
        found: dict[object, Rows] = {}
        for row in rows:
            found.setdefault(of(row), []).append(row)
        return found

    sizes = grouped(lambda row: (row["objective"], row["layers"], row["devices"], row["blocks"]))
    rises: dict[object, int] = {}
    for batch, values in measured:
        key = (batch.family.objective.value, batch.family.layers, batch.family.devices, batch.family.blocks)
        rises[key] = max(rises.get(key, 0), values["rise_bytes"] or 0)
    return [
        _told("time and memory, " + _label(key), _time(of) + f"; peak memory +{rises[key] / 1e6:.0f} MB")
        for key, of in sizes.items()
    ]


def _label(key: object) -> str:
    objective, layers, devices, blocks = key  # type: ignore[misc]
    return f"{devices} devices x {blocks} {layers} blocks, {objective}"


def _time(rows: Rows) -> str:
    took = [row["took_s"] for row in rows]
    solvers = Counter(row["solver"] for row in rows if row["said"] == "plan")
    by = ", ".join(f"{name} {count}" for name, count in solvers.most_common())
    return f"p50 {quantile(took, 0.5):.3f} s, p95 {quantile(took, 0.95):.3f} s of CPU; {len(rows)} instances ({by or 'no plans'})"


def _told(what: str, measured: str) -> Finding:
    return Finding(what=what, goal="", measured=measured)
