"""Shoal's own routes, and both clients of the SDK on a real gateway."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest
from litestar import Litestar
from litestar.testing import TestClient

from shoal.client import AsyncShoal, Shoal
from shoal.errors import InfeasibleError, InvalidRequestError, NodeUnreachableError, UnknownModelError
from shoal.fleet.views import ComponentHealth, DeploymentHealth, DeploymentState, EventView, HealthView
from shoal.ids import DeploymentId, NodeId
from shoal.observe.metrics import CONTENT_TYPE
from shoal.plan.problem import Choose, Cloud, Infeasible, Limits, Pin, RequestShape, Residency

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway


@pytest.fixture
def shoal(url: str) -> Iterator[Shoal]:
    with Shoal(url) as client:
        yield client


def test_nodes(shoal: Shoal) -> None:
    assert [(n.name, n.cores, n.standing.value) for n in shoal.nodes()] == [("pi", 4, "alive")]


def test_a_plan_that_cannot_be_is_an_answer(shoal: Shoal) -> None:
    answer = shoal.plan("big", shape=RequestShape(tokens_in=9), stages=2, pins=(Pin(block=0, node=NodeId("n")),))

    assert answer == Infeasible(reason="big is too big", needed_bytes=10, available_bytes=4, hint="add a node")


def test_the_problem_behind_a_plan_comes_with_its_limits_and_residency(shoal: Shoal) -> None:
    limits, rule = Limits(joules=2.0), Residency(regions=("eu",))
    choose, cloud = Choose(in_flight=4), Cloud(name="c", time_to_first_token_s=1.0, time_per_output_token_s=0.1)

    problem = shoal.problem("m", limits=limits, residency=rule, choose=choose, cloud=cloud)

    assert (problem.blocks[0].name, problem.limits, problem.residency) == ("m", limits, rule)
    assert (problem.choose, problem.cloud) == (choose, cloud)


def test_what_a_plan_may_say_of_relays_is_one_of_three_words(url: str) -> None:
    answers = [
        httpx.post(f"{url}/shoal/v1/problem", json={"model": "m", "relays": word})
        for word in ("never", "if-needed", "always", "maybe")
    ]

    assert [answer.is_success for answer in answers] == [True, True, True, False]
    assert answers[3].status_code == 400
    assert "relays" in answers[3].json()["error"]["message"] + str(answers[3].json()["error"]["param"])


def test_deploy_list_stop(shoal: Shoal) -> None:
    assert shoal.deploy("org/small", name="a/b").state is DeploymentState.PLANNED
    assert [d.name for d in shoal.deployments()] == ["a/b"]

    shoal.stop("a/b")

    assert shoal.deployments() == ()


def test_errors_come_back_as_themselves(shoal: Shoal) -> None:
    with pytest.raises(InfeasibleError) as caught:
        shoal.deploy("huge")
    assert (caught.value.message, caught.value.hint, caught.value.param) == (
        "6 bytes are missing",
        "add a node",
        "model",
    )
    with pytest.raises(UnknownModelError):
        shoal.stop("nothing")


def test_profile_join_and_leave(shoal: Shoal, gateway: "Gateway") -> None:
    assert shoal.profile("m", refresh=True).profile_epoch == 7
    assert shoal.join_info().command.startswith("shoal join")

    shoal.leave("b" * 32)

    assert gateway.fleet.left == ["b" * 32]


def test_health_is_an_answer_also_when_the_gateway_is_not_ready(shoal: Shoal, gateway: "Gateway") -> None:
    assert shoal.health().ready
    gateway.fleet.health = HealthView(components=(ComponentHealth(name="coordinator", ready=False, reason="no lease"),))

    assert not shoal.health().ready
    assert shoal.health().components[0].reason == "no lease"


def test_events_listed_and_followed(shoal: Shoal, gateway: "Gateway") -> None:
    gateway.fleet.log = [EventView(sequence=i, kind="node_lost", data={"missed": i}) for i in range(1, 6)]

    assert [e.sequence for e in shoal.events(after=2, limit=2)] == [3, 4]
    assert list(shoal.follow(after=3)) == gateway.fleet.log[3:]


def test_bad_arguments_are_named(shoal: Shoal) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        shoal.events(limit=0)

    assert caught.value.param == "limit"


def test_the_async_client_carries_the_same_calls(url: str, gateway: "Gateway") -> None:
    gateway.fleet.log = [EventView(sequence=1, kind="x")]

    async def use() -> tuple[object, ...]:
        async with AsyncShoal(url) as shoal:
            deployed = await shoal.deploy("small")
            await shoal.stop("small")
            await shoal.leave("n")
            followed = [e.sequence async for e in shoal.follow()]
            rest = [await shoal.nodes(), await shoal.plan("m"), await shoal.deployments(), await shoal.profile()]
            return deployed.name, followed, rest, await shoal.health(), await shoal.events(), await shoal.join_info()

    name, followed, rest, health, events, _ = anyio.run(use)

    assert (name, followed, len(rest), health, len(events)) == ("small", [1], 4, gateway.fleet.health, 1)


def test_nobody_there_is_unreachable() -> None:
    with Shoal("http://127.0.0.1:9") as shoal, pytest.raises(NodeUnreachableError, match=r"127\.0\.0\.1:9"):
        shoal.nodes()


def test_readiness_names_what_is_not_ready(gateway: "Gateway") -> None:
    gateway.fleet.health = HealthView(
        components=(
            ComponentHealth(name="fabric", ready=True),
            ComponentHealth(name="coordinator", ready=False, reason="no lease"),
        )
    )

    answer = gateway.client().get("/readyz")

    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "not_ready": {"coordinator": "no lease"}}
    assert gateway.client().get("/livez").status_code == 200


@pytest.mark.parametrize(
    ("answering", "status"), [((), 200), ((False,), 503), ((False, False), 503), ((False, True), 200)]
)
def test_a_gateway_is_ready_when_one_of_its_deployments_answers(
    gateway: "Gateway", answering: tuple[bool, ...], status: int
) -> None:
    gateway.fleet.health = HealthView(
        components=(ComponentHealth(name="coordinator", ready=True),),
        deployments=tuple(DeploymentHealth(name=DeploymentId(f"m{i}"), ready=r) for i, r in enumerate(answering)),
    )

    answer = gateway.client().get("/readyz")

    assert answer.status_code == gateway.client().get("/healthz").status_code == status
    expected = {} if status == 200 else {"deployments": f"none of {len(answering)} answers"}
    assert answer.json()["not_ready"] == expected


def test_a_gateway_that_answers_by_its_last_plan_is_ready_and_says_what_it_misses(gateway: "Gateway") -> None:
    gateway.fleet.health = HealthView(
        components=(ComponentHealth(name="coordinator", ready=False, reason="not heard for 9.0 s"),),
        deployments=(DeploymentHealth(name=DeploymentId("m"), ready=True),),
    )

    assert gateway.client().get("/readyz").json() == {
        "ready": True, "not_ready": {"coordinator": "not heard for 9.0 s"}
    }  # fmt: skip


def test_metrics_are_passed_on_as_they_are(client: TestClient[Litestar]) -> None:
    answer = client.get("/metrics")

    assert answer.content == b"# HELP shoal_tokens_total x\nshoal_tokens_total 1\n"
    assert answer.headers["content-type"] == CONTENT_TYPE


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "plan"), ({"plan": {}}, "plan.model"), ({"plan": {"model": "m", "stages": "2"}}, "plan.stages"),
     ({"plan": {"model": "m", "stage": 2}}, "plan.stage"), ({"plan": {"model": "m", "shape": {"slotz": 1}}}, "plan.shape.slotz"),
     ({"plan": {"model": "m"}, "nam": "x"}, "nam")],
)  # fmt: skip
def test_a_deployment_that_is_misspelt_is_refused(
    client: TestClient[Litestar], body: dict[str, object], param: str
) -> None:
    answer = client.post("/shoal/v1/deployments", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
