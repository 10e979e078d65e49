"""Real links: Shoal and llama.cpp's RPC mode over networks with a rate and a delay, in turn on the same ones.

Each cell has a network of its own, with nothing else on it.  Both sides run on the same hosts and cores, with one thread each, the
same file, equal shares of the work, and are asked the same questions over the same protocol.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.links import ours, peer
from bench.links.asking import Asker
from bench.links.network import Host, network
from bench.links.plot import Panel, picture
from bench.links.settings import BASE, CROWD, FAR_CROWD, RATES_MBIT, RTTS_MS, TOKENS, Setting, grid
from bench.links.sounding import sounded
from bench.links.texts import Kind, texts
from bench.measure import Cell, Finding, Options, SkippedError, Values, values_of

NAME = "links"
TITLE = "Links: SmolLM2-135M over shaped links between hosts of one core, against llama.cpp's RPC mode"
PICTURE = "links.svg"
ROUNDS, CROWD_ROUNDS = 3, 2
_OURS: Mapping[str, tuple[Kind, ...]] = {
    "plain": (Kind.PROSE,),
    "guessing": (Kind.PROSE, Kind.JSON),
    "fp16": (Kind.PROSE,),
    "int8": (Kind.PROSE,),
}
_PEERS: Mapping[str, tuple[peer.Variant, tuple[Kind, ...]]] = {
    "plain": (peer.PLAIN, (Kind.PROSE, Kind.JSON)),
    "guessing": (peer.GUESSING, (Kind.PROSE, Kind.JSON)),
}
_THOROUGH = (BASE, CROWD, FAR_CROWD, replace(BASE, mbit=10), replace(BASE, mbit=1000), replace(BASE, prompt=512))
"""Cells in which codecs and the peer's own guesses are measured too: the whole grid must not take more than 90 minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Tokens per second against the peer's, in one cell."""

    what: str
    setting: Setting
    ours: str
    peer: str
    at_least: float | None = None


GOALS = (
    Goal(what="1 stream, plain decoding", setting=BASE, ours="plain prose", peer="plain prose", at_least=1.3),
    Goal(what="1 stream, as served by default", setting=BASE, ours="guessing prose", peer="plain prose"),
    Goal(what="1 stream, with guesses, JSON to edit", setting=BASE, ours="guessing json", peer="plain json", at_least=2.0),
    Goal(what="the same, against the peer with its own", setting=BASE, ours="guessing json", peer="guessing json"),
    Goal(what="8 streams, 20 ms, as served by default", setting=CROWD, ours="guessing prose", peer="plain prose", at_least=2.0),
    Goal(what="8 streams, 20 ms, plain decoding", setting=CROWD, ours="plain prose", peer="plain prose"),
    Goal(what="8 streams, 100 ms, as served by default", setting=FAR_CROWD, ours="guessing prose", peer="plain prose", at_least=3),
    Goal(what="8 streams, 100 ms, plain decoding", setting=FAR_CROWD, ours="plain prose", peer="plain prose"),
)  # fmt: skip


def cells(options: Options) -> list[Cell]:
    settings = [BASE] if options.quick else grid()
    return [Cell(name=s.name, measure=lambda s=s: _measure(options, s)) for s in settings]  # type: ignore[misc]


def _measure(options: Options, setting: Setting) -> Values:
    try:
        with network(setting.nodes, setting.link) as hosts:
            return _measured(options, setting, hosts)
    except (RuntimeError, SystemExit) as failed:  # the grid goes on; the next run tries this cell again
        raise SkippedError(str(failed)) from failed


def _measured(options: Options, setting: Setting, hosts: Sequence[Host]) -> Values:
    cores = len({core for host in hosts for core in host.cores})
    said: Values = {"network": sounded(hosts[0], hosts[-1]), "cores": cores, "ours": {}, "peer": {}}
    asker = Asker(
        hosts=hosts,
        texts=texts(options.gguf),
        streams=setting.streams,
        prompt=setting.prompt,
        rounds=1 if options.quick else ROUNDS if setting.streams == 1 else CROWD_ROUNDS,
    )
    with ours.fleet(options, hosts) as fleet:
        said["network"]["probed"] = fleet.links()
        for name, kinds in _ours(setting):
            with fleet.serving(setting, ours.MODES[name]) as (server, planned):
                said["plan"] = planned
                said["ours"] |= {f"{name} {kind}": asker.asked(server, kind) for kind in kinds}
    lacking = peer.missing(options)
    if lacking:
        print(f"  {lacking}")
        return said | {"peer_missing": lacking}
    for name, (variant, kinds) in _PEERS.items():
        asked = _kinds(setting, kinds) if name == "plain" or setting in _THOROUGH else ()
        if asked:
            with peer.serving(options, hosts, setting, variant) as server:
                said["peer"] |= {f"{name} {kind}": asker.asked(server, kind) for kind in asked}
    return said


def _ours(setting: Setting) -> Iterator[tuple[str, tuple[Kind, ...]]]:
    for name, kinds in _OURS.items():
        if name in ("plain", "guessing") or setting in _THOROUGH:
            yield name, _kinds(setting, kinds)


def _kinds(setting: Setting, kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Crowds are asked for prose alone: eight documents at once are mostly prompts to be worked off."""
    return tuple(kind for kind in kinds if setting.streams == 1 or kind is Kind.PROSE)


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found = [finding for goal in GOALS if (finding := _judged(goal, results)) is not None]
    for setting in grid():
        values = values_of(results, setting.name)
        if values is not None:
            found.append(Finding(what=setting.name, goal="", measured=_cell_text(values)))
    return found


