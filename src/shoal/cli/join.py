"""shoal join: add this machine to a fleet."""

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


def join(
    address: Annotated[
        list[str], typer.Argument(metavar="ADDRESS...", help="HOST:PORT of one node of the fleet, or of several.")
    ],
    *,
    token: Annotated[str, typer.Option(help="The fleet's join token (checked once nodes have certificates).")] = "",
    standby: Annotated[bool, typer.Option("--standby", help="Take over when the coordinator falls silent.")] = False,
    gateway: Annotated[str, typer.Option(help="Also answer HTTP, at HOST:PORT.")] = "",
    api_keys: ApiKeys = "",
    allow_host: AllowHosts = None,
    allow_origin: AllowOrigins = None,
    listen: Listen = "tcp/127.0.0.1:0",
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
    """Add this machine to a fleet."""
    del token  # part of the command's final form; there is nothing yet to check it against
    run(
        {
            "connect": address,
            "gateway": gateway,
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
            "coordinates": standby,
        },
        expose=expose,
    )
