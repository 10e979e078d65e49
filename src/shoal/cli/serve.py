"""shoal serve: measure, plan, deploy a model; starts a node first when none runs here."""

import os
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from shoal.cli.connect import URL_HELP, api_key, find_url, local_node
from shoal.cli.deploy import (
    Context,
    Goal,
    MaxFirstToken,
    MaxJoules,
    MaxLatency,
    MaxPrice,
    MinTokens,
    Pins,
    Regions,
    Slots,
    Stages,
    Trusts,
    curl_line,
    deploy_and_wait,
    have_model,
    options,
    residency,
    show_plan,
)
from shoal.cli.start import AllowHosts, AllowOrigins, Expose, Listen, Memory, Stop, check_start, run
from shoal.client import Shoal
from shoal.errors import SettingsError
from shoal.node.fleet_api import check_name
from shoal.node.options import DEFAULT_HTTP_PORT, DEFAULT_LISTEN
from shoal.node.running import Running
from shoal.node.settings import read_settings
from shoal.plan.problem import Limits, Objective, RequestShape


def serve(
    model: Annotated[str, typer.Argument(help="A model of this machine (`shoal models`), or a reference to pull.")],
    *,
    name: Annotated[str, typer.Option(help="What clients call it; by default the model's name.")] = "",
    context: Context = 2048,
    slots: Slots = 2,
    stages: Stages = 0,
    pin: Pins = None,
    objective: Goal = Objective.LATENCY,
    port: Annotated[
        int, typer.Option(help="Port of the gateway, if a node is started; 0 takes any free one.", min=0, max=65535)
    ] = DEFAULT_HTTP_PORT,
    listen: Listen = DEFAULT_LISTEN,
    expose: Expose = False,
    memory: Memory = "",
    allow_host: AllowHosts = None,
    allow_origin: AllowOrigins = None,
    max_latency: MaxLatency = None,
    max_first_token: MaxFirstToken = None,
    min_tokens_per_s: MinTokens = None,
    max_joules: MaxJoules = None,
    max_price: MaxPrice = None,
    regions: Regions = "",
    trusts: Trusts = "",
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Measure, plan and deploy a model; shows the plan and its prediction before anything is loaded."""
    if name:
        check_name(name)  # a bad one would be refused too, after the plan
    console = Console()
    shape = RequestShape(context_tokens=context, slots=slots)
    flags = _node_flags(port, listen, memory, allow_host, allow_origin)
    limits = Limits(
        latency_s=max_latency,
        time_to_first_token_s=max_first_token,
        tokens_per_s=min_tokens_per_s,
        joules=max_joules,
        price=max_price,
    )
    remote = bool(url or os.environ.get("SHOAL_URL"))
    here = not remote and local_node() is None
    if here:
        check_start(flags, expose=expose)  # before a model is downloaded, not after
    elif flags != _node_flags() or expose:
        raise SettingsError(
            "--port, --listen, --expose, --memory, --allow-host and --allow-origin are for a node that this command starts; "
            + ("another one is asked" if remote else "one runs here already"),
            hint="leave them out" if remote else "leave them out, or end that node first: `shoal leave`",
        )
    wanted = model if remote else have_model(model, read_settings(), Console(stderr=True))

    def deploy(shoal: Shoal, where: str) -> None:
        asked = options(shape, objective, stages, pin or (), shoal.nodes())
        asked |= {"limits": limits, "residency": residency(regions, trusts)}
        show_plan(shoal, wanted, asked, console)
        view = deploy_and_wait(shoal, wanted, name, asked, console)
        console.print(f"API at {where}/v1; try:")
        console.print(curl_line(where, view.name, view.kind), soft_wrap=True, highlight=False)

    if here:
        _serve_here(flags, deploy, expose=expose)
    else:
        where = find_url(url)
        with Shoal(where, api_key=api_key()) as shoal:
            deploy(shoal, where)


def _node_flags(
    port: int = DEFAULT_HTTP_PORT,
    listen: str = DEFAULT_LISTEN,
    memory: str = "",
    allow_hosts: list[str] | None = None,
    allow_origins: list[str] | None = None,
) -> dict[str, Any]:
    """What `shoal up` would be told."""
    return {
        "http": ("127.0.0.1", port),
        "api_keys": "",
        "allow_hosts": allow_hosts,
        "allow_origins": allow_origins,
        "listen": listen,
        "name": "",
        "memory": memory,
        "threads": 0,
        "slowdown": 1.0,
        "links": None,
        "discover": False,
        "coordinates": True,
        "eager": True,
    }


def _serve_here(flags: Mapping[str, Any], deploy: Callable[[Shoal, str], None], *, expose: bool) -> None:
    """Run a node in the foreground and deploy on it; raises what kept it from being deployed."""
    failed: list[Exception] = []

    def work(running: Running, stop: Stop) -> None:
        try:
            with Shoal(running.url, api_key=api_key()) as shoal:
                deploy(shoal, running.url)
        except Exception as error:  # noqa: BLE001 raised below: the command's door words it, on this thread nobody would
            failed.append(error)
            stop()

    def begin(running: Running, stop: Stop) -> None:
        threading.Thread(target=work, args=(running, stop), daemon=True).start()

    # Whoever serves a model watches the plan and the result: a node's events would run through them.
    interrupted = run(flags, expose=expose, then=begin, terminal_level="warning")
    if failed and not interrupted:
        raise failed[0]
