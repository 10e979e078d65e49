"""Four times as many requests as can be answered: what those feel that are let in, how fast the others learn it, what stays behind.

One node with one worker and four slots.  First as many clients as there are slots say what the pipeline can do; then strangers
come at four times that rate, whoever else is waiting; then the first clients again.
"""

import http.client
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from bench.measure import Cell, Finding, Options, Values, quantile, values_of
from bench.nodes import deploy, fleet_of, imported_home, workers_of
from bench.overload.crowd import Crowd, Visit
from bench.prompt import prompt_text
from shoal.client.calls import PlanOptions
from shoal.plan.problem import RequestShape

NAME = "overload"
TITLE = "Overload: SmolLM2-135M on one node with four slots, four times the requests that it can answer"
_DEPLOYED = "overload-bench"
_SLOTS = 4
_FACTOR = 4
_TOKENS = 32
_PROMPT_TOKENS = 32
_CELL = "before, peak, after"
_POLL_S = 0.1
_GOAL_REFUSED_S = 0.1
_GOAL_GROWTH = 1.05


def cells(options: Options) -> list[Cell]:
    return [Cell(name=_CELL, measure=lambda: _measure(options))]


def _measure(options: Options) -> Values:
    calm_s, peak_s = (5.0, 8.0) if options.quick else (20.0, 60.0)
    with fleet_of((imported_home(options),)) as (shoal, running, pids):
        deploy(shoal, _DEPLOYED, PlanOptions(shape=RequestShape(context_tokens=512, slots=_SLOTS)))
        text = prompt_text(options.gguf, _PROMPT_TOKENS)
        crowd = Crowd(url=running.url, model=_DEPLOYED, prompts=[text], tokens=_TOKENS)
        crowd.steady(_SLOTS, 2.0)
        processes = [psutil.Process(pids[0]), *workers_of(pids[0])]
        with _watched(processes) as memory:
            before = crowd.steady(_SLOTS, calm_s)
            at_rest = memory.now_bytes()
            per_s = len(before) / calm_s
            peak = crowd.arriving(_FACTOR * per_s, peak_s)
            after = crowd.steady(_SLOTS, calm_s)
            left = memory.now_bytes()
    return {
        "capacity_per_s": per_s,
        "offered_per_s": len(peak) / peak_s,
        "before": _felt(before),
        "peak": _felt(peak),
        "after": _felt(after),
        "memory_bytes": {"before": at_rest, "highest": memory.highest_bytes, "after": left},
    }


def _felt(visits: Sequence[Visit]) -> Values:
    """What those who were let in and those who were not lived through."""
    answered = [v for v in visits if v.status == http.client.OK and v.tokens and not v.error]
    refused = [v for v in visits if v.status in (http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE)]
    return {
        "sent": len(visits),
        "answered": len(answered),
        "refused": len(refused),
        "refused_without_retry_after": sum(not v.retry_after for v in refused),
        "neither": len(visits) - len(answered) - len(refused),
        "first_s": _quantiles([v.first_s for v in answered]),
        "per_token_s": _quantiles([(v.whole_s - v.first_s) / max(1, v.tokens - 1) for v in answered]),
        "whole_s": _quantiles([v.whole_s for v in answered]),
        "refused_after_s": _quantiles([v.whole_s for v in refused]),
    }


def _quantiles(values: Sequence[float]) -> Values | None:
    if not values:
        return None
    return {"median": statistics.median(values), "p95": quantile(values, 0.95), "highest": max(values)}


@dataclass(slots=True)
class _Memory:
    """Resident bytes of some processes together."""

    processes: Sequence[psutil.Process]
    highest_bytes: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def now_bytes(self) -> int:
        return sum(p.memory_info().rss for p in self.processes)

    def watch(self) -> None:
        while not self.done.wait(_POLL_S):
            self.highest_bytes = max(self.highest_bytes, self.now_bytes())


@contextmanager
def _watched(processes: Sequence[psutil.Process]) -> Iterator[_Memory]:
    memory = _Memory(processes)
    thread = threading.Thread(target=memory.watch)
    thread.start()
    try:
        yield memory
    finally:
        memory.done.set()
        thread.join()


def findings(results: Mapping[str, Values]) -> list[Finding]:
    values = values_of(results, _CELL)
    if values is None:
        return []
    before, peak, after, memory = (values[name] for name in ("before", "peak", "after", "memory_bytes"))
    return [
        _latency(before, peak),
        _refusals(peak),
        Finding(
            what="requests that were neither answered nor refused with a time to come again",
            goal="0",
            measured=f"**{peak['neither'] + peak['refused_without_retry_after']}** of {peak['sent']}",
            met=peak["neither"] + peak["refused_without_retry_after"] == 0,
        ),
        Finding(
            what="memory of node and worker at its highest against before",
            goal="flat (<= 1.05)",
            measured=f"**{memory['highest'] / memory['before']:.3f}** ({memory['before'] / 1e6:.0f} MB before, "
            f"{memory['highest'] / 1e6:.0f} at most, {memory['after'] / 1e6:.0f} after)",
            met=memory["highest"] / memory["before"] <= _GOAL_GROWTH,
        ),
        Finding(
            what="median whole answer after the peak against before",
            goal="as before (0.9 to 1.1)",
            measured=f"**{after['whole_s']['median'] / before['whole_s']['median']:.2f}**",
            met=0.9 <= after["whole_s"]["median"] / before["whole_s"]["median"] <= 1.1,
        ),
    ]


def _latency(before: Values, peak: Values) -> Finding:
    ratio = peak["whole_s"]["p95"] / before["whole_s"]["p95"]
    return Finding(
        what="whole answers that were let in, p95 against that without overload",
        goal="kept (<= 2: at most one answer's wait)",
        measured=f"**{ratio:.2f}** (first token {peak['first_s']['median'] * 1000:.0f} ms median, "
        f"{peak['first_s']['p95'] * 1000:.0f} p95; per token {peak['per_token_s']['median'] * 1000:.1f} ms against "
        f"{before['per_token_s']['median'] * 1000:.1f})",
        met=ratio <= 2,
    )


def _refusals(peak: Values) -> Finding:
    refused = peak["refused_after_s"]
    if refused is None:
        return Finding(
            what="time until the others are refused", goal="at once (p95 <= 100 ms)", measured="none was refused"
        )
    return Finding(
        what="time until the others are refused",
        goal="at once (p95 <= 100 ms)",
        measured=f"**{refused['p95'] * 1000:.0f} ms** p95 ({refused['median'] * 1000:.0f} median; "
        f"{peak['refused']} of {peak['sent']} refused, {peak['answered']} answered)",
        met=refused["p95"] <= _GOAL_REFUSED_S,
    )
