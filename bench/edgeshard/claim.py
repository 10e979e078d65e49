"""EdgeShard's table, simulated: its methods and ours on its testbed, as far as the paper's figures describe it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from bench.edgeshard.printed import LATENCY_MS, TOKENS_PER_S, Printed
from bench.edgeshard.testbed import CLOUD, MODELS, SOURCE, Model, decoding, only, problem_of
from bench.measure import Cell, Finding, Options, Values, values_of
from shoal.plan import baselines as rivals
from shoal.plan.budget import StepBudget
from shoal.plan.cost import Priced, Span, price
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Objective, Plan, Problem
from shoal.plan.simulate import simulate
from shoal.plan.simulated import Load

NAME = "edgeshard"
TITLE = "EdgeShard's testbed (15 devices, Llama 2): its methods and ours, decided by simulation (see bench/edgeshard)"
SWEEP_MBIT_S = (1.0, 5.0, 10.0, 25.0, 50.0)
STEPS = 1_000_000
NEAR, SAME, CLOSE = 0.10, 0.005, 0.05
GOAL_TOKENS_PER_S = 61.0
SOLO, EVEN, OPT, THEIRS = "Edge-Solo", "Cloud-Edge-Even", "Cloud-Edge-Opt", "EdgeShard"
DIRECT, RELAYED = "Shoal, no relays", "Shoal"
Spans = tuple[Span, ...]
Method = Callable[[Problem], Spans | None]


def cells(options: Options) -> list[Cell]:
    del options
    latency = [Cell(name=f"latency {m.name}", measure=lambda m=m: _latency(problem_of(m))) for m in MODELS]  # type: ignore[misc]
    tokens = [Cell(name=f"throughput {m.name}", measure=lambda m=m: _throughput(m)) for m in MODELS]  # type: ignore[misc]
    return [*latency, Cell(name="bandwidth", measure=_bandwidth), *tokens, Cell(name="prompts", measure=_prompts)]


def methods(search: Method) -> dict[str, Method]:
    """The paper's four, with its latency or its throughput search, and ours."""
    pair = (SOURCE, CLOUD)
    return {
        SOLO: lambda problem: rivals.best_single(only(problem, [SOURCE])),
        EVEN: lambda problem: rivals.even_split(only(problem, pair)),
        OPT: lambda problem: _optimal(only(problem, pair)),
        THEIRS: search,
        DIRECT: ours,
        RELAYED: lambda problem: ours(replace(problem, relay=True)),
    }


def _optimal(problem: Problem) -> Spans | None:
    """The best of source alone and of each cut.  The paper has its own search here, whose printed 13B only an optimum gives."""
    chains = (rivals.best_single(problem), rivals.best_pair(problem))
    return min(chains, key=lambda chain: rivals.worth(problem, chain))


def ours(problem: Problem) -> Spans | None:
    match place(problem, StepBudget(STEPS)):
        case Plan(stages=stages):
            return tuple(Span(stage.node, stage.start, stage.stop) for stage in stages)
        case Infeasible():
            return None


def _latency(problem: Problem) -> Values:
    return {name: _run(problem, method(problem)) for name, method in methods(rivals.edgeshard_latency).items()}


def _bandwidth() -> Values:
    return {f"{rate:g}": _latency(problem_of(MODELS[0], rate)) for rate in SWEEP_MBIT_S}


def _throughput(model: Model) -> Values:
    """Of steps alone; every method with the micro-batches that price best for it, and with micro-batches of one sequence."""
    values: Values = {}
    for name, method in methods(rivals.edgeshard_throughput).items():
        tried = [_decoded(model, method, batch) for batch in _divisors(model.slots)]
        values[name] = {"best": max(tried, key=lambda row: row["predicted"] or 0.0), "single": tried[0]}
    return values


