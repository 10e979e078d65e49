"""What guessing gains on text that repeats, and loses on text that does not: the same requests with it and without, in turn.

The text that repeats is a JSON document to be written again: the model sees two rounds of it and goes on.  The other one is
prose at temperature 1, in which n-grams seldom come again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.client import Direct, connected
from bench.measure import Cell, Finding, Options, Values, spread, values_of
from bench.nodes import alive, deploy, forget_deployments, imported_home, node, wait_until
from bench.prompt import prompt_ids
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf
from shoal.node.running import Running
from shoal.plan.problem import RequestShape
from shoal.runtime.request import SamplingParams
from shoal.runtime.speculate.speculator import ADAPTIVE, OFF
from shoal.trust.identity import load_or_create, node_id

NAME = "speculation"
TITLE = "Speculation: SmolLM2-135M with guesses and without, one thread a node"
GOAL_GAIN, GOAL_LOSS = 2.0, 0.95
_LINK = "10ms,50mbit"
_START_LIMIT_S = 60.0
_PLACES = {"one node": (1, ""), "two nodes, 20 ms and 50 Mbit/s between them": (2, _LINK)}
_TEXTS = ("repeats", "does not repeat")


def cells(options: Options) -> list[Cell]:
    return [
        Cell(name=f"{place}, {text}", measure=lambda p=place, t=text: _compare(options, p, t))  # type: ignore[misc]
        for place in _PLACES
        for text in _TEXTS
    ]


def _compare(options: Options, place: str, text: str) -> Values:
    stages, link = _PLACES[place]
    prompt = _prompt(options.gguf, text)
    tokens, rounds = (32, 3) if options.quick else (128, 10)
    first = imported_home(options)
    homes = (first, first.with_name("second"))[:stages]
    with _fleet(homes, link) as (shoal, running):
        wanted = PlanOptions(shape=RequestShape(context_tokens=1024, slots=1), stages=stages)
        views = [
            deploy(shoal, f"guess-{name}", wanted, speculation=speculation)
            for name, speculation in (("off", OFF), ("auto", ADAPTIVE))
        ]
        with connected(running.locators[0]) as bus, Direct(bus).listening() as direct:
            for view in views:
                direct.ask(view, prompt, 16)
            times = [
                [_per_token_s(direct.ask(view, prompt, tokens, sampling=_sampling(text, n))) for view in views]
                for n in range(rounds)
            ]
    off, auto = ([pair[i] for pair in times] for i in range(2))
    return {"off_s": spread(off), "auto_s": spread(auto), "ratio": spread([o / a for o, a in times])}


def _per_token_s(times_s: Sequence[float]) -> float:
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1)


def _sampling(text: str, seed: int) -> SamplingParams:
    return SamplingParams() if text == "repeats" else SamplingParams(temperature=1.0, seed=seed)


def _prompt(gguf: Path, text: str) -> list[int]:
    if text != "repeats":
        return prompt_ids(gguf, 64)
    rows = [{"id": n, "name": f"sensor-{n}", "online": True, "limits": [n, 40 + n]} for n in range(4)]
    document = json.dumps(rows, indent=1)
    tokenizer = Tokenizer.from_files(tokenizer_files_from_gguf(gguf))
    return list(tokenizer.encode(f"{document}\n\n{document}\n\n[", add_special=False))


@contextmanager
def _fleet(homes: Sequence[Path], link: str) -> Iterator[tuple[Shoal, Running]]:
    """One node, or two with *link* between them in both directions."""
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
        forget_deployments(home)
    ids = [node_id(load_or_create(home / "node.key").public_key()) for home in homes]
    flags = [
        ["--name", home.name, "--threads", "1", *(f"--link={other}={link}" for other in ids if link and other != own)]
        for home, own in zip(homes, ids, strict=True)
    ]
    with ExitStack() as stack:
        up = ["up", "--port", "0", "--listen", "127.0.0.1:0", *flags[0]]
        running, _ = stack.enter_context(node(homes[0], up))
        address = running.locators[0].removeprefix("tcp/")
        for home, more in zip(homes[1:], flags[1:], strict=True):
            stack.enter_context(node(home, ["join", address, *more]))
        shoal = stack.enter_context(Shoal(running.url, timeout_s=300.0))
        wait_until(lambda: alive(shoal) == len(homes), "all nodes alive", _START_LIMIT_S)
        yield shoal, running


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for place in _PLACES:
        for text in _TEXTS:
            values = values_of(results, f"{place}, {text}")
            if values is None:
                continue
            off, auto, ratio = (values[k]["median"] for k in ("off_s", "auto_s", "ratio"))
            goal = GOAL_GAIN if text == "repeats" else GOAL_LOSS
            found.append(
                Finding(
                    what=f"tokens per second against plain decoding, {place}, text that {text}",
                    goal=f">= {goal:g}",
                    measured=f"**{ratio:.2f}** ({off * 1000:.1f} ms per token without, {auto * 1000:.1f} with; pairs from "
                    f"{values['ratio']['p10']:.2f} to {values['ratio']['p90']:.2f}, n = {values['ratio']['n']})",
                    met=ratio >= goal,
                )
            )
    return found
