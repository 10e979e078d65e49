"""Deaths at random moments under a stream: is its text the undisturbed one, how long is the gap, and what stays behind?

Three nodes, two stages.  A stream begins; after a random time, in its prompt or in its answer, the worker of a random stage is
killed or frozen, or the node of the last stage goes, and comes back when the stream is over.  A request with a seed must go on
with the same bits (`exact`); one without, at temperature 0, is computed in chunks and may differ where two tokens are nearly
equal (`fast`).
"""

import http.client
import itertools
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil

from bench.measure import Cell, Finding, Options, Values, quantile, spread, values_of
from bench.nodes import alive, deploy, imported_home, wait_until
from bench.prompt import prompt_text
from bench.soak.machines import Machine, machines
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.errors import ShoalError
from shoal.fleet.views import DeploymentState, DeploymentView
from shoal.plan.problem import RequestShape

NAME = "failover"
TITLE = "Failover: deaths under streams of SmolLM2-135M in two stages on three nodes"
_DEPLOYED = "failover-bench"
_TOKENS = 96
_PROMPT_TOKENS = 200
_LIMIT_S = 120.0
_SETTLE_S = 90.0
_NODES = 3
_PER_CELL = 20
_CELLS = 5
_MODES = ("exact", "fast")


def cells(options: Options) -> list[Cell]:
    count, deaths = (1, 3) if options.quick else (_CELLS, _PER_CELL)
    return [
        Cell(name=f"{mode} {n}", measure=lambda mode=mode, n=n: _measure(options, mode, n, deaths))  # type: ignore[misc]
        for n in range(count)
        for mode in _MODES
    ]


@dataclass(slots=True)
class _Stream:
    """One request and when its tokens came."""

    url: str
    body: Mapping[str, object]
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    ended: str = ""

    def run(self) -> None:
        where = urlsplit(self.url)
        client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_LIMIT_S)
        try:
            client.request("POST", "/v1/chat/completions", json.dumps(self.body), {"Content-Type": "application/json"})
            answer = client.getresponse()
            self.ended = "" if answer.status == http.client.OK else str(answer.status)
            for line in answer:
                self._take(line)
        except (OSError, http.client.HTTPException) as error:
            self.ended = type(error).__name__
        finally:
            client.close()

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            self.ended = "whole" if line.startswith(b"data: [DONE]") else self.ended
            return
        event = json.loads(line[6:])
        if event.get("error"):
            self.ended = str(event["error"].get("code"))
        for choice in event.get("choices", []):
            if choice["delta"].get("content"):
                self.text += choice["delta"]["content"]
                self.times_s.append(time.monotonic())


def _measure(options: Options, mode: str, number: int, deaths: int) -> Values:
    first = imported_home(options)
    homes = (first, first.with_name("second"), first.with_name("third"))
    chance = random.Random(1000 * number + _MODES.index(mode))
    text = prompt_text(options.gguf, _PROMPT_TOKENS)
    sampling = {"seed": 7, "temperature": 1.0} if mode == "exact" else {"temperature": 0}
    body = {"model": _DEPLOYED, "messages": [{"role": "user", "content": text}], "max_tokens": _TOKENS, "stream": True}
    body |= {"ignore_eos": True, **sampling}
    with machines(homes) as fleet:
        running = fleet[0].running
        assert running is not None
        with Shoal(running.url, timeout_s=300.0) as shoal:
            wait_until(lambda: alive(shoal) == len(fleet), "all nodes alive", _SETTLE_S)
            _deploy(shoal)
            reference = _Stream(running.url, body)
            reference.run()
            whole_s = reference.times_s[-1] - reference.times_s[0]
            seen = [_die(shoal, fleet, reference, whole_s, chance) for _ in range(deaths)]
    return {
        "deaths": [kind for kind, *_ in seen],
        "ended": dict(Counter(ended for _, ended, *_ in seen)),
        "same": sum(same for *_, same, _ in seen),
        "gaps_s": [round(gap_s, 3) for *_, gap_s in seen],
    }


