"""Which instances are solved, and what is noted of each."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from bench.measure import ROOT, Values
from bench.planner.instances import HELD_OUT, NETWORKS, Family, instance, small_families, varied
from shoal.plan.baselines import BASELINES, worth
from shoal.plan.budget import DeadlineBudget
from shoal.plan.cost import objective_value
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Objective, Plan, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Instances of one family: one cell of the benchmark."""

    family: Family
    seeds: int
    limit_s: float
    vary: bool = True
    """Go through tightness, context and micro-batches in flight by seed."""
    baselines: tuple[str, ...] = tuple(BASELINES)

    @property
    def name(self) -> str:
        return self.family.name

    def instances(self) -> Iterator[tuple[int, Family]]:
        for seed in range(HELD_OUT, HELD_OUT + self.seeds):
            yield seed, varied(self.family, seed) if self.vary else self.family


RULES = tuple(name for name in BASELINES if name not in {"edgeshard_throughput", "pipeedge"})
"""Those that answer for hundreds of devices."""
BOTH = (Objective.LATENCY, Objective.THROUGHPUT)


def full() -> list[Batch]:
    return [*_small(), *_uneven_twelve(), *_twenty(), *_fifty(), *_hundreds()]


def quick() -> list[Batch]:
    """A few instances of each kind: shows that it runs."""
    small = [b for b in _small() if b.family.network in {"star", "trace"}]
    larger = [*_uneven_twelve()[:1], *_twenty()[:1], *_fifty()[:1]]
    few = [_fewer(b, 2, 1.0) for b in small] + [_fewer(b, 1, 2.0) for b in larger]
    return [b for b in few if b.family.devices != 8 or b.family.layers == "uneven"]


def solved(batch: Batch) -> Values:
    """Every instance of *batch*, one JSON text each, and the memory that the last one takes."""
    rows = [_row(instance(family, seed), batch) | _where(family, seed) for seed, family in batch.instances()]
    return {"rows": [json.dumps(row) for row in rows], "rise_bytes": _rise_bytes(batch)}


def _small() -> list[Batch]:
    return [Batch(family=family, seeds=10, limit_s=2.0) for family in small_families()]


def _uneven_twelve() -> list[Batch]:
    families = [
        Family(layers="uneven", network=network, devices=12, blocks=blocks)
        for blocks in (32, 40, 80)
        for network in NETWORKS
    ]
    return [Batch(family=family, seeds=2, limit_s=2.0) for family in families]


def _twenty() -> list[Batch]:
    families = [
        Family(layers="uniform", network=network, devices=20, blocks=80, tightness=2.4, objective=o, in_flight=flight)
        for o, flight in ((Objective.LATENCY, 1), (Objective.THROUGHPUT, 8))
        for network in NETWORKS
    ]
    return [Batch(family=family, seeds=6, limit_s=5.0, vary=False) for family in families]


def _fifty() -> list[Batch]:
    families = [
        Family(layers="uniform", network=network, devices=50, blocks=80, tightness=6.0, objective=o, in_flight=flight)
        for o, flight in ((Objective.LATENCY, 1), (Objective.THROUGHPUT, 8))
        for network in ("star", "clusters", "mesh")
    ]
    return [Batch(family=family, seeds=2, limit_s=4.5, vary=False, baselines=RULES) for family in families]


def _hundreds() -> list[Batch]:
    families = [
        Family(
            layers="uniform", network=network, devices=devices, blocks=80, tightness=12.0, most_blocks=most, objective=o
        )
        for devices, most, objectives in ((100, 0, BOTH[:1]), (300, 4, BOTH))
        for o in objectives
        for network in ("star", "clusters", "mesh")
    ]
    return [Batch(family=family, seeds=2, limit_s=3.8, vary=False, baselines=RULES) for family in families]


def _fewer(batch: Batch, seeds: int, limit_s: float) -> Batch:
    names = batch.baselines if batch.family.devices < 20 else ("edgeshard_latency", "speed_greedy")
    return Batch(family=batch.family, seeds=seeds, limit_s=limit_s, vary=batch.vary, baselines=names)


def _where(family: Family, seed: int) -> Values:
    return {
        "seed": seed,
        "tightness": family.tightness,
        "context": family.context,
        "in_flight": family.in_flight,
    }


def _row(problem: Problem, batch: Batch) -> Values:
    """The time is that of everything between a problem and its answer: tables, models, search, reasons.

    Limit and time are CPU seconds of this one thread, which are seconds on a quiet machine, and the same on a busy one.
    """
    began_s, clock_s = time.process_time(), time.perf_counter()
    answer = place(problem, DeadlineBudget(time.process_time, batch.limit_s))
    took_s, clock_s = time.process_time() - began_s, time.perf_counter() - clock_s
    return _said(problem, answer) | {
        "took_s": round(took_s, 4),
        "clock_s": round(clock_s, 4),
        "baselines": {name: _value(problem, name) for name in batch.baselines},
    }


def _said(problem: Problem, answer: Plan | Infeasible) -> Values:
    match answer:
        case Infeasible():
            return {"said": "unproven" if "not proven" in answer.reason else "infeasible"}
        case Plan():
            value = objective_value(problem.objective, answer.estimate)
            figures = {"value": value, "bound": answer.lower_bound, "gap": round(answer.gap, 6)}
            return {"said": "plan", "solver": answer.solver, "stages": len(answer.stages), **figures}


def _value(problem: Problem, name: str) -> float | None:
    spans = BASELINES[name](problem)
    return worth(problem, spans) if spans else None


def _rise_bytes(batch: Batch) -> int | None:
    """Of the last instance, in a process of its own; None where the system does not tell."""
    seed, family = list(batch.instances())[-1]
    asked = [msgspec.json.encode(family).decode(), str(seed), str(batch.limit_s)]
    command = [sys.executable, "-m", "bench.planner.memory", *asked]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return int(json.loads(done.stdout)["rise_bytes"]) if done.returncode == 0 else None
