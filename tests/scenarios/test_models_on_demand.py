"""Two models that do not fit together on a small node: each answers when it is asked, and goes when the other is, or when idle."""

import threading
from typing import Any

import httpx
import openai
import pytest
from tests.scenarios.conftest import TINY_CONTEXT
from tests.scenarios.test_coming_and_going import shoal

from shoal.fleet.views import DeploymentState
from shoal.plan.problem import RequestShape

Fleet = Any  # of conftest
SHAPE = RequestShape(tokens_in=8, tokens_out=16, context_tokens=TINY_CONTEXT, slots=2)
ROOM_FOR_ONE = "160MiB"


@pytest.fixture
def small(fleet: Fleet) -> Fleet:
    """A node with room for one model, and two that are loaded on demand."""
    first = fleet.up("a", "--memory", ROOM_FOR_ONE)
    first.wait_up()
    fleet.wait_alive("a")
    with fleet.asking() as client:
        for name in ("chat", "code"):
            client.deploy("tiny", name=name, shape=SHAPE, on_demand=True, keep_alive_s=None)
    fleet.wait(lambda: len(fleet.openai().models.list().data) == 2, "both are listed")
    return fleet


def ask(fleet: Fleet, name: str, tokens: int = 16) -> str:
    messages: Any = [{"role": "user", "content": "hi"}]
    answer = fleet.openai().chat.completions.create(
        model=name, messages=messages, max_tokens=tokens, seed=1, temperature=0
    )
    return str(answer.choices[0].message.content)


def states(fleet: Fleet) -> dict[str, DeploymentState]:
    with fleet.asking() as client:
        return {d.name: d.state for d in client.deployments()}


@pytest.mark.slow
def test_both_answer_in_turn_though_there_is_room_for_one(small: Fleet) -> None:
    (machine,) = small.machines
    assert states(small) == dict.fromkeys(("chat", "code"), DeploymentState.ASLEEP)
    assert machine.workers() == [], "nothing is loaded before somebody asks"
    assert httpx.get(f"{machine.url}/readyz").status_code == 200, "who asks would be answered"
    assert machine.workers() == []

    texts = [ask(small, name) for name in ("chat", "code", "chat")]

    assert len(set(texts)) == 1, "it is the same model twice"
    assert len(machine.workers()) == 1
    assert states(small) == {"chat": DeploymentState.READY, "code": DeploymentState.ASLEEP}
    shown = shoal("ps", home=machine.home)
    assert "asleep" in shown.stdout
    assert [e.text for e in small.events() if e.kind == "deployment.drowsy"] == [
        "its memory is needed for code",
        "its memory is needed for chat",
    ]


@pytest.mark.slow
def test_an_answer_that_runs_is_not_cut_off_by_who_needs_its_memory_and_nobody_waits_for_ever(small: Fleet) -> None:
    ask(small, "chat")
    texts: list[str] = []
    long = threading.Thread(target=lambda: texts.append(ask(small, "chat", 3000)))
    long.start()
    busy = small.wait(lambda: _busy(small), "it answers at length")
    assert busy

    with pytest.raises(openai.InternalServerError) as refused:
        small.openai().chat.completions.create(
            model="code", messages=[{"role": "user", "content": "hi"}], extra_body={"timeout_s": 1.0}
        )

    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert "in use, or about to be: chat" in str(refused.value)
    assert ask(small, "code"), "who waits longer gets the memory when the other has ended"
    long.join(60)
    assert len(texts[0]) > 1000


@pytest.mark.slow
def test_a_model_goes_when_nobody_has_asked_for_it_for_its_keep_alive(fleet: Fleet) -> None:
    first = fleet.up("a")
    first.wait_up()
    fleet.wait_alive("a")
    flags = ("serve", "tiny", "--name", "chat", "--context", str(TINY_CONTEXT), "--on-demand", "--keep-alive", "2s")
    served = shoal(*flags, home=first.home)
    assert served.returncode == 0, served.stderr
    assert "chat is asleep: the first request loads it" in served.stdout

    ask(fleet, "chat")
    assert len(first.workers()) == 1
    fleet.wait(lambda: states(fleet)["chat"] is DeploymentState.ASLEEP, "it is asleep again", 20)
    fleet.wait(lambda: not first.workers(), "its memory is given back", 10)
    first.end()
    first.start()
    first.wait_up()
    fleet.wait(lambda: states(fleet).get("chat") is DeploymentState.ASLEEP, "it sleeps on after a restart")
    assert ask(fleet, "chat")


@pytest.mark.slow
def test_a_model_that_sleeps_is_woken_by_another_coordinator_while_whoever_asks_waits(fleet: Fleet) -> None:
    a = fleet.up("a")
    a.wait_up()
    b = fleet.join("b", "--standby", "--gateway", "127.0.0.1:0", models=("tiny",))
    b.wait_up()
    fleet.wait_alive("a", "b")
    fleet.wait(lambda: fleet.nodes(b), "b's gateway hears the coordinator")
    with fleet.asking(b) as client:
        client.deploy("tiny", name="chat", shape=SHAPE, on_demand=True)
    fleet.wait(lambda: fleet.openai(b).models.list().data, "it is listed")

    a.kill()
    fleet.machines = [b, a]
    text = ask(fleet, "chat")

    assert text
    assert states(fleet) == {"chat": DeploymentState.READY}
    assert any(e.kind == "coordinator.leads" and e.node == b.id for e in fleet.events(b))


def _busy(fleet: Fleet) -> bool:
    text = httpx.get(f"{fleet.machines[0].url}/metrics").text
    return any(line.startswith("shoal_requests_running") and not line.endswith(" 0.0") for line in text.splitlines())
