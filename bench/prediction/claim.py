"""Predicted against measured: 31 ways to place one model over the demo's three nodes, and what the planner chooses by itself.

Devices are measured once, as a user would, and every placement is predicted by that.  They are loaded one after another: dozens of
idle workers beside the ones that are asked would be what is measured.  What is predicted was known before any was
loaded; what live times of the placements before had corrected by then is shown beside it and not judged.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from bench.client import Direct, connected
from bench.measure import MODEL, Cell, Finding, Options, SkippedError, Values, load_cells, quantile, values_of
from bench.nodes import deploy, imported_home, wait_until
from bench.prediction.placements import Placement, demo_fleet, placements
from bench.prompt import prompt_ids
from shoal.cli.demo import DEVICES
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.fleet.views import DeploymentView
from shoal.ids import NodeId
from shoal.plan.problem import Plan, RequestShape
from shoal.profile.fleet import FleetProfile

NAME = "prediction"
TITLE = "Prediction: SmolLM2-135M placed in 31 ways over the demo's three unequal nodes and links"
SHAPE = RequestShape(tokens_in=48, tokens_out=24, context_tokens=256, slots=1)
BLOCKS = 62
GROUPS = 3
GOAL_ERROR, GOAL_RANKS, GOAL_CHOICE = 0.10, 0.95, 1.03
RIVALS = 5
"""The fastest placements, beside the planner's choice."""


def cells(options: Options) -> list[Cell]:
    groups = [placements(BLOCKS)[group::GROUPS] for group in range(GROUPS)]
    if options.quick:
        groups = [placements(BLOCKS)[::10]]
    rounds = 1 if options.quick else 4
    names = [_name(group, len(groups)) for group in range(len(groups))]
    found = [Cell(name=names[n], measure=_Group(options, group, rounds, first=not n)) for n, group in enumerate(groups)]
    return [*found, Cell(name="choice", measure=lambda: _choice(options, names, 2 * rounds + 1))]


def _name(group: int, groups: int) -> str:
    return f"placements {group + 1} of {groups}"


@dataclass(frozen=True, slots=True)
class _Group:
    options: Options
    group: Sequence[Placement]
    rounds: int
    first: bool

    def __call__(self) -> Values:
        with _fleet(self.options) as fleet:
            probed = fleet.profile(again=self.first)
            named = {placement.name: placement.options(fleet.ids, SHAPE) for placement in self.group}
            # Before anything serves: live times correct what is planned afterwards.
            plans = {name: fleet.planned(wanted) for name, wanted in named.items()}
            asked = {name: fleet.tried(wanted, self.rounds) for name, wanted in named.items()}
        rows = {name: _row(plans[name], measured, later) for name, (later, measured) in asked.items()}
        return {"placements": rows} | ({"probes": probed} if self.first else {})


def _choice(options: Options, groups: Sequence[str], rounds: int) -> Values:
    """The planner's own plan and the fastest of what was tried, in turn once more."""
    tried = _rows(load_cells(NAME), groups)
    if not tried:
        raise SkippedError("no placements were measured")
    best = sorted(tried, key=lambda name: _latency_s(tried[name]["measured"]))[:RIVALS]
    known = {placement.name: placement for placement in placements(BLOCKS)}
    with _fleet(options) as fleet:
        fleet.profile(again=False)
        views = {"choice": deploy(fleet.shoal, "choice", PlanOptions(shape=SHAPE))}
        for number, name in enumerate(best):
            views[name] = deploy(fleet.shoal, f"p{number}", known[name].options(fleet.ids, SHAPE))
        measured = fleet.ask(views, rounds)
        rows = {name: _row(_plan(view), measured[name], _plan(view)) for name, view in views.items()}
        stages = [f"{fleet.name(s.node)} [{s.start}, {s.stop})" for s in _plan(views["choice"]).stages]
    return {"choice": stages, "placements": rows}


@dataclass(frozen=True, slots=True)
class _Fleet:
    shoal: Shoal
    ids: Mapping[str, NodeId]
    direct: Direct
    prompt: Sequence[int]

    def profile(self, *, again: bool) -> Values:
        """Measure what is not known, or all anew; what that took, node by node."""
        began_s = time.monotonic()
        found: FleetProfile = self.shoal.profile(MODEL, refresh=again)
        devices = {self.name(device.node): round(device.trials_took_s, 2) for device in found.devices}
        links_s = round(sum(link.probe_s for link in found.links), 2)
        return {"devices_s": devices, "links_s": links_s, "all_s": round(time.monotonic() - began_s, 1)}

    def name(self, node: NodeId) -> str:
        return next(name for name, known in self.ids.items() if known == node)

    def planned(self, wanted: PlanOptions) -> Plan:
        answer = self.shoal.plan(MODEL, **wanted)
        assert isinstance(answer, Plan)
        return answer

    def tried(self, wanted: PlanOptions, rounds: int) -> tuple[Plan, tuple[float, float]]:
        """What is predicted of a placement by now, and what it takes while it is all that is served."""
        view = deploy(self.shoal, "tried", wanted)
        measured = self.ask({"tried": view}, rounds)["tried"]
        self.shoal.stop("tried")
        wait_until(lambda: not self.shoal.deployments(), "stopped", 30.0)
        return _plan(view), measured

    def ask(self, views: Mapping[str, DeploymentView], rounds: int) -> dict[str, tuple[float, float]]:
        """Medians of seconds to the first token and per token; rounds in an order of their own, the first one not counted."""
        order, dice = list(views), random.Random(1)
        asked: dict[str, list[list[float]]] = {name: [] for name in order}
        for number in range(rounds + 1):
            dice.shuffle(order)
            for name in order:
                times_s = self.direct.ask(views[name], self.prompt, SHAPE.tokens_out if number else 4)
                if number:
                    asked[name].append(times_s)
        return {name: _medians(answers) for name, answers in asked.items()}


