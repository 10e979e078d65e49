"""The coordinator is a role: it dies, another takes it, it comes back, and what is served goes on."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
import pytest

from shoal.errors import ShoalError
from shoal.fleet.order import Accepted, Order, Refused, Reply, Retire
from shoal.fleet.report import ShardId
from shoal.fleet.view import CoordinatorView
from shoal.ids import DeploymentId
from shoal.node.messages import VIEW
from shoal.transport.keys import ControlTopic, EventTopic, key_of, pattern_of
from shoal.transport.zenoh import open_control

Fleet = Any  # of conftest
Machine = Any


def text_of(fleet: Fleet, at: Machine, model: str) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 40}
    return fleet.openai(at).chat.completions.create(**asked).choices[0].message.content


def give(order: Order, to: Machine) -> Reply:
    """As a coordinator would, through the node's own agent."""
    bus = open_control(f"tcp/{to.address}")
    try:
        key = key_of(ControlTopic(fleet="shoal", node=to.id, verb="order"))
        return msgspec.msgpack.decode(
            bus.query(key, msgspec.msgpack.encode(order), timeout_s=3.0), type=Accepted | Refused
        )
    finally:
        bus.close()


def lease_at(machine: Machine, limit_s: float = 3.0) -> CoordinatorView | None:
    """The next view that is broadcast to *machine*, None when there is silence."""
    heard: list[CoordinatorView] = []
    bus = open_control(f"tcp/{machine.address}")
    try:
        pattern = pattern_of(EventTopic, fleet="shoal", kind=VIEW)
        bus.subscribe(
            pattern, lambda sample: heard.append(msgspec.msgpack.decode(sample.payload, type=CoordinatorView))
        )
        until_s = time.monotonic() + limit_s
        while not heard and time.monotonic() < until_s:
            time.sleep(0.05)
        return heard[0] if heard else None
    finally:
        bus.close()


@pytest.fixture(scope="module")
def site(fleets: Callable[[ExitStack], Fleet]) -> Iterator[Fleet]:
    """a coordinates; b is its standby with a gateway of its own; c knows both.  b serves `mine` in two stages and `solo` alone."""
    with ExitStack() as stack:
        fleet = fleets(stack)
        a = fleet.up("a")
        a.wait_up()
        b = fleet.join("b", "--standby", "--gateway", "127.0.0.1:0", models=("tiny",))
        b.wait_up()
        c = fleet.join("c", to=(a, b))
        c.wait_up()
        fleet.wait_alive("a", "b", "c")
        fleet.wait(lambda: fleet.nodes(b), "b's gateway hears the coordinator")
        fleet.deploy("solo", b, at=b, wait=False)
        fleet.deploy("mine", b, c, at=b)
        fleet.wait_ready("solo", at=b)
        yield fleet


@pytest.mark.slow
def test_a_standby_takes_over_and_what_is_served_goes_on(site: Fleet) -> None:
    a, b, c = site.machines
    before = {name: (text_of(site, b, name), site.deployment(name, b).plan_epoch) for name in ("mine", "solo")}
    old = lease_at(b)
    assert old is not None
    assert old.lease.holder == a.id

    a.kill()

    assert text_of(site, b, "mine") == before["mine"][0], "nobody needs a coordinator to answer"
    new = site.wait(lambda: (v := lease_at(b)) and v.lease.holder == b.id and v, "b leads", 15)
    assert new.lease.fencing_epoch > old.lease.fencing_epoch
    site.wait(lambda: site.nodes(b)["a"].standing == "lost", "a is lost")
    after = {name: (text_of(site, b, name), site.deployment(name, b).plan_epoch) for name in ("mine", "solo")}
    assert after == before

    shard = ShardId(deployment=DeploymentId("mine"), plan_epoch=before["mine"][1], stage=1)
    refused = give(Retire(fencing_epoch=old.lease.fencing_epoch, shard=shard), c)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.fencing_epoch) == ("stale_lease", new.lease.fencing_epoch)
    assert text_of(site, b, "mine") == before["mine"][0]


@pytest.mark.slow
def test_a_coordinator_that_comes_back_follows_the_one_that_took_over(site: Fleet) -> None:
    a, b, _ = site.machines
    site.wait(lambda: (v := lease_at(b)) and v.lease.holder == b.id, "b leads", 15)
    with site.asking(b) as shoal:
        shoal.stop("solo")
    site.deploy("later", b, at=b)
    old = lease_at(b)

    a.start()
    a.wait_up()
    site.wait_alive("a", at=b)
    time.sleep(2.0)  # long enough for a to claim what is not its own

    now = lease_at(b)
    assert now.lease == old.lease
    assert {d.name for d in _deployments(site, b)} == {"mine", "later"}
    assert {d.name for d in _deployments(site, a)} == {"mine", "later"}
    assert text_of(site, b, "later")


def _deployments(fleet: Fleet, at: Machine) -> Any:  # noqa: ANN401
    with fleet.asking(at) as shoal:
        return shoal.deployments()


@pytest.mark.slow
def test_a_fleet_without_coordinator_serves_on_and_nodes_that_restart_serve_their_last_plans(fleet: Fleet) -> None:
    a = fleet.up("a")
    a.wait_up()
    b = fleet.join("b", "--gateway", "127.0.0.1:0", models=("tiny",))
    b.wait_up()
    c = fleet.join("c")
    c.wait_up()
    fleet.wait_alive("a", "b", "c")
    fleet.wait(lambda: fleet.nodes(b), "b's gateway hears the coordinator")
    epochs = {"solo": fleet.deploy("solo", b, at=b).plan_epoch, "two": fleet.deploy("two", b, c, at=b).plan_epoch}
    before = {name: text_of(fleet, b, name) for name in epochs}
    a.kill()

    for restarted in (b, c):
        restarted.kill()
        restarted.start()
        restarted.wait_up()
        for name in epochs:
            fleet.wait(partial(_answers, fleet, b, name, before[name]), f"{name} answers, without a coordinator", 90)

    a.start()
    a.wait_up()
    fleet.wait_alive("a", "b", "c")
    for name, epoch in epochs.items():
        view = fleet.wait(partial(fleet.deployment, name, a), f"the coordinator knows {name} again")
        assert view.plan_epoch == epoch, "what works is not planned again"
        assert text_of(fleet, b, name) == before[name]


def _answers(fleet: Fleet, at: Machine, model: str, expected: str) -> bool:
    return _text_or_none(fleet, at, model) == expected


def _text_or_none(fleet: Fleet, at: Machine, model: str) -> str | None:
    import openai

    try:
        return text_of(fleet, at, model)
    except (openai.APIError, ShoalError):
        return None
