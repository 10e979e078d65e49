"""What a stream feels of weights on the same link: the time between its tokens while a node fetches a model, against without.

Two hosts of `bench.links`, a stage on each; the second one's node also brings the whole model from the first, over the link that
the activations take, in the same direction.  Once as nodes do while models are served (`shoal.store.pace`), and once as fast as
it goes, which is what pacing saves the stream from.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec

from bench.bulk.fetching import Errand
from bench.links import ours
from bench.links.asking import Stream
from bench.links.network import Host, network
from bench.links.serving import Server
from bench.links.settings import Setting
from bench.links.sounding import sounded
from bench.links.texts import Kind, texts
from bench.measure import MODEL, SCRATCH, Cell, Finding, Options, Values, child_environment, ended, quantile, values_of
from bench.nodes import imported_home
from shoal.store.home import open_store

NAME = "bulk"
TITLE = "Bulk: a stream of SmolLM2-135M over two hosts while one fetches a model over the same link, 20 ms"
_RATES_MBIT = (1, 10, 50)
_MODES = {"alone": None, "beside a fetch": True, "beside one that does not yield": False}
_TOKENS = 64
_PROMPT = 32
_AHEAD_S = 3.0
_LATER_MS = 40
"""What a piece of weights may hold a frame up."""


def cells(options: Options) -> list[Cell]:
    rates = _RATES_MBIT[-1:] if options.quick else _RATES_MBIT
    return [Cell(name=f"{rate} Mbit/s", measure=lambda rate=rate: _measure(options, rate)) for rate in rates]  # type: ignore[misc]


def _measure(options: Options, rate_mbit: int) -> Values:
    setting = Setting(mbit=rate_mbit, prompt=_PROMPT)
    rounds = 1 if options.quick else 4
    asked = texts(options.gguf)
    for name in ours.NAMES[:2]:  # both have it: over 1 Mbit/s the half of one would take minutes to come
        imported_home(options, f"links/{name}")
    with network(2, setting.link) as hosts:
        found: Values = {"network": sounded(hosts[0], hosts[1])}
        with ours.fleet(options, hosts) as fleet, fleet.serving(setting, ours.PLAIN) as (server, _):
            _answer(hosts[0], server, asked.next(Kind.PROSE, _PROMPT))
            streams: dict[str, list[Stream]] = {name: [] for name in _MODES}
            rates: dict[str, list[float]] = {name: [] for name in _MODES}
            for _ in range(rounds):  # in turn, for a machine has its moods
                for name, gently in _MODES.items():
                    with _fetching(options, hosts, fleet, gently) as bulk:
                        began, began_s = bulk.bytes, time.monotonic()
                        streams[name].append(_answer(hosts[0], server, asked.next(Kind.PROSE, _PROMPT)))
                        rates[name].append((bulk.bytes - began) * 8 / 1e6 / (time.monotonic() - began_s))
    for name in _MODES:
        found[name] = _figures(streams[name]) | {"bulk_mbit": round(sum(rates[name]) / rounds, 2)}
    return found


def _answer(host: Host, server: Server, prompt: Sequence[int]) -> Stream:
    stream = Stream()
    stream.ask(host, server, prompt, _TOKENS)
    if stream.error or stream.tokens != _TOKENS:
        raise RuntimeError(f"{stream.tokens} of {_TOKENS} tokens; {stream.error or 'no error'}")
    return stream


def _figures(streams: Sequence[Stream]) -> Values:
    gaps_ms = [1000 * (b - a) for stream in streams for a, b in pairwise(stream.times_s)]
    seconds = sum(stream.times_s[-1] - stream.times_s[0] for stream in streams)
    return {
        "tokens_per_s": len(gaps_ms) / seconds,
        "gap_ms": {"p50": quantile(gaps_ms, 0.5), "p95": quantile(gaps_ms, 0.95), "highest": max(gaps_ms)},
        "first_token_s": quantile([stream.times_s[0] for stream in streams], 0.5),
    }


@dataclass(slots=True)
class _Bulk:
    """How much has been fetched so far."""

    bytes: int = 0
    _heard: threading.Event = field(default_factory=threading.Event)

    def hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.bytes = int(line)


@contextmanager
def _fetching(options: Options, hosts: Sequence[Host], fleet: ours.Fleet, gently: bool | None) -> Iterator[_Bulk]:  # noqa: FBT001 three ways
    bulk = _Bulk()
    if gently is None:
        yield bulk
        return
    ids = list(fleet.ids.values())
    digest = open_store(imported_home(options, "links/first")).library.digest(MODEL)
    home = Path(tempfile.mkdtemp(dir=SCRATCH))
    errand = Errand(
        home=str(home), agent=f"tcp/{hosts[1].address}:{ours.PORT}", fleet="shoal", source=ids[0], model=digest, gently=gently
    )  # fmt: skip
    with hosts[1].inside(pinned=True):
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.bulk.fetching"],
            env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        with ended(process):
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(errand).decode() + "\n")
            process.stdin.close()
            threading.Thread(target=bulk.hear, args=(process,), daemon=True).start()
            time.sleep(_AHEAD_S)
            yield bulk
    finally:
        shutil.rmtree(home, ignore_errors=True)


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for rate in _RATES_MBIT:
        values = values_of(results, f"{rate} Mbit/s")
        for name in _MODES if values is not None else ():
            assert values is not None
            cell = values[name]
            gaps = cell["gap_ms"]
            said = f"**{gaps['p50']:.0f}** ms, p95 {gaps['p95']:.0f}, highest {gaps['highest']:.0f}"
            said += f"; {cell['tokens_per_s']:.1f} tok/s"
            fetched = f"; {cell['bulk_mbit']:.1f} Mbit/s fetched" if cell["bulk_mbit"] else ""
            goal, met = "", None
            if _MODES[name]:
                most_ms = values["alone"]["gap_ms"]["p95"] + _LATER_MS
                goal, met = f"p95 <= {most_ms:.0f} (alone and {_LATER_MS} ms)", gaps["p95"] <= most_ms
            what = f"between tokens, {name}, {rate} Mbit/s"
            found.append(Finding(what=what, goal=goal, measured=said + fetched, met=met))
    return found
