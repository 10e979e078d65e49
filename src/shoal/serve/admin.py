"""`/shoal/v1/...`: machines, plans, deployments and events, for the SDK and the command line."""

from typing import Annotated

import anyio
import msgspec
from litestar import delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, JSONBody, QueryParameter

from shoal.fleet.views import (
    DeploymentView,
    DeployRequest,
    EventView,
    JoinView,
    NodeView,
    PlanRequest,
    ProfileRequest,
)
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Infeasible, Plan, Problem
from shoal.profile.fleet import FleetProfile
from shoal.serve.closing import closed_after
from shoal.serve.live import EVENTS, Connection, LiveAnswer
from shoal.serve.ports import EventLog, Machines, Placement
from shoal.serve.strict import strict

After = Annotated[int, QueryParameter(ge=0, description="Only events with a higher sequence")]
Limit = Annotated[int, QueryParameter(ge=1, le=1000)]
KEEP_ALIVE_S = 15.0
_encode = msgspec.json.encode


def machine_routes(machines: Machines) -> list[HTTPRouteHandler]:
    """Handlers about the fleet's machines."""

    @get("/shoal/v1/nodes", summary="Every known machine", tags=["Fleet"])
    async def list_nodes() -> list[NodeView]:
        return list(await machines.nodes())

    @post("/shoal/v1/nodes/{node:str}/leave", status_code=204, summary="Drain a machine and let it go", tags=["Fleet"])
    async def leave_fleet(node: FromPath[str]) -> None:
        await machines.leave(NodeId(node))

    @get("/shoal/v1/join", summary="How another machine joins", tags=["Fleet"])
    async def join_info() -> JoinView:
        return await machines.join_info()

    @post(
        "/shoal/v1/profile",
        status_code=200,
        dto=strict(ProfileRequest),
        return_dto=None,
        summary="Measure",
        tags=["Fleet"],
    )
    async def measure(data: JSONBody[ProfileRequest]) -> FleetProfile:
        return await machines.profile(data)

    return [list_nodes, leave_fleet, join_info, measure]


def placement_routes(placement: Placement) -> list[HTTPRouteHandler]:
    """Handlers about plans and deployments."""

    @post(
        "/shoal/v1/plan",
        status_code=200,
        dto=strict(PlanRequest),
        return_dto=None,
        summary="Where a model would go; nothing is loaded",
        tags=["Deployments"],
    )
    async def preview_plan(data: JSONBody[PlanRequest]) -> Plan | Infeasible:
        return await placement.plan(data)

    @post(
        "/shoal/v1/problem",
        status_code=200,
        dto=strict(PlanRequest),
        return_dto=None,
        summary="What a plan would be made from: a problem to solve offline",
        tags=["Deployments"],
    )
    async def state_problem(data: JSONBody[PlanRequest]) -> Problem:
        return await placement.problem(data)

    @get("/shoal/v1/deployments", summary="What is served or will be", tags=["Deployments"])
    async def list_deployments() -> list[DeploymentView]:
        return list(await placement.deployments())

    @post(
        "/shoal/v1/deployments",
        status_code=202,
        dto=strict(DeployRequest),
        return_dto=None,
        summary="Serve a model",
        tags=["Deployments"],
    )
    async def deploy_model(data: JSONBody[DeployRequest]) -> DeploymentView:
        return await placement.deploy(data)

    @delete("/shoal/v1/deployments/{name:path}", status_code=204, summary="Stop serving", tags=["Deployments"])
    async def stop_deployment(name: FromPath[str]) -> None:
        await placement.stop(DeploymentId(name.removeprefix("/")))

    return [preview_plan, state_problem, list_deployments, deploy_model, stop_deployment]


def event_routes(log: EventLog) -> list[HTTPRouteHandler]:
    """Handlers about what happened."""

    @get("/shoal/v1/events", summary="What happened, oldest first", tags=["Events"])
    async def list_events(after: After = 0, limit: Limit = 100) -> list[EventView]:
        return list(await log.events(after, limit))

    @get(
        "/shoal/v1/events/stream",
        responses={200: ResponseSpec(EventView, description="Server-sent events without end", generate_examples=False)},
        summary="What happens, as it happens",
        tags=["Events"],
    )
    async def follow_events(after: After = 0) -> LiveAnswer:
        async def work(connection: Connection) -> None:
            await connection.write(b": open\n\n", more=True)
            async with anyio.create_task_group() as group:
                group.start_soon(_keep_alive, connection)
                async with closed_after(log.follow(after)) as events:
                    async for event in events:
                        await connection.event(_encode(event))
                group.cancel_scope.cancel()
            await connection.write(b"", more=False)

        return LiveAnswer(work, EVENTS)

    return [list_events, follow_events]


async def _keep_alive(connection: Connection) -> None:
    """Comments that keep proxies from closing a quiet stream."""
    while True:
        await anyio.sleep(KEEP_ALIVE_S)
        await connection.write(b": quiet\n\n", more=True)