def _decoded(model: Model, method: Method, batch: int) -> Values:
    return _flow(
        replace(decoding(problem_of(model), batch, model.slots // batch), objective=Objective.THROUGHPUT), method
    )


def _prompts() -> Values:
    """Whole requests on 7B: prompts of 32 tokens travel, too."""
    problem, slots = problem_of(MODELS[0]), MODELS[0].slots
    shape = replace(problem.shape, slots=slots, in_flight=slots)
    asked = replace(problem, shape=shape, objective=Objective.THROUGHPUT)
    chosen = methods(rivals.edgeshard_throughput)
    return {name: _flow(asked, chosen[name]) for name in (THEIRS, DIRECT, RELAYED)}


def _divisors(slots: int) -> list[int]:
    return [batch for batch in range(1, slots + 1) if slots % batch == 0]


def _run(problem: Problem, spans: Spans | None) -> Values:
    """Milliseconds per token of one stream."""
    if spans is None:
        return {"predicted": None, "simulated": None}
    seen = simulate(problem, spans, Load(streams=1, requests=4))
    predicted_s = price(problem, spans).estimate.time_per_output_token_s
    assert seen.time_per_output_token_s is not None
    figures = {"predicted": predicted_s * 1000, "simulated": seen.time_per_output_token_s * 1000}
    return figures | _chain(problem, price(problem, spans))


def _flow(problem: Problem, method: Method) -> Values:
    """Tokens per second of a closed loop."""
    spans, shape = method(problem), problem.shape
    if spans is None:
        return {"predicted": None, "simulated": None}
    priced = price(problem, spans)
    seen = simulate(problem, spans, Load(streams=shape.in_flight, requests=8 * shape.slots))
    figures = {"predicted": priced.estimate.tokens_per_s, "simulated": seen.tokens_per_s}
    loop = {"batch": shape.batch, "in_flight": shape.in_flight, "busiest": max(part.share for part in seen.devices)}
    return figures | loop | _chain(problem, priced)


def _chain(problem: Problem, priced: Priced) -> Values:
    stages = [f"{stage.node} {stage.start}-{stage.stop}" for stage in priced.stages]
    held = len({stage.node for stage in priced.stages if stage.start < stage.stop})
    return {"devices": held, "relays": problem.relay and any(s.start == s.stop for s in priced.stages), "chain": stages}


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for model in MODELS:
        latency, tokens = values_of(results, f"latency {model.name}"), values_of(results, f"throughput {model.name}")
        if latency is not None:
            found += _against_printed(model.name, "ms per token", latency, LATENCY_MS[model.name])
        if tokens is not None:
            best = {name: rows["best"] for name, rows in tokens.items()}
            found += _against_printed(model.name, "tok/s", best, TOKENS_PER_S[model.name])
    closed, swept, prompts = (values_of(results, name) for name in ("throughput 7b", "bandwidth", "prompts"))
    found += list(_closed_loop(closed)) if closed else []
    found += list(_whole_requests(prompts)) if prompts else []
    found += list(_sweep(swept)) if swept else []
    return found + list(_agreement(results))


def _against_printed(model: str, unit: str, rows: Values, printed: Mapping[str, Printed]) -> Iterator[Finding]:
    """7B by figure, the others by order and by what runs out of memory."""
    title = model.upper()
    if model == "7b":
        for name, known in printed.items():
            seen = rows[name]["simulated"]
            assert known.value is not None
            met = seen is not None and abs(seen / known.value - 1) <= NEAR
            goal = f"{known.value} +-{NEAR:.0%} [{known.tag}]"
            yield Finding(what=f"{title}, {unit}: {name}", goal=goal, measured=_said(rows[name], known.value), met=met)
    else:
        goal = ", ".join(_known(known) for known in printed.values())
        measured = ", ".join(_figure(rows[name]) for name in printed)
        met = _pattern([known.value for known in printed.values()]) == _pattern([rows[n]["simulated"] for n in printed])
        what = f"{title}, {unit}: {', '.join(printed)}"
        yield Finding(what=what, goal=f"the order and OOM of {goal}", measured=measured, met=met)
    for name in (DIRECT, RELAYED):
        yield Finding(what=f"{title}, {unit}: {name}", goal="-", measured=_said(rows[name]))


def _pattern(values: list[float | None]) -> list[int | None]:
    """Ranks; None out of memory."""
    known = sorted(value for value in values if value is not None)
    return [None if value is None else known.index(value) for value in values]


def _known(printed: Printed) -> str:
    return f"{'OOM' if printed.value is None else printed.value} [{printed.tag}]"


def _figure(row: Values) -> str:
    return "OOM" if row["simulated"] is None else f"**{row['simulated']:.4g}**"


def _said(row: Values, known: float | None = None) -> str:
    if row["simulated"] is None:
        return "out of memory"
    off = f", {row['simulated'] / known - 1:+.1%}" if known else ""
    loop = f"{row['in_flight']} x {row['batch']} sequences, " if "batch" in row else ""
    relays = " and relays" if row["relays"] else ""
    devices = f"{row['devices']} device{'s' * (row['devices'] > 1)}{relays}"
    return f"{_figure(row)} ({loop}{devices}{off})"


def _closed_loop(tokens: Values) -> Iterator[Finding]:
    theirs = tokens[THEIRS]["single"]["simulated"]
    for name in (DIRECT, RELAYED):
        seen = tokens[name]["single"]["simulated"]
        yield Finding(
            what=f"7B, 8 in flight, micro-batches of one: {name}",
            goal=f">= {GOAL_TOKENS_PER_S:g} tok/s where EdgeShard's plan gives 49",
            measured=f"**{seen:.1f}** against {theirs:.1f} ({seen / theirs - 1:+.0%})",
            met=seen >= GOAL_TOKENS_PER_S if name == RELAYED else None,
        )


def _whole_requests(rows: Values) -> Iterator[Finding]:
    said = ", ".join(f"{name} {row['simulated']:.1f}" for name, row in rows.items())
    what = "7B, 8 in flight, prompts of 32 tokens counted, tok/s"
    yield Finding(what=what, goal="not below EdgeShard", measured=said, met=_best(rows) >= rows[THEIRS]["simulated"])


def _best(rows: Values) -> float:
    return max(row["simulated"] for name, row in rows.items() if name != THEIRS)


def _sweep(swept: Values) -> Iterator[Finding]:
    rates = list(swept)
    series = {name: [swept[rate][name]["simulated"] for rate in rates] for name in swept[rates[0]]}
    solo, ours_now, theirs = series[SOLO][0], series[RELAYED], series[THEIRS]
    low, ten, high = 0, rates.index("10"), len(rates) - 1
    judged: dict[str, tuple[str, bool]] = {
        EVEN: ("slower than Edge-Solo at 1, faster at 10", series[EVEN][ten] < solo < series[EVEN][low]),
        OPT: ("falls to EdgeShard's at 50", abs(series[OPT][high] / theirs[high] - 1) <= NEAR),
        THEIRS: ("flat within 10 %", max(theirs) / min(theirs) <= 1 + NEAR),
        RELAYED: ("never above EdgeShard", all(o <= t * (1 + 1e-9) for o, t in zip(ours_now, theirs, strict=True))),
    }
    for name, (goal, met) in judged.items():
        measured = ", ".join(f"{value:.1f}" for value in series[name])
        what = f"7B, ms per token over source-cloud {'/'.join(rates)} Mbit/s: {name}"
        yield Finding(what=what, goal=goal, measured=measured, met=met)


def _agreement(results: Mapping[str, Values]) -> Iterator[Finding]:
    """Prompts, which are long frames among short ones, make streams wait for each other; the closed-loop law knows no waiting."""
    for what, goal, names in (
        ("steps of one kind", SAME, [name for name in results if name != "prompts"]),
        ("whole requests in flight", CLOSE, ["prompts"]),
    ):
        rows = [row for name in names for row in _rows(results.get(name, {}).get("values"))]
        off = sorted(abs(row["simulated"] / row["predicted"] - 1) for row in rows)
        if off:
            yield Finding(
                what=f"the planner's price against the simulator: {what}",
                goal=f"<= {goal:.1%}",
                measured=f"**{off[-1]:.2%}** at most over {len(off)} chains, {off[len(off) // 2]:.2%} median",
                met=off[-1] <= goal,
            )


def _rows(values: Any) -> Iterator[Values]:  # noqa: ANN401 results as they come from JSON
    """Rows with figures, however deep."""
    if not isinstance(values, dict):
        return
    if values.get("simulated") is not None:
        yield values
    for inner in values.values():
        yield from _rows(inner)
