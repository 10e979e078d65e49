"""Half an hour of mixed load on three nodes while workers are killed, workers freeze and nodes go and come back.

A stream may end with an error that says so; nothing may hang.  Afterwards nobody holds a slot, and memory, descriptors and
files are where they were.
"""

import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from bench.measure import Cell, Finding, Options, Values, values_of
from bench.nodes import alive, deploy, imported_home, wait_until
from bench.prompt import prompt_text
from bench.soak.load import Load
from bench.soak.machines import Machine, Misfortune, machines
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import ShoalError
from shoal.fleet.views import DeploymentState
from shoal.plan.problem import RequestShape

NAME = "soak"
TITLE = "Soak: mixed load on three nodes and two stages, with faults"
_DEPLOYED = "soak-bench"
_CELL = "mixed load with faults"
_CLIENTS = 3
_EVERY_S = 5.0
_SETTLE_S = 60.0
_GOAL_GROWTH = 1.1
_GOAL_STORE_BYTES = 8_000_000


def cells(options: Options) -> list[Cell]:
    return [Cell(name=_CELL, measure=lambda: _measure(options))]


def _measure(options: Options) -> Values:
    for_s, fault_s = (90.0, 15.0) if options.quick else (1800.0, 45.0)
    first = imported_home(options)
    homes = (first, first.with_name("second"), first.with_name("third"))
    text = prompt_text(options.gguf, 2000)
    with machines(homes) as fleet:
        running = fleet[0].running
        assert running is not None
        with Shoal(running.url, timeout_s=300.0) as shoal:
            wait_until(lambda: alive(shoal) == len(fleet), "all nodes alive", _SETTLE_S)
            deploy(shoal, _DEPLOYED, PlanOptions(shape=RequestShape(context_tokens=1024, slots=4), stages=2))
            load = Load(url=running.url, model=_DEPLOYED, text=text)
            faults, samples = _live_through(load, fleet, for_s, fault_s)
            settled = _settled(shoal, running.url)
    return {
        "seconds": for_s,
        "faults": dict(faults),
        "outcomes": {f"{kind}: {ended}": count for (kind, ended), count in sorted(load.outcomes.items())},
        "settled_s": settled,
        "samples": samples,
    }


def _live_through(
    load: Load, fleet: Sequence[Machine], for_s: float, fault_s: float
) -> tuple["Counter[str]", list[Values]]:
    """Run the load, strike every *fault_s*, and note every few seconds what the first node holds."""
    clients = [threading.Thread(target=load.client, args=(n,)) for n in range(_CLIENTS)]
    misfortune = Misfortune(fleet, random.Random(7))
    faults: Counter[str] = Counter()
    samples: list[Values] = []
    began_s = time.monotonic()
    for client in clients:
        client.start()
    try:
        next_fault_s = fault_s
        while (now_s := time.monotonic() - began_s) < for_s:
            if now_s >= next_fault_s:
                faults[misfortune.strike()] += 1
                next_fault_s = time.monotonic() - began_s + fault_s
            samples.append({"at_s": round(now_s, 1)} | _held(fleet[0]))
            time.sleep(_EVERY_S)
    finally:
        load.stopped.set()
        for client in clients:
            client.join()
    return faults, samples


def _held(machine: Machine) -> Values:
    """Resident memory, open files and threads of a node's own process, and what its home holds besides the model."""
    assert machine.process is not None
    process = psutil.Process(machine.process.pid)
    return {
        "rss_bytes": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "journal_bytes": sum(_size(path) for path in machine.home.glob("journal.db*")),
        "log_bytes": _size(machine.home / "node.log"),
        "workers": len(machine.workers()),
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _settled(shoal: Shoal, url: str) -> float | None:
    """Seconds until the deployment is ready again with nobody in a slot; None when it never is."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < _SETTLE_S:
        if _ready(shoal) and not _held_slots(url):
            return round(time.monotonic() - began_s, 1)
        time.sleep(1.0)
    return None


def _ready(shoal: Shoal) -> bool:
    try:
        return any(d.name == _DEPLOYED and d.state is DeploymentState.READY for d in shoal.deployments())
    except ShoalError:
        return False


def _held_slots(url: str) -> float:
    """Requests that hold a slot or wait for one, as the metrics say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10.0) as answer:
        lines = answer.read().decode().splitlines()
    gauges = ("shoal_requests_running{", "shoal_queue_depth{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(gauges) and _DEPLOYED in line)


def findings(results: Mapping[str, Values]) -> list[Finding]:
    values = values_of(results, _CELL)
    if values is None:
        return []
    outcomes: dict[str, int] = values["outcomes"]
    total = sum(outcomes.values())
    bad = {
        ended: count
        for ended, count in outcomes.items()
        if ended.split(": ")[1] in ("HANGS", "broken off", "empty", "500")
    }
    faults = ", ".join(f"{count} x {what}" for what, count in sorted(values["faults"].items()))
    return [
        Finding(
            what=f"requests in {values['seconds'] / 60:.0f} minutes that hung, broke off or ended without a clear error ({faults})",
            goal="0",
            measured=f"**{sum(bad.values())}** of {total}" + (f": {bad}" if bad else ""),
            met=not bad,
        ),
        Finding(what="how requests ended", goal="", measured=_summary(outcomes)),
        Finding(
            what="seconds until the deployment is ready and nobody holds a slot afterwards",
            goal="<= 60",
            measured="**never**" if values["settled_s"] is None else f"**{values['settled_s']:.0f}**",
            met=values["settled_s"] is not None,
        ),
        *(_flat(values["samples"], name, what) for name, what in _HELD),
        _store(values["samples"]),
    ]


_HELD = (
    ("rss_bytes", "memory of the node with the gateway, last tenth against second tenth"),
    ("descriptors", "open files of the node with the gateway, likewise"),
    ("threads", "threads of the node with the gateway, likewise"),
)


def _store(samples: Sequence[Values]) -> Finding:
    """The write-ahead log of SQLite is cut at about 4 MB, and the records are one for each thing that exists."""
    highest = max(s["journal_bytes"] for s in samples)
    return Finding(
        what="its event store at its largest",
        goal="bounded (<= 8 MB)",
        measured=f"**{highest / 1e6:.1f} MB**",
        met=highest <= _GOAL_STORE_BYTES,
    )


def _summary(outcomes: Mapping[str, int]) -> str:
    ways: Counter[str] = Counter()
    for name, count in outcomes.items():
        ways[name.split(": ", 1)[1]] += count
    return ", ".join(f"{count} {way}" for way, count in ways.most_common())


def _flat(samples: Sequence[Values], name: str, what: str) -> Finding:
    tenth = max(1, len(samples) // 10)
    early = max(s[name] for s in samples[tenth : 2 * tenth + 1])
    late = max(s[name] for s in samples[-tenth:])
    ratio = late / max(1, early)
    shown = (f"{early / 1e6:.1f} MB, then {late / 1e6:.1f}") if name.endswith("bytes") else f"{early}, then {late}"
    met = ratio <= _GOAL_GROWTH
    return Finding(what=what, goal="flat (<= 1.1)", measured=f"**{ratio:.2f}** ({shown})", met=met)
