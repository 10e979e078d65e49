"""A node that cannot reach the next stage sends through one that can: real nodes, and a link that swallows what it is given."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from shoal.client import Shoal
from shoal.fleet.views import DeploymentView
from shoal.ids import NodeId
from shoal.plan.problem import Infeasible, Pin, Relays, RequestShape

Fleet = Any  # of conftest
Machine = Any
SHAPE = RequestShape(tokens_in=8, tokens_out=16, context_tokens=512, slots=2)
CUT = "7000ms,1mbit"
"""Longer than a probe waits: for whoever plans, there is no such link."""


@pytest.fixture(scope="module")
def site(fleets: Callable[[ExitStack], Fleet]) -> Iterator[Fleet]:
    """Nodes a, b and c; b and c have no way to each other."""
    with ExitStack() as stack:
        fleet = fleets(stack)
        fleet.up("a").wait_up()
        last = fleet.join("c")
        last.wait_up()
        middle = fleet.join("b", "--gateway", "127.0.0.1:0", "--link", f"{last.id}={CUT}", models=("tiny",))
        middle.wait_up()
        last.end()
        last.flags = (*last.flags, "--link", f"{middle.id}={CUT}")
        last.start()
        last.wait_up()
        fleet.wait_alive("a", "b", "c")
        yield fleet


def pins(fleet: Fleet) -> tuple[Pin, ...]:
    """A stage on each node, the one on c behind the one on b."""
    blocks = fleet.stock.blocks("tiny")
    return (Pin(block=2, node=fleet.machine("b").id), Pin(block=blocks - 1, node=fleet.machine("c").id))


def deploy(fleet: Fleet, name: str) -> DeploymentView:
    with fleet.asking() as shoal:
        shoal.deploy("tiny", name=name, shape=SHAPE, stages=3, pins=pins(fleet))
    return fleet.wait_ready(name)


def chain(fleet: Fleet, view: DeploymentView) -> list[str]:
    """Names of the nodes in the order of the stages, relays in brackets."""
    names: dict[NodeId, str] = {m.id: m.name for m in fleet.machines}
    assert view.plan is not None
    return [f"({names[s.node]})" if s.is_relay else names[s.node] for s in view.plan.stages]


def text_of(fleet: Fleet, model: str, at: Machine | None = None, **sampling: float) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, **sampling}
    return fleet.openai(at).chat.completions.create(**asked).choices[0].message.content


def relays(machine: Machine) -> list[psutil.Process]:
    children = psutil.Process(machine.process.pid).children()
    return [p for p in children if p.status() != psutil.STATUS_ZOMBIE and "shoal.node.relay" in p.cmdline()]


@pytest.fixture(scope="module")
def alone(site: Fleet) -> str:
    """A deployment that knows no links."""
    with site.asking() as shoal:
        shoal.deploy("tiny", name="alone", shape=SHAPE, stages=1)
    site.wait_ready("alone")
    return "alone"


def test_a_pipeline_through_a_relay_answers_like_one_node_and_outlives_the_relays_death(
    site: Fleet, alone: str
) -> None:
    first = site.machine("a")

    view = deploy(site, "cut")

    assert chain(site, view) == ["a", "b", "(a)", "c"]
    [process] = relays(first)
    for sampling in ({"temperature": 0}, {"temperature": 0.8, "seed": 7}):
        assert text_of(site, "cut", **sampling) == text_of(site, alone, **sampling)

    process.kill()
    again = site.wait_ready("cut", after=view)
    assert chain(site, again) == ["a", "b", "(a)", "c"]
    assert text_of(site, "cut", temperature=0) == text_of(site, alone, temperature=0)

    with site.asking() as shoal:
        shoal.stop("cut")
    site.wait(lambda: not relays(first), "the relay has ended with its deployment")


def test_with_the_last_block_at_home_two_relays_of_one_process_carry_frames_there_and_back(
    site: Fleet, alone: str
) -> None:
    home, far, hub = (site.machine(name) for name in "bca")
    ends = (Pin(block=2, node=far.id), Pin(block=site.stock.blocks("tiny") - 1, node=home.id))
    with site.asking(home) as shoal:
        shoal.deploy("tiny", name="round", shape=SHAPE, stages=3, pins=ends)

    view = site.wait_ready("round")

    assert chain(site, view) == ["b", "(a)", "c", "(a)", "b"]
    assert len(relays(hub)) == 1
    for sampling in ({"temperature": 0}, {"temperature": 0.8, "seed": 7}):
        assert text_of(site, "round", home, **sampling) == text_of(site, alone, **sampling)

    with site.asking() as shoal:
        shoal.stop("round")
    site.wait(lambda: not relays(hub), "the relays have ended with their deployment")


def test_whoever_wants_no_relays_is_told_that_there_is_no_way(site: Fleet) -> None:
    with Shoal(site.machines[0].url, timeout_s=60.0) as shoal:
        answer = shoal.plan("tiny", shape=SHAPE, stages=3, pins=pins(site), relays=Relays.NEVER)

    assert isinstance(answer, Infeasible)
    assert "allow relays" in answer.hint
