"""Which models a gateway answers for, and what it says of the others."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from shoal.clock import ManualClock
from shoal.errors import InvalidRequestError, ShoalError, UnavailableError, UnknownModelError
from shoal.fleet.reconcile import Phase
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import Deployment
from shoal.fleet.view import CoordinatorView, DeploymentStatus, Lease
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.fleet_api import check_name
from shoal.node.gateway import Models
from shoal.node.pipeline import AnswerDesk
from shoal.observe.log import set_up_logs
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage
from shoal.store.home import open_store
from shoal.transport.memory import MemoryFabric

HERE, ELSEWHERE = NodeId("h" * 32), NodeId("e" * 32)
CHAT = DeploymentId("chat")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def make(tmp_path: Path, said: io.StringIO) -> Iterator[Callable[[], Models]]:
    bus = MemoryFabric().attach("h")

    def models() -> Models:
        log, clock = set_up_logs(said), ManualClock()
        desk = AnswerDesk(bus, "shoal", HERE, clock, log)
        return Models(HERE, open_store(tmp_path), desk, clock, lambda: 0.0, lambda: "id", log)

    yield models
    bus.close()


def view(source: NodeId, phase: Phase = Phase.SERVING, sequence: int = 1) -> CoordinatorView:
    stage = Stage(
        node=source, start=0, stop=1, weights_bytes=1, kv_bytes=1, memory_bytes=1, prefill_s=1, decode_s=1,
        send_prefill_s=0, send_decode_s=0,
    )  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    plan = Plan(
        stages=(stage,), objective=Objective.LATENCY, shape=RequestShape(), estimate=figures, lower_bound=1, gap=0,
        solver="test",
    )  # fmt: skip
    spec = DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("0" * 64), source=source)
    status = DeploymentStatus(
        deployment=Deployment(spec=spec, plan_epoch=1, answer=plan), phase=phase, gateway="http://there:8400"
    )
    return CoordinatorView(lease=Lease(holder=HERE, fencing_epoch=1), sequence=sequence, deployments=(status,))


pytestmark = pytest.mark.anyio


async def test_a_model_of_another_gateway_is_refused_with_that_gateways_address(make: Callable[[], Models]) -> None:
    models = make()
    models.hear(view(ELSEWHERE))

    with pytest.raises(UnknownModelError) as refused:
        models.get("chat")

    assert "http://there:8400" in refused.value.hint
    assert (await models.report()).deployments == (), "its health is its own gateway's to tell"


async def test_a_model_that_cannot_be_opened_says_why_and_the_log_says_it_once(
    make: Callable[[], Models], said: io.StringIO
) -> None:
    models = make()
    async with anyio.create_task_group() as group:
        group.start_soon(models.run)
        for sequence in range(1, 4):
            models.hear(view(HERE, sequence=sequence))
            await anyio.sleep(0.1)
        group.cancel_scope.cancel()

    with pytest.raises(UnavailableError, match="not on this node"):
        models.get("chat")
    assert said.getvalue().count("model.not_opened") == 1


@pytest.mark.parametrize("name", ["chat", "org/name", "a b", "Modell für uns", "x*y", "#q?", "%2f"])
async def test_names_may_be_nearly_anything(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a//b", "../b", "a/..", "a\nb", "x" * 201, "/a", "a/"])
async def test_names_that_would_spoil_an_address_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_name(name)

    assert isinstance(refused.value, ShoalError)
    assert refused.value.param == "name"
