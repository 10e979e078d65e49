"""What a prompt costs that begins like an earlier one: time to the first token, against prompts of that length that do not."""

from collections.abc import Mapping

from bench.client import Direct, connected
from bench.measure import Cell, Finding, Options, Values, spread, values_of
from bench.nodes import deploy, fleet_of, imported_home
from bench.prompt import prompt_ids
from shoal.client.calls import PlanOptions
from shoal.plan.problem import RequestShape

NAME = "prefix"
TITLE = "Prefix reuse: SmolLM2-135M in two stages on one host, 400 tokens of prompt of which 380 are as before"
_DEPLOYED = "prefix-bench"
_CELL = "two stages"
_SHARED, _NEW = 380, 20


def cells(options: Options) -> list[Cell]:
    return [Cell(name=_CELL, measure=lambda: _measure(options))]


def _measure(options: Options) -> Values:
    rounds = 3 if options.quick else 12
    first = imported_home(options)
    text = prompt_ids(options.gguf, _SHARED + (_SHARED + _NEW) * 2 * rounds)
    system, rest = text[:_SHARED], text[_SHARED:]
    with fleet_of((first, first.with_name("second"))) as (shoal, running, _):
        view = deploy(shoal, _DEPLOYED, PlanOptions(shape=RequestShape(context_tokens=512, slots=2), stages=2))
        with connected(running.locators[0]) as bus, Direct(bus).listening() as direct:
            direct.ask(view, [*system, *rest[:_NEW]], 4)
            cold: list[float] = []
            warm: list[float] = []
            for n in range(rounds):
                at = n * (_SHARED + _NEW)
                warm.append(direct.ask(view, [*system, *rest[at : at + _NEW]], 4)[0])
                cold.append(direct.ask(view, rest[at : at + _SHARED + _NEW], 4)[0])
    return {"cold_s": spread(cold), "warm_s": spread(warm)}


def findings(results: Mapping[str, Values]) -> list[Finding]:
    values = values_of(results, _CELL)
    if values is None:
        return []
    cold, warm = values["cold_s"]["median"], values["warm_s"]["median"]
    return [
        Finding(
            what="time to the first token against a prompt that is new",
            goal="",
            measured=f"**{cold / warm:.1f} times less** ({warm * 1000:.0f} ms, {cold * 1000:.0f} for a new one; "
            f"n = {values['warm_s']['n']})",
        )
    ]
