"""shoal serve: measure, plan, deploy a model; starts a node first when none runs here."""

import os
import threading
from collections.abc import Callable, Mapping
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.connect import URL_HELP, api_key, find_url, local_node
from shoal.cli.deploy import (
    Context,
    Goal,
    Pins,
    Slots,
    Stages,
    curl_line,
    deploy_and_wait,
    have_model,
    options,
    show_plan,
)
from shoal.cli.start import AllowHosts, AllowOrigins, Stop, run
from shoal.client import Shoal
from shoal.errors import SettingsError, ShoalError
from shoal.node.assemble import Running
from shoal.node.options import DEFAULT_HTTP_PORT, DEFAULT_LISTEN
from shoal.node.settings import read_settings
from shoal.plan.problem import Objective, RequestShape


def serve(
    model: Annotated[str, typer.Argument(help="A model of this machine (`shoal models`), or a reference to pull.")],
    *,
    name: Annotated[str, typer.Option(help="What clients call it; by default the model's name.")] = "",
    context: Context = 2048,
    slots: Slots = 2,
    stages: Stages = 0,
    pin: Pins = None,
    objective: Goal = Objective.LATENCY,
    allow_host: AllowHosts = None,
    allow_origin: AllowOrigins = None,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Measure, plan and deploy a model; shows the plan and its prediction before anything is loaded."""
    console = Console()
    shape = RequestShape(context_tokens=context, slots=slots)
    remote = bool(url or os.environ.get("SHOAL_URL"))
    wanted = model if remote else have_model(model, read_settings(), Console(stderr=True))

    def deploy(shoal: Shoal, where: str) -> None:
        asked = options(shape, objective, stages, pin or (), shoal.nodes())
        show_plan(shoal, wanted, asked, console)
        view = deploy_and_wait(shoal, wanted, name, asked, console)
        console.print(f"API at {where}/v1; try:")
        console.print(curl_line(where, view.name, view.kind), soft_wrap=True, highlight=False)

    if remote or local_node() is not None:
        if allow_host or allow_origin:
            raise SettingsError(
                "--allow-host and --allow-origin are for a gateway that is started here, and one runs already",
                hint="start that one with them: `shoal up --allow-host NAME`",
                param="--allow-host",
            )
        where = find_url(url)
        with Shoal(where, api_key=api_key()) as shoal:
            deploy(shoal, where)
    else:
        _serve_here(deploy, {"allow_hosts": allow_host, "allow_origins": allow_origin})


def _serve_here(deploy: Callable[[Shoal, str], None], door: Mapping[str, list[str] | None]) -> None:
    """Run a node in the foreground and deploy on it."""
    failed: list[ShoalError] = []

    def work(running: Running, stop: Stop) -> None:
        try:
            with Shoal(running.url, api_key=api_key()) as shoal:
                deploy(shoal, running.url)
        except ShoalError as error:
            failed.append(error)
            stop()

    flags = {
        "http": ("127.0.0.1", DEFAULT_HTTP_PORT),
        "api_keys": "",
        **door,
        "listen": DEFAULT_LISTEN,
        "name": "",
        "memory": "",
        "threads": 0,
        "slowdown": 1.0,
        "links": None,
        "discover": False,
        "coordinates": True,
        "eager": True,
    }

    def begin(running: Running, stop: Stop) -> None:
        threading.Thread(target=work, args=(running, stop), daemon=True).start()

    interrupted = run(flags, expose=False, then=begin)
    if failed and not interrupted:
        raise failed[0]
