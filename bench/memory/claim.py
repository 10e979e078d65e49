"""What a worker costs in memory: private (anonymous) bytes at rest, while serving, at most; under a limit; and after it is gone."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.client import Direct, connected
from bench.measure import MODEL, Cell, Finding, Options, SkippedError, Values, values_of
from bench.memory.limit import Limit, find_limit
from bench.nodes import deploy, fleet_of, imported_home, wait_until, workers_of
from bench.prompt import NEW_TOKENS, PROMPT_TOKENS, prompt_ids
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.node.artifacts import open_artifact
from shoal.plan.problem import RequestShape
from shoal.store.home import open_store

NAME = "memory"
TITLE = f"Memory: a worker with the whole of SmolLM2-135M, after {PROMPT_TOKENS} + {NEW_TOKENS} tokens"
_DEPLOYED = "memory-bench"
_WANTED = PlanOptions(shape=RequestShape(context_tokens=2048, slots=2))
_POLL_S = 0.01
_MB = 1e6


def cells(options: Options) -> list[Cell]:
    return [
        Cell(name="free", measure=lambda: _serve(options, None)),
        Cell(name="limited", measure=lambda: _limited(options)),
    ]


def _limited(options: Options) -> Values:
    limit = find_limit()
    if limit is None:
        raise SkippedError("no memory cgroup of this system can be written, and no limit on data can be set")
    return _serve(options, limit)


def _serve(options: Options, limit: Limit | None) -> Values:
    home = imported_home(options)
    needed = _needed_bytes(home)
    bound_bytes = int(1.5 * needed["total_bytes"] + 150 * _MB)
    prompt = prompt_ids(options.gguf, PROMPT_TOKENS)
    if limit is not None:
        _forget_pages(home)
    with fleet_of((home,)) as (shoal, running, (node_pid,)):
        with _watching(node_pid, limit, bound_bytes) as watch:
            view = deploy(shoal, _DEPLOYED, _WANTED)
            loaded = memory_bytes(watch.pid)
            with connected(running.locators[0]) as bus, Direct(bus).listening() as direct:
                times_s = direct.ask(view, prompt, NEW_TOKENS)
            served = memory_bytes(watch.pid)
            counted = limit.peak_bytes() if limit else 0
            node_after = [_unloaded(shoal, node_pid)]
        deploy(shoal, _DEPLOYED, _WANTED)
        node_after.append(_unloaded(shoal, node_pid))
    said = {"needed": needed, "loaded": loaded, "served": served, "peak_anon_bytes": watch.peak_bytes}
    said |= {"limit_bytes": bound_bytes, "limit_kind": limit.kind if limit else "", "limit_peak_bytes": counted}
    return said | {"tokens": len(times_s), "node_after": node_after}


def _unloaded(shoal: Shoal, node_pid: int) -> Values:
    """Stop, wait until no worker is left; what the node holds then."""
    shoal.stop(_DEPLOYED)
    wait_until(lambda: not workers_of(node_pid), "the worker's end", 30.0)
    time.sleep(1.0)
    return memory_bytes(node_pid)


def _forget_pages(home: Path) -> None:
    """Let the system drop what it caches of the model's files: who reads them next pays for them."""
    for path in (p for folder in ("chunks", "derived") for p in (home / folder).rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _needed_bytes(home: Path) -> Values:
    """Weights as they are stored, and the cache of the positions that the run fills."""
    store = open_store(home)
    artifact = open_artifact(store, store.library.digest(MODEL))
    weights = sum(t.chunk.size_bytes for t in artifact.manifest.tensors)
    per_token = sum(block.kv_bytes_per_token for block in artifact.blocks)
    cache = per_token * (PROMPT_TOKENS + NEW_TOKENS)
    return {"weights_bytes": weights, "kv_bytes": cache, "total_bytes": weights + cache}


def memory_bytes(pid: int) -> Values:
    """Resident memory of a process by kind; raises ProcessLookupError once it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in lines) if v.endswith("kB")}
    if "VmRSS" not in sizes:
        raise ProcessLookupError(f"process {pid} has ended")
    return {"anon_bytes": sizes.get("RssAnon", 0), "file_bytes": sizes.get("RssFile", 0), "rss_bytes": sizes["VmRSS"]}


@dataclass(slots=True)
class _Watch:
    """Finds the first worker of a node, limits it as soon as it is there, and keeps the most it held."""

    node_pid: int
    limit: Limit | None
    limit_bytes: int
    pid: int = 0
    peak_bytes: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.done.wait(_POLL_S):
            try:
                if not self.pid:
                    self._find()
                if self.pid:
                    self.peak_bytes = max(self.peak_bytes, memory_bytes(self.pid)["anon_bytes"])
            except (OSError, psutil.Error):
                continue

    def _find(self) -> None:
        found = workers_of(self.node_pid)
        if found:
            # What it holds already stays on its parent's account: the limit is that much lower.
            held = memory_bytes(found[0].pid)["anon_bytes"]
            if self.limit is not None:
                self.limit.apply(found[0].pid, self.limit_bytes - held)
            self.pid = found[0].pid


@contextmanager
def _watching(node_pid: int, limit: Limit | None, limit_bytes: int) -> Iterator[_Watch]:
    watch = _Watch(node_pid, limit, limit_bytes)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.done.set()
        thread.join()
        if limit is not None:
            limit.remove()


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    free, limited = values_of(results, "free"), values_of(results, "limited")
    if free is not None:
        found += _free(free)
    what, goal = "loads and serves under a memory limit", "1.5 x (weights + KV) + 150 MB"
    if limited is not None:
        measured = (
            f"**{limited['tokens']} tokens** under {limited['limit_bytes'] / _MB:.0f} MB ({limited['limit_kind']})"
        )
        met = limited["tokens"] == NEW_TOKENS
        found.append(Finding(what=what, goal=goal, measured=measured, met=met))
    elif "skipped" in results.get("limited", {}):
        found.append(Finding(what=what, goal=goal, measured=f"not measured: {results['limited']['skipped']}"))
    return found


def _free(values: Values) -> list[Finding]:
    needed, served = values["needed"]["total_bytes"], values["served"]["anon_bytes"]
    bound = 1.35 * needed + 150 * _MB
    what = f"anonymous memory after serving ({needed / _MB:.0f} MB are weights and KV)"
    measured = f"**{served / _MB:.0f} MB** (goal {bound / _MB:.0f} MB; at most {values['peak_anon_bytes'] / _MB:.0f})"
    goal = "<= 1.35 x (weights + KV) + 150 MB"
    first, second = (after["anon_bytes"] for after in values["node_after"])
    left = f"worker gone; the node itself holds {first / _MB:.0f} MB after the first unloading, {second / _MB:.0f} after the second"
    gave_back = second - first < 0.1 * needed
    return [
        Finding(what=what, goal=goal, measured=measured, met=served <= bound),
        Finding(what="unloading gives the memory back", goal="nothing left behind", measured=left, met=gave_back),
    ]
