"""Shoal on the network: a node on each host, and one deployment after another, for idle ones are asked after each second."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from bench.links.network import Host
from bench.links.serving import Server
from bench.links.settings import Setting
from bench.measure import MODEL, Options, Values
from bench.nodes import alive, deploy, forget_deployments, imported_home, node, wait_until
from bench.prediction.placements import Placement
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.fleet.views import DeploymentView
from shoal.ids import NodeId
from shoal.plan.problem import Choose, Objective, RequestShape
from shoal.runtime.speculate.speculator import ADAPTIVE, OFF, Speculation
from shoal.transport.codec import Codec

CONTEXT_TOKENS = 1024
CUTS = {2: (39,), 3: (25, 51)}
"""Blocks before which the model is cut: attention and feed-forward of 30 layers, with the embedding before and the head behind
them.  The head counts as much as eight layers, so these are equal shares of the work."""
PORT = 7400
NAMES = ("first", "second", "third")
_MEMORY = "3GiB"
_START_LIMIT_S = 90.0
_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How answers are computed and carried."""

    speculation: Speculation = OFF
    activations: Codec = Codec.RAW


PLAIN = Mode()
MODES = {
    "plain": PLAIN,
    "guessing": replace(PLAIN, speculation=ADAPTIVE),
    "fp16": replace(PLAIN, activations=Codec.FP16),
    "int8": replace(PLAIN, activations=Codec.INT8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Nodes that are up."""

    shoal: Shoal
    ids: dict[str, NodeId]
    port: int
    pids: tuple[int, ...]

    def links(self) -> Values:
        """What the nodes have measured of the path from the first to the last."""
        first, last = next(iter(self.ids.values())), list(self.ids.values())[-1]
        found = [link for link in self.shoal.profile(MODEL).links if (link.source, link.target) == (first, last)]
        return {"latency_ms": round(found[0].latency_s * 1000, 2), "mbit": round(found[0].bytes_per_s * 8 / 1e6, 1)}

    @contextmanager
    def serving(self, setting: Setting, mode: Mode) -> Iterator[tuple[Server, Values]]:
        """One deployment over all nodes, cut into equal shares; and what was planned."""
        view = deploy(self.shoal, "links", wanted(self.ids, setting, mode), speculation=mode.speculation)
        assert view.plan is not None
        try:
            yield Server(port=self.port, model="links", pids=self.pids), _said(view)
        finally:
            self.shoal.stop("links")
            wait_until(lambda: not self.shoal.deployments(), "stopped", 30.0)


def wanted(ids: dict[str, NodeId], setting: Setting, mode: Mode) -> PlanOptions:
    """Several streams are served for throughput: the planner chooses how many share a step and how many steps are under way."""
    shape = RequestShape(tokens_in=setting.prompt, context_tokens=CONTEXT_TOKENS, slots=setting.streams)
    asked = Placement(tuple(ids), CUTS[len(ids)]).options(ids, shape)
    asked["activations"] = mode.activations
    if setting.streams > 1:
        asked["objective"] = Objective.THROUGHPUT
        asked["choose"] = Choose(batch=_BATCHES, in_flight=setting.streams)
    return asked


def _said(view: DeploymentView) -> Values:
    plan = view.plan
    assert plan is not None
    return {"batch": plan.shape.batch, "in_flight": plan.shape.in_flight} | {
        "stages": [f"[{stage.start}, {stage.stop})" for stage in plan.stages]
    }


@contextmanager
def fleet(options: Options, hosts: Sequence[Host]) -> Iterator[Fleet]:
    """A node on each host; the caller is on the first host meanwhile, as whoever asks the gateway must be."""
    first = imported_home(options, f"links/{NAMES[0]}")
    homes = [first.with_name(name) for name in NAMES[: len(hosts)]]
    with ExitStack() as stack:
        pids: list[int] = []
        ids: dict[str, NodeId] = {}
        for number, (host, home) in enumerate(zip(hosts, homes, strict=True)):
            listen = ["--listen", f"{host.address}:{PORT}", "--expose", "--memory", _MEMORY]
            entry = ["join", f"{hosts[0].address}:{PORT}"] if number else ["up", "--port", "0"]
            home.mkdir(parents=True, exist_ok=True)
            forget_deployments(home)
            with host.inside(pinned=True):
                said, process = stack.enter_context(
                    node(home, [*entry, *listen, "--name", home.name, "--threads", "1"])
                )
            pids.append(process.pid)
            ids[home.name] = said.node
            if not number:
                url = said.url
        stack.enter_context(hosts[0].inside())
        shoal = stack.enter_context(Shoal(url, timeout_s=300.0))
        wait_until(lambda: alive(shoal) == len(hosts), "all nodes alive", _START_LIMIT_S)
        time.sleep(1.0)
        yield Fleet(shoal=shoal, ids=ids, port=urlsplit(url).port or 0, pids=tuple(pids))
