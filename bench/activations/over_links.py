"""What activations that are written smaller give: one stream over two hosts of `bench.links`, 20 ms apart, at slow rates.

All deployments are up at once and asked in turn.  `auto` is what the plan chooses for the link as measured.  The shaper lets 3 KB
through at once when it has rested, more than a row: at 1 Mbit/s, tokens take less time than on a wire, and prompts as much.
"""

from collections.abc import Mapping
from itertools import pairwise

from bench.links import ours
from bench.links.asking import Stream
from bench.links.network import network
from bench.links.serving import Server
from bench.links.settings import Setting
from bench.links.texts import Kind, texts
from bench.measure import Cell, Finding, Options, Values, quantile, values_of
from bench.nodes import deploy, imported_home
from shoal.client.calls import PlanOptions
from shoal.plan.problem import Plan
from shoal.transport.codec import Codec

RATES_MBIT = (1, 5, 50)
_MODES: Mapping[str, PlanOptions] = {
    "exact": {},
    "int8+peaks": {"activations": Codec.INT8_PEAKS},
    "auto": {"activations": Codec.INT8, "activations_per_cut": True},
}
_TOKENS = 64
_PROMPT = 32


def cells(options: Options) -> list[Cell]:
    rates = RATES_MBIT[:1] if options.quick else RATES_MBIT
    return [Cell(name=_name(rate), measure=lambda rate=rate: _measure(options, rate)) for rate in rates]  # type: ignore[misc]


def _name(rate_mbit: int) -> str:
    return f"over {rate_mbit} Mbit/s"


def _deployed(mode: str) -> str:
    return mode.replace("+", "-")


def _measure(options: Options, rate_mbit: int) -> Values:
    setting, asked = Setting(mbit=rate_mbit, prompt=_PROMPT), texts(options.gguf)
    rounds = 1 if options.quick else 4
    for name in ours.NAMES[:2]:  # both have the model: over 1 Mbit/s the half of one would take minutes to come
        imported_home(options, f"links/{name}")
    streams: dict[str, list[Stream]] = {name: [] for name in _MODES}
    plans: dict[str, Plan] = {}
    with network(2, setting.link) as hosts, ours.fleet(options, hosts) as fleet:
        for name, said in _MODES.items():
            wanted: PlanOptions = {**ours.wanted(fleet.ids, setting, ours.PLAIN), **said}
            plan = deploy(fleet.shoal, _deployed(name), wanted).plan
            assert plan is not None
            plans[name] = plan
        for number in range(rounds + 1):  # in turn, for a machine has its moods; the first of each does not count
            for name in _MODES:
                stream = Stream()
                server = Server(port=fleet.port, model=_deployed(name), pids=fleet.pids)
                stream.ask(hosts[0], server, asked.next(Kind.PROSE, _PROMPT), _TOKENS)
                if stream.error or stream.tokens != _TOKENS:
                    raise RuntimeError(f"{stream.tokens} of {_TOKENS} tokens; {stream.error or 'no error'}")
                streams[name] += [stream] * (number > 0)
    return {
        name: _figures(streams[name])
        | {
            "codecs": [cut.codec.value for cut in plan.written],
            "foretold_ms": plan.estimate.time_per_output_token_s * 1000,
            "foretold_first_s": plan.estimate.time_to_first_token_s,
        }
        for name, plan in plans.items()
    }


def _figures(streams: list[Stream]) -> Values:
    gaps_ms = [1000 * (b - a) for stream in streams for a, b in pairwise(stream.times_s)]
    return {
        "per_token_ms": quantile(gaps_ms, 0.5),
        "first_token_s": quantile([stream.times_s[0] for stream in streams], 0.5),
        "tokens_per_s": sum(stream.tokens for stream in streams) / sum(stream.times_s[-1] for stream in streams),
    }


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for rate in RATES_MBIT:
        values = values_of(results, _name(rate))
        for name in _MODES if values is not None else ():
            assert values is not None
            cell = values[name]
            chosen = f" (chosen: {', '.join(cell['codecs'])})" if cell["codecs"] else ""
            found.append(
                Finding(
                    what=f"a stream over {rate} Mbit/s and 20 ms, {name}{chosen}",
                    goal="",
                    measured=f"**{cell['tokens_per_s']:.1f}** tok/s, {_said(cell)}",
                )
            )
    return found


def _said(cell: Values) -> str:
    first, later = cell["first_token_s"], cell["per_token_ms"]
    foretold = f"foretold {cell['foretold_first_s']:.2f} s and {cell['foretold_ms']:.0f} ms"
    return f"first token {first:.2f} s, then {later:.0f} ms per token ({foretold})"