def _die(
    shoal: Shoal, fleet: Sequence[Machine], reference: _Stream, whole_s: float, chance: random.Random
) -> tuple[str, str, bool, float]:
    """One death under one stream: what died, how the stream ended, whether its text is the same, and its longest gap."""
    _deploy(shoal)  # declared anew: a coordinator is the more patient the more often one has broken
    view = _ready(shoal)
    stream = _Stream(reference.url, reference.body)
    thread = threading.Thread(target=stream.run)
    began_s = time.monotonic()
    thread.start()
    time.sleep(chance.uniform(0.0, 0.9 * whole_s))
    kind = _strike(view, fleet, chance)
    thread.join()
    for machine in fleet:
        if machine.process is not None and machine.process.poll() is not None:
            machine.start()
    times_s = [began_s, *stream.times_s]
    gap_s = max((b - a for a, b in itertools.pairwise(times_s)), default=0.0)
    return kind, stream.ended, stream.text == reference.text, gap_s


def _deploy(shoal: Shoal) -> None:
    wait_until(lambda: alive(shoal) == _NODES, "all nodes alive", _SETTLE_S)
    with suppress(ShoalError):
        shoal.stop(_DEPLOYED)
    deploy(shoal, _DEPLOYED, PlanOptions(shape=RequestShape(context_tokens=512, slots=2), stages=2))


def _strike(view: DeploymentView, fleet: Sequence[Machine], chance: random.Random) -> str:
    assert view.plan is not None
    stage = chance.randrange(len(view.plan.stages))
    machine = next(m for m in fleet if m.running is not None and m.running.node == view.plan.stages[stage].node)
    workers = machine.workers()
    kind = chance.choice(("killed", "killed", "frozen", "node"))
    if kind == "node" and machine is not fleet[0]:
        machine.kill()
        return f"node of stage {stage}"
    for worker in workers:
        with suppress(psutil.Error):
            worker.send_signal(signal.SIGSTOP if kind == "frozen" else signal.SIGKILL)
    return f"worker of stage {stage} {'frozen' if kind == 'frozen' else 'killed'}"


def _ready(shoal: Shoal) -> DeploymentView:
    """The deployment, once it serves with three nodes alive and has done so for a moment."""
    calm: list[DeploymentView] = []

    def serves() -> DeploymentView | None:
        with suppress(ShoalError):
            found = next((d for d in shoal.deployments() if d.name == _DEPLOYED), None)
            good = found is not None and found.state is DeploymentState.READY and alive(shoal) == _NODES
            calm[:] = [*calm, found] if good and found is not None else []
        return calm[-1] if len(calm) > 4 else None

    found = wait_until(serves, f"{_DEPLOYED} serves again", _SETTLE_S, every_s=0.25)
    assert isinstance(found, DeploymentView)
    return found


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for mode in _MODES:
        values = [v for n in range(_CELLS) if (v := values_of(results, f"{mode} {n}")) is not None]
        gaps_s = [gap_s for v in values for gap_s in v["gaps_s"]]
        if not gaps_s:
            continue
        total, same = len(gaps_s), sum(v["same"] for v in values)
        ended: Counter[str] = Counter()
        for v in values:
            ended.update(v["ended"])
        found.append(
            Finding(
                what=f"streams with the text of the undisturbed one, {mode}",
                goal="all" if mode == "exact" else "all above the noise margin",
                measured=f"**{same} of {total}** ({', '.join(f'{n} {how}' for how, n in ended.items())})",
                met=same == total if mode == "exact" else None,
            )
        )
        found.append(
            Finding(
                what=f"longest gap in the stream, {mode}",
                goal="",
                measured=f"**{spread(gaps_s)['median']:.1f} s** median ({quantile(gaps_s, 0.1):.1f} to "
                f"{quantile(gaps_s, 0.9):.1f}, at most {max(gaps_s):.1f})",
            )
        )
    return found
