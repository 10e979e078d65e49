"""A device or a link slows down while requests come: the deployment moves by itself, no request fails, it does not flap."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

import openai
import pytest

from shoal.node.weather import Weather, write_weather
from shoal.node.worker_spec import LinkShape

Fleet = Any  # of conftest
Machine = Any
ASKED = {"model": "two", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 60}
DWELL_S = 3.0
MOVES_S = 120.0
"""The dwell time after the deployment, some seconds of regret, and the move; on a busy machine."""


@dataclass
class Answers:
    """What came of requests, one after another, each streamed."""

    texts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def requests(fleet: Fleet) -> Iterator[Answers]:
    """Two callers that ask without pause until the end."""
    answers, over = Answers(), Event()

    def ask(client: openai.OpenAI) -> None:
        while not over.is_set():
            try:
                chunks = list(client.chat.completions.create(**ASKED, stream=True))
                answers.texts.append("".join(c.choices[0].delta.content or "" for c in chunks))
            except openai.APIError as error:
                answers.failures.append(f"{type(error).__name__}: {error}")

    callers = [Thread(target=ask, args=(fleet.openai(),)) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        yield answers
    finally:
        over.set()
        for caller in callers:
            caller.join(60)


def second_of(fleet: Fleet) -> Machine:
    """Where the last stage runs."""
    node = fleet.deployment("two").plan.stages[-1].node
    return next(m for m in fleet.machines if m.id == node)


def moves(fleet: Fleet) -> list[str]:
    return [event.text for event in fleet.events() if event.kind == "plan.moved"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a link, and there is room for both plans", "a device, and there is none"])
def test_when_something_slows_down_the_deployment_moves_without_a_failed_request_and_does_not_flap(
    fleet: Fleet, what: str
) -> None:
    roomy = what.startswith("a link")
    first = fleet.up("a", "--memory", "2GiB" if roomy else "160MiB", settings=f"move_dwell_s = {DWELL_S}")
    first.wait_up()
    others = [fleet.join(name, "--link", f"{first.id}=1ms,1000mbit", "--memory", "2GiB") for name in ("b", "c")]
    for machine in others:
        machine.wait_up()
    fleet.wait_alive("a", "b", "c")
    fleet.deploy("two", first, first, free=True)
    slow = second_of(fleet)
    assert slow is not first
    expected = fleet.openai().chat.completions.create(**ASKED).choices[0].message.content

    with requests(fleet) as answers:
        time.sleep(3)
        far = LinkShape(target=first.id, latency_s=0.06, bytes_per_s=1e7)
        write_weather(slow.home, Weather(links=(far,)) if roomy else Weather(slowdown=40.0))
        fleet.wait(lambda: second_of(fleet) is not slow, "the deployment has moved", MOVES_S)
        moved = fleet.wait_ready("two")
        count = len(answers.texts)
        fleet.wait(lambda: len(answers.texts) > count + 4, "requests are answered where it is now")

        write_weather(slow.home, Weather())
        time.sleep(5 * DWELL_S)
        there = fleet.deployment("two")

    assert answers.failures == []
    assert set(answers.texts) == {expected}
    (said, *more) = moves(fleet)
    assert said.startswith("moved two: ")
    assert "ms per token, move costs" in said
    assert ("without service" in said) is not roomy, "then requests have waited"
    assert len(more) <= 1
    assert there.plan_epoch == moved.plan_epoch or more
    assert len(fleet.machine("a").workers()) == 1, "nothing is left of the old plan"
