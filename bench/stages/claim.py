"""What a cut costs: the same questions to one stage and to two, in turn; real workers, frames over Zenoh on loopback."""

import statistics
from collections.abc import Mapping
from itertools import pairwise

from bench.client import Direct, connected
from bench.measure import Cell, Finding, Options, Values, spread, values_of
from bench.nodes import deploy, fleet_of, imported_home
from bench.prompt import prompt_ids
from shoal.client.calls import PlanOptions
from shoal.plan.problem import RequestShape

NAME = "stages"
TITLE = "Stages: SmolLM2-135M in two worker processes on one host against one, one thread each"
GOAL_S = 0.0005
_PROMPT_TOKENS = 32
_CELL = "one and two stages"


def cells(options: Options) -> list[Cell]:
    return [Cell(name=_CELL, measure=lambda: _compare(options))]


def _compare(options: Options) -> Values:
    """Pairs of equal requests; a pair's difference is between the median times per token of the two."""
    first = imported_home(options)
    shape = RequestShape(context_tokens=512, slots=1)
    prompt = prompt_ids(options.gguf, _PROMPT_TOKENS)
    tokens, pairs = (24, 3) if options.quick else (96, 20)
    with fleet_of((first, first.with_name("second"))) as (shoal, running, _):
        views = [deploy(shoal, f"cut-{n}", PlanOptions(shape=shape, stages=n)) for n in (1, 2)]
        with connected(running.locators[0]) as bus, Direct(bus).listening() as direct:
            for view in views:
                direct.ask(view, prompt, 8)
            rounds = [[_per_token_s(direct.ask(view, prompt, tokens)) for view in views] for _ in range(pairs)]
        blocks = [len(view.plan.stages) for view in views if view.plan is not None]
    one, two = ([r[i] for r in rounds] for i in range(2))
    added = [t - o for o, t in rounds]
    return {"stages": blocks, "one_s": spread(one), "two_s": spread(two), "added_s": spread(added)}


def _per_token_s(times_s: list[float]) -> float:
    return statistics.median(b - a for a, b in pairwise(times_s))


def findings(results: Mapping[str, Values]) -> list[Finding]:
    values = values_of(results, _CELL)
    if values is None:
        return []
    one, two, added = (values[name]["median"] for name in ("one_s", "two_s", "added_s"))
    measured = (
        f"**{added * 1000:+.2f} ms** ({one * 1000:.2f} with one stage, {two * 1000:.2f} with two; "
        f"pairs from {values['added_s']['p10'] * 1000:+.2f} to {values['added_s']['p90'] * 1000:+.2f})"
    )
    return [Finding(what="added time per token", goal="<= 0.5 ms median", measured=measured, met=added <= GOAL_S)]