def _medians(answers: Sequence[Sequence[float]]) -> tuple[float, float]:
    between = [b - a for times_s in answers for a, b in pairwise(times_s)]
    return statistics.median(times_s[0] for times_s in answers), statistics.median(between)


@contextmanager
def _fleet(options: Options) -> Iterator["_Fleet"]:
    source = imported_home(options, f"{NAME}/{DEVICES[0].name}")
    homes = {device.name: source.with_name(device.name) for device in DEVICES}
    with demo_fleet(homes) as (shoal, running, ids), connected(running.locators[0]) as bus:
        with Direct(bus).listening() as direct:
            yield _Fleet(shoal, ids, direct, prompt_ids(options.gguf, SHAPE.tokens_in))
        for deployment in shoal.deployments():
            shoal.stop(deployment.name)
        wait_until(lambda: not shoal.deployments(), "all stopped", 30.0)


def _plan(view: DeploymentView) -> Plan:
    assert view.plan is not None
    return view.plan


def _row(plan: Plan, measured: tuple[float, float], corrected: Plan) -> Values:
    return {"predicted": _figures(plan), "measured": list(measured), "corrected": _figures(corrected)}


def _figures(plan: Plan) -> list[float]:
    return [plan.estimate.time_to_first_token_s, plan.estimate.time_per_output_token_s]


def _latency_s(figures: Sequence[float]) -> float:
    first_s, each_s = figures
    return first_s + (SHAPE.tokens_out - 1) * each_s


def _rows(results: Mapping[str, Values], groups: Sequence[str] | None = None) -> dict[str, Values]:
    names = groups if groups is not None else [name for name in results if name.startswith("placements")]
    found = [values for name in names if (values := values_of(results, name)) is not None]
    return {name: row for values in found for name, row in values["placements"].items()}


def findings(results: Mapping[str, Values]) -> list[Finding]:
    rows = list(_rows(results).values())
    found: list[Finding] = []
    for index, what in ((1, "time per output token"), (0, "time to first token")):
        if len(rows) > 2:
            found += _judged(rows, what, lambda figures, index=index: figures[index])
    choice = values_of(results, "choice")
    if choice is not None:
        found.append(_chosen(choice))
    probes = [values["probes"] for name in results if (values := values_of(results, name)) and "probes" in values]
    if probes:
        devices = sorted(took_s for probe in probes for took_s in probe["devices_s"].values())
        links = statistics.median(probe["links_s"] for probe in probes)
        measured = f"{devices[0]:.1f} to {devices[-1]:.1f} s per device, one after another; {links:.1f} s for 6 links"
        found.append(Finding(what="what the probes took", goal="seconds", measured=measured))
    return found


def _judged(rows: Sequence[Values], what: str, figure: Callable[[Sequence[float]], float]) -> list[Finding]:
    pairs = [(figure(row["predicted"]), figure(row["measured"])) for row in rows]
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    later = [abs(figure(row["corrected"]) / figure(row["measured"]) - 1) for row in rows]
    signed = statistics.median(predicted / measured - 1 for predicted, measured in pairs)
    middle, ranks = statistics.median(errors), spearman(pairs)
    told = (
        f"**{middle:.1%}** median over {len(rows)} placements (p90 {quantile(errors, 0.9):.1%}; signed {signed:+.1%}; "
        f"with live corrections {statistics.median(later):.1%})"
    )
    slowest, fastest = max(m for _, m in pairs), min(m for _, m in pairs)
    ordered = f"**{ranks:.3f}** over {fastest * 1000:.0f} to {slowest * 1000:.0f} ms"
    return [
        Finding(what=f"{what}: error of what was predicted", goal="< 10 %", measured=told, met=middle < GOAL_ERROR),
        Finding(what=f"{what}: rank correlation", goal="> 0.95", measured=ordered, met=ranks > GOAL_RANKS),
    ]


def _chosen(choice: Values) -> Finding:
    rows = {name: _latency_s(row["measured"]) for name, row in choice["placements"].items()}
    best = min(rows, key=lambda name: rows[name])
    over = rows["choice"] / rows[best]
    measured = (
        f"**{over - 1:+.1%}** ({rows['choice'] * 1000:.0f} ms for {SHAPE.tokens_out} tokens, {', '.join(choice['choice'])}; "
        f"best of all tried: {rows[best] * 1000:.0f} ms, {best})"
    )
    return Finding(
        what="the planner's choice against the best placement",
        goal="<= 3 % more",
        measured=measured,
        met=over <= GOAL_CHOICE,
    )


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of the ranks of two figures; equal ones share the mean of their ranks."""
    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    return statistics.correlation(left, right)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
