"""What the HTTP gateway adds to the time to the first token.

The same request is seen twice: by a client of the OpenAI API, and on the fabric, where a tap notes when the gateway submits it to
the first stage and when the first token comes back.  The difference is HTTP, text and event loop; the engine's own
variation cancels out.
"""

import http.client
import json
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from bench.client import Tap, Timed, connected
from bench.measure import Cell, Finding, Options, Values, spread, values_of
from bench.nodes import deploy, fleet_of, imported_home
from bench.prompt import PROMPT_TOKENS, prompt_text
from shoal.client.calls import PlanOptions
from shoal.plan.problem import RequestShape
from shoal.runtime import frames

NAME = "gateway"
TITLE = "Gateway: time to the first token through the streamed chat API less that of the pipeline behind it"
GOAL_S = 0.005
_DEPLOYED = "gateway-bench"
_PROMPTS = {"short prompt": 8, f"prompt of {PROMPT_TOKENS} tokens": PROMPT_TOKENS}


def cells(options: Options) -> list[Cell]:
    return [Cell(name=name, measure=lambda n=n: _measure(options, n)) for name, n in _PROMPTS.items()]  # type: ignore[misc]


def _measure(options: Options, prompt_tokens: int) -> Values:
    text = prompt_text(options.gguf, prompt_tokens)
    count = 5 if options.quick else 40
    with fleet_of((imported_home(options),)) as (shoal, running, _):
        wanted = PlanOptions(shape=RequestShape(context_tokens=512, slots=1))
        view = deploy(shoal, _DEPLOYED, wanted)
        where = urlsplit(running.url)
        client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
        with connected(running.locators[0]) as bus, Tap(bus).listening(view) as tap:
            pairs = [_one(client, tap, text) for _ in range(count + 3)][3:]
        client.close()
    return {
        "api_s": spread([api for api, _ in pairs]),
        "pipeline_s": spread([pipeline for _, pipeline in pairs]),
        "added_s": spread([api - pipeline for api, pipeline in pairs]),
    }


def _one(client: http.client.HTTPConnection, tap: Tap, text: str) -> tuple[float, float]:
    """Seconds to the first token of one request: through the API, and on the fabric."""
    body = {"model": _DEPLOYED, "messages": [{"role": "user", "content": text}], "stream": True}
    payload = json.dumps(body | {"max_tokens": 4, "temperature": 0})
    tap.drain()
    began_s = time.monotonic()
    client.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
    response = client.getresponse()
    first_s = 0.0
    for line in response:
        if not first_s and _has_text(line):
            first_s = time.monotonic()
    if response.status != http.client.OK or not first_s:
        raise RuntimeError(f"no streamed token: status {response.status}")
    time.sleep(0.05)  # what the tap hears may come a little after the stream's end
    return first_s - began_s, _pipeline_s(tap.drain())


def _has_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    return any(choice["delta"].get("content") for choice in json.loads(line[6:])["choices"])


def _pipeline_s(heard: list[Timed]) -> float:
    """From the submission to the first token, of the only request that passed."""
    submitted_s = next(t.at_s for t in heard if isinstance(t.message, frames.Submit))
    return next(t.at_s for t in heard if isinstance(t.message, frames.Delta) and t.message.delta.tokens) - submitted_s


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for name in _PROMPTS:
        values = values_of(results, name)
        if values is not None:
            added = values["added_s"]
            measured = (
                f"**{added['median'] * 1000:.2f} ms** (p90 {added['p90'] * 1000:.2f}; "
                f"{values['api_s']['median'] * 1000:.1f} through the API, n = {added['n']})"
            )
            met = added["median"] <= GOAL_S
            found.append(Finding(what=f"added to the first token, {name}", goal="<= 5 ms", measured=measured, met=met))
    return found
