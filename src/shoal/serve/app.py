"""The gateway as one ASGI application: routes, door and error shapes; everything it needs arrives as an argument."""

from typing import Any, TypeAlias

from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig

from shoal import __version__
from shoal.serve.access import Access, check_caller, check_key
from shoal.serve.admin import event_routes, machine_routes, placement_routes
from shoal.serve.answer import Door
from shoal.serve.embeddings import embedding_routes
from shoal.serve.errors import responder
from shoal.serve.health import OPEN, health_routes
from shoal.serve.models import model_routes
from shoal.serve.page import SchemaPage
from shoal.serve.ports import Limits, Node
from shoal.serve.responses import response_routes
from shoal.serve.text import text_routes

App: TypeAlias = Litestar
"""What `run.serve` serves; other rooms name it without naming the framework."""


def build_app(node: Node, access: Access, limits: Limits) -> App:
    """The application for one gateway."""
    door = Door(node=node, limits=limits)

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        check_caller(access, connection.headers.get("host"), connection.headers.get("origin"))
        if not handler.opt.get(OPEN):
            check_key(access, connection.headers.get("authorization"))

    return Litestar(
        route_handlers=[
            *text_routes(door),
            *response_routes(door),
            *embedding_routes(door),
            *model_routes(node),
            *health_routes(node),
            *machine_routes(node.machines),
            *placement_routes(node.placement),
            *event_routes(node.events),
        ],
        guards=[guard],
        exception_handlers={Exception: responder(limits.body_bytes)},
        openapi_config=_openapi(),
        cors_config=CORSConfig(allow_origins=sorted(access.origins)) if access.origins else None,
        request_max_body_size=limits.body_bytes,
        logging_config=None,
        debug=False,
    )


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Shoal",
        version=__version__,
        description="Unequal machines at the edge act as one inference service. /v1 speaks OpenAI's API, /shoal/v1 is Shoal's own.",
        openapi_router=Router("/schema", route_handlers=[], opt={OPEN: True}, include_in_schema=False),
        render_plugins=[SchemaPage()],
        use_handler_docstrings=False,
    )
