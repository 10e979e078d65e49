"""The demo's three unequal nodes, and every way to cut the model over them that is tried."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.nodes import alive, forget_deployments, node, wait_until
from shoal.cli.demo import DEVICES, LINKS
from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.ids import NodeId
from shoal.node.running import Running
from shoal.plan.problem import Pin, RequestShape
from shoal.trust.identity import load_or_create, node_id

MEMORY = "6GiB"
"""Of each node: several placements are loaded at once, and what fits is not the question here."""
_START_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Names of nodes in order, and the blocks before which the model is cut."""

    nodes: tuple[str, ...]
    cuts: tuple[int, ...]

    @property
    def name(self) -> str:
        return " ".join(f"{name}:{cut}" for name, cut in zip(self.nodes, (*self.cuts, "end"), strict=True))

    def options(self, ids: Mapping[str, NodeId], shape: RequestShape) -> PlanOptions:
        """What makes the planner choose just this: the blocks on both sides of each cut are pinned."""
        sides = zip(self.cuts, self.nodes, self.nodes[1:], strict=False)
        pins = [
            pin
            for cut, left, right in sides
            for pin in (Pin(block=cut - 1, node=ids[left]), Pin(block=cut, node=ids[right]))
        ]
        return PlanOptions(shape=shape, stages=len(self.nodes), pins=tuple({p.block: p for p in pins}.values()))


def placements(blocks: int) -> list[Placement]:
    """The model on the source alone, in two parts and in three, each order and a grid of cuts."""
    first, second, third = (device.name for device in DEVICES)
    at = [round(blocks * part) for part in (0.06, 0.25, 0.45, 0.65, 0.85)]
    pairs = [Placement((first, other), (cut,)) for other in (second, third) for cut in at]
    grid = [(at[i], at[j]) for i in range(len(at)) for j in range(i + 1, len(at))]
    threes = [Placement((first, *others), cuts) for others in ((second, third), (third, second)) for cuts in grid]
    return [Placement((first,), ()), *pairs, *threes]


@contextmanager
def demo_fleet(homes: Mapping[str, Path]) -> Iterator[tuple[Shoal, Running, dict[str, NodeId]]]:
    """The demo's nodes with its slowdowns and links; gives the SDK, the first node and the ids by name."""
    ids = {name: node_id(load_or_create(home / "node.key").public_key()) for name, home in homes.items()}
    first, *others = DEVICES
    with ExitStack() as stack:
        for home in homes.values():
            forget_deployments(home)
        up = ["up", "--port", "0", "--listen", "127.0.0.1:0", *_flags(first.name, ids)]
        running, _ = stack.enter_context(node(homes[first.name], up))
        address = running.locators[0].removeprefix("tcp/")
        for device in others:
            stack.enter_context(node(homes[device.name], ["join", address, *_flags(device.name, ids)]))
        shoal = stack.enter_context(Shoal(running.url, timeout_s=300.0))
        wait_until(lambda: alive(shoal) == len(homes), "all nodes alive", _START_LIMIT_S)
        yield shoal, running, ids


def _flags(name: str, ids: Mapping[str, NodeId]) -> Sequence[str]:
    slowdown = next(device.slowdown for device in DEVICES if device.name == name)
    flags = ["--name", name, "--memory", MEMORY, "--threads", "1", "--slowdown", str(slowdown)]
    for ends, link in LINKS.items():
        if name in ends:
            flags += ["--link", f"{ids[ends[ends[0] == name]]}={link}"]
    return flags
