"""Probes and measurements: `/livez`, `/readyz`, `/healthz`, `/metrics`."""

from litestar import MediaType, Response, get
from litestar.handlers import HTTPRouteHandler

from shoal.fleet.views import HealthView
from shoal.observe.metrics import CONTENT_TYPE
from shoal.serve.ports import Node

_CHARSET = "; charset=utf-8"  # the framework adds it to every text
OPEN = "open"
"""A handler option: no API key is asked for."""


def health_routes(node: Node) -> list[HTTPRouteHandler]:
    """Handlers for probes; those that say nothing about the fleet ask for no key."""

    @get("/livez", opt={OPEN: True}, summary="The process answers", tags=["Health"])
    async def livez() -> dict[str, bool]:
        return {"live": True}

    @get("/readyz", opt={OPEN: True}, summary="Requests would be answered: 200 or 503", tags=["Health"])
    async def readyz() -> Response[dict[str, object]]:
        report = await node.health.report()
        waiting = {c.name: c.reason for c in report.components if not c.ready}
        if report.deployments and not report.ready:  # how many, not which: no key is asked for here
            waiting["deployments"] = f"none of {len(report.deployments)} answers"
        status = 200 if report.ready else 503
        return Response({"ready": report.ready, "not_ready": waiting}, status_code=status)

    @get("/healthz", summary="Every component, and the age of each deployment's last token", tags=["Health"])
    async def healthz() -> Response[HealthView]:
        report = await node.health.report()
        return Response(report, status_code=200 if report.ready else 503)

    @get("/metrics", media_type=MediaType.TEXT, summary="Prometheus text format", tags=["Health"])
    async def metrics() -> Response[bytes]:
        return Response(node.metrics.render(), media_type=CONTENT_TYPE.removesuffix(_CHARSET))

    return [livez, readyz, healthz, metrics]
