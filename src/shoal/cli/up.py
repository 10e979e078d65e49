"""shoal up: start this machine's node with a gateway; the first node of a fleet coordinates it."""

from typing import Annotated

import typer

from shoal.cli.start import (
    AllowHosts,
    AllowOrigins,
    ApiKeys,
    Discover,
    Expose,
    JoulesPerMb,
    Links,
    Listen,
    Memory,
    Name,
    PricePerHour,
    Region,
    Slowdown,
    Threads,
    Trust,
    Watts,
    run,
)
from shoal.node.options import DEFAULT_HTTP_PORT, DEFAULT_LISTEN


def up(
    *,
    host: Annotated[str, typer.Option(help="Where the HTTP gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port; 0 takes any free one.", min=0, max=65535)] = DEFAULT_HTTP_PORT,
    api_keys: ApiKeys = "",
    allow_host: AllowHosts = None,
    allow_origin: AllowOrigins = None,
    listen: Listen = DEFAULT_LISTEN,
    expose: Expose = False,
    discover: Discover = False,
    name: Name = "",
    memory: Memory = "",
    threads: Threads = 0,
    slowdown: Slowdown = 1.0,
    link: Links = None,
    watts: Watts = 0.0,
    price_per_hour: PricePerHour = 0.0,
    joules_per_mb: JoulesPerMb = 0.0,
    region: Region = "",
    trust: Trust = "",
) -> None:
    """Start this machine's node with a gateway."""
    run(
        {
            "http": (host, port),
            "api_keys": api_keys,
            "allow_hosts": allow_host,
            "allow_origins": allow_origin,
            "listen": listen,
            "name": name,
            "memory": memory,
            "threads": threads,
            "slowdown": slowdown,
            "links": link,
            "watts": watts,
            "price_per_hour": price_per_hour,
            "joules_per_mb": joules_per_mb,
            "region": region,
            "trust": trust,
            "discover": discover,
            "coordinates": True,
            "eager": True,
        },
        expose=expose,
    )
