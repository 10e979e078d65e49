"""What others feel of a long prompt: the time between their tokens while it comes in, against without it."""

import http.client
import json
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from urllib.parse import urlsplit

from bench.measure import Cell, Finding, Options, Values, quantile, values_of
from bench.nodes import deploy, fleet_of, imported_home
from bench.prompt import prompt_text
from shoal.client.calls import PlanOptions
from shoal.plan.problem import RequestShape

NAME = "stall"
TITLE = "Stall: two streams of SmolLM2-135M on one node while prompts of 1200 tokens come in, one thread"
GOAL_S = 0.2
_DEPLOYED = "stall-bench"
_STREAMS = 2
_TOKENS = 250
_LONG = 1200
_CELL = "two streams"


def cells(options: Options) -> list[Cell]:
    return [Cell(name=_CELL, measure=lambda: _measure(options))]


def _measure(options: Options) -> Values:
    rounds = 1 if options.quick else 4
    with fleet_of((imported_home(options),)) as (shoal, running, _):
        deploy(shoal, _DEPLOYED, PlanOptions(shape=RequestShape(context_tokens=2048, slots=4)))
        text = prompt_text(options.gguf, 16 + (rounds + 1) * _LONG * 2)
        parts = [text[at * 5 * _LONG : (at + 1) * 5 * _LONG] for at in range(rounds + 1)]
        _ask(running.url, parts[0], 4)
        calm = [gap for _ in range(rounds) for gap in _streams(running.url, text[:60], None)[0]]
        felt: list[float] = []
        first_s: list[float] = []
        for part in parts[1:]:
            gaps, first = _streams(running.url, text[:60], part)
            felt += gaps
            first_s.append(first)
    return {
        "calm_s": _quantiles(calm),
        "with_s": _quantiles(felt),
        "first_token_s": sorted(first_s)[len(first_s) // 2],
    }


def _quantiles(gaps_s: Sequence[float]) -> Values:
    return {"p50": quantile(gaps_s, 0.5), "p95": quantile(gaps_s, 0.95), "highest": max(gaps_s)}


def _streams(url: str, short: str, long: str | None) -> tuple[list[float], float]:
    """Times between the tokens of the streams, from a second after they began; and the long prompt's to its first token."""
    times: list[list[float]] = [[] for _ in range(_STREAMS)]

    def listen(number: int) -> None:
        times[number] = _ask(url, f"{number} {short}", _TOKENS)

    threads = [threading.Thread(target=listen, args=(n,)) for n in range(_STREAMS)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    began_s = time.monotonic()
    first_s = _ask(url, long, 2)[0] - began_s if long is not None else 0.0
    for thread in threads:
        thread.join()
    return [b - a for one in times for a, b in pairwise(one) if b > began_s], first_s


def _ask(url: str, prompt: str, tokens: int) -> list[float]:
    """When each token of one streamed answer came."""
    where = urlsplit(url)
    client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
    body = {"model": _DEPLOYED, "messages": [{"role": "user", "content": prompt}], "stream": True, "temperature": 0}
    payload = json.dumps(body | {"max_tokens": tokens, "ignore_eos": True})
    client.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
    answer = client.getresponse()
    if answer.status != http.client.OK:
        raise RuntimeError(f"refused: {answer.read().decode()}")
    times_s = [time.monotonic() for line in answer if b'"content":"' in line]
    client.close()
    return times_s[1:]  # the first event only names the role


def findings(results: Mapping[str, Values]) -> list[Finding]:
    values = values_of(results, _CELL)
    if values is None:
        return []
    calm, felt = values["calm_s"], values["with_s"]
    return [
        Finding(
            what="longest time between two tokens of the streams while a long prompt comes in",
            goal="<= 200 ms (a chunk of 100 and a step)",
            measured=f"**{felt['highest'] * 1000:.0f} ms** (p95 {felt['p95'] * 1000:.0f}, median {felt['p50'] * 1000:.0f}; "
            f"without it {calm['highest'] * 1000:.0f}, {calm['p95'] * 1000:.0f} and {calm['p50'] * 1000:.0f}); "
            f"first token of the long prompt after {values['first_token_s']:.2f} s",
            met=felt["highest"] <= GOAL_S,
        )
    ]