def _judged(goal: Goal, results: Mapping[str, Values]) -> Finding | None:
    values = values_of(results, goal.setting.name)
    own, other = (_rate(values, side, name) for side, name in (("ours", goal.ours), ("peer", goal.peer)))
    if own is None:
        return None
    wanted = f">= {goal.at_least:g}x llama.cpp" if goal.at_least else ""
    if other is None:
        return Finding(what=goal.what, goal=wanted, measured=f"{own:.1f} tok/s; no peer")
    ratio = own / other
    met = None if goal.at_least is None else ratio >= goal.at_least
    return Finding(
        what=goal.what, goal=wanted, measured=f"**{ratio:.2f}x** ({own:.1f} against {other:.1f} tok/s)", met=met
    )


def _rate(values: Values | None, side: str, name: str) -> float | None:
    found = (values or {}).get(side, {}).get(name)
    return None if found is None else float(found["tokens_per_s"]["median"])


def _cell_text(values: Values) -> str:
    network, rates = values["network"], {f"{s} {n}": _rate(values, s, n) for s in ("ours", "peer") for n in values[s]}
    shown = ", ".join(f"{name.replace('peer', 'llama.cpp')} {rate:.1f}" for name, rate in rates.items())
    return f"tok/s: {shown} (measured {network['rtt_ms']:g} ms, {network['mbit_per_s']:g} Mbit/s)"


_COLUMNS = (
    "network and load",
    "who",
    "tok/s",
    "first token, ms",
    "ms per token",
    "between events, p50 and p95, ms",
    "bytes per token",
    "CPU ms per token",
)


def details(results: Mapping[str, Values]) -> str:
    """Every figure of every cell."""
    rows = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for setting in grid():
        values = values_of(results, setting.name)
        if values is not None:
            sides = [(f"{side} {name}", figures) for side in ("ours", "peer") for name, figures in values[side].items()]
            rows += [_row(setting, who, figures) for who, figures in sides]
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _row(setting: Setting, who: str, figures: Values) -> str:
    gaps = figures["gap_ms"]
    columns = [
        setting.name,
        who.replace("ours", "Shoal").replace("peer", "llama.cpp"),
        f"{figures['tokens_per_s']['median']:.1f}",
        f"{1000 * figures['first_token_s']['median']:.0f}",
        f"{figures['per_token_ms']['median']:.1f}",
        f"{gaps['p50']:.1f}, {gaps['p95']:.1f}",
        f"{figures['wire_bytes_per_token']}",
        f"{figures['cpu_ms_per_token']:.1f}",
    ]
    return f"| {' | '.join(columns)} |"


_SERIES = {
    "Shoal, prose, plain": ("ours", "plain prose"),
    "Shoal, JSON, guesses": ("ours", "guessing json"),
    "llama.cpp, prose": ("peer", "plain prose"),
    "llama.cpp, JSON": ("peer", "plain json"),
}


def draw(results: Mapping[str, Values]) -> dict[str, str]:
    """Tokens per second over the factors; nothing where not even the middle was measured."""
    if values_of(results, BASE.name) is None:
        return {}
    others = {
        "middle": BASE,
        "3 nodes": replace(BASE, nodes=3),
        "prompt 512": replace(BASE, prompt=512),
        "8 streams": CROWD,
        "8, 100 ms": FAR_CROWD,
    }
    panels = [
        _panel(results, "round trip, ms", {f"{ms}": replace(BASE, rtt_ms=ms) for ms in RTTS_MS}),
        _panel(results, "rate, Mbit/s", {f"{mbit}": replace(BASE, mbit=mbit) for mbit in RATES_MBIT}),
        _panel(results, "other load", others, bars=True),
    ]
    heading = f"Tokens per second of all streams, {TOKENS} tokens out; in the middle: {BASE.name}"
    return {PICTURE: picture(panels, heading)}


def _panel(results: Mapping[str, Values], title: str, settings: Mapping[str, Setting], *, bars: bool = False) -> Panel:
    cells = [values_of(results, setting.name) for setting in settings.values()]
    series = {label: [_rate(values, *where) for values in cells] for label, where in _SERIES.items()}
    return Panel(title=title, places=tuple(settings), series=series, unit="tok/s", bars=bars)
