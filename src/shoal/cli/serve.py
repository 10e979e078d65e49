"""shoal serve: measure, plan, deploy a model; starts a node first when none runs here."""

import os
import re
import threading
from collections.abc import Callable
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from shoal.cli.connect import URL_HELP, api_key, find_url, local_node
from shoal.cli.deploy import curl_line, deploy_and_wait, have_model, show_plan
from shoal.cli.node_flags import HERE, HereFlags
from shoal.cli.plan_flags import ASK, DEMANDS, AskFlags, DemandFlags, options
from shoal.cli.spread import spread
from shoal.cli.start import Stop, check_start, run
from shoal.client import Shoal
from shoal.client.calls import ServeOptions
from shoal.errors import SettingsError
from shoal.fleet.spec import KEEP_ALIVE_S
from shoal.node.fleet_api import check_name
from shoal.node.running import Running
from shoal.node.settings import read_settings
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import ADAPTIVE, MOST_GUESSES, Speculation

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|)", re.ASCII)
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@spread
def serve(
    model: Annotated[str, typer.Argument(help="A model of this machine (`shoal models`), or a reference to pull.")],
    *,
    name: Annotated[str, typer.Option(help="What clients call it; by default the model's name.")] = "",
    speculate: Annotated[
        str,
        typer.Option(
            help="Tokens guessed ahead and checked in one lap: auto (as many as pay), off, or always up to this many."
        ),
    ] = "auto",
    recovery: Annotated[
        Recovery,
        typer.Option(
            help="How an answer with a seed goes on after a loss: exact (row by row, with the same bits) or fast (in chunks)."
        ),
    ] = Recovery.EXACT,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Load it when somebody asks; unload it when it is idle.")
    ] = False,
    keep_alive: Annotated[
        str,
        typer.Option(
            help="How long it stays idle after --on-demand: 90s, 5m, 2h, or forever (until its memory is needed)."
        ),
    ] = "",
    ask: AskFlags = ASK,
    here: HereFlags = HERE,
    demands: DemandFlags = DEMANDS,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Measure, plan and deploy a model; shows the plan and its prediction before anything is loaded."""
    if name:
        check_name(name)  # a bad one would be refused too, after the plan
    speculation, keep_alive_s = parse_speculation(speculate), parse_keep_alive(keep_alive, on_demand=on_demand)
    console = Console()
    remote = bool(url or os.environ.get("SHOAL_URL"))
    starts = _starts_a_node(here, remote=remote)
    wanted = model if remote else have_model(model, read_settings(), Console(stderr=True))
    if demands.draft and not remote:
        guesses = have_model(demands.draft, read_settings(), Console(stderr=True))
        demands = msgspec.structs.replace(demands, draft=guesses)

    def deploy(shoal: Shoal, where: str) -> None:
        asked = options(ask, demands, shoal.nodes())
        show_plan(shoal, wanted, asked, console)
        told = ServeOptions(
            speculation=speculation, recovery=recovery, on_demand=on_demand, keep_alive_s=keep_alive_s, **asked
        )
        view = deploy_and_wait(shoal, wanted, name, told, console)
        console.print(f"API at {where}/v1; try:")
        console.print(curl_line(where, view.name, view.kind), soft_wrap=True, highlight=False)

    if starts:
        _serve_here(here, deploy)
    else:
        where = find_url(url)
        with Shoal(where, api_key=api_key()) as shoal:
            deploy(shoal, where)


def parse_speculation(text: str) -> Speculation:
    """`auto`, `off` or a number; raises SettingsError."""
    if text == "auto":
        return ADAPTIVE
    if text == "off":
        return Speculation(most=0)
    if text.isdigit() and 0 < int(text) <= MOST_GUESSES:
        return Speculation(most=int(text), adaptive=False)
    raise SettingsError(
        f"--speculate {text} cannot be read", hint=f"say auto, off, or how many tokens: 1 to {MOST_GUESSES}"
    )


def parse_keep_alive(text: str, *, on_demand: bool) -> float | None:
    """Seconds, None for ever; raises SettingsError."""
    if text and not on_demand:
        raise SettingsError(
            "--keep-alive is for models that are loaded on demand", hint="say --on-demand too, or leave it out"
        )
    if text == "forever":
        return None
    found = _SPAN.fullmatch(text or f"{KEEP_ALIVE_S:g}")
    if found is None:
        raise SettingsError(f"--keep-alive {text} cannot be read", hint="say 90s, 5m, 2h or forever")
    return float(found[1]) * _UNITS_S[found[2]]


def _starts_a_node(here: HereFlags, *, remote: bool) -> bool:
    """Whether this command starts a node; raises SettingsError for flags that it could not follow."""
    if not remote and local_node() is None:
        check_start(_flags(here), expose=here.expose)  # before a model is downloaded, not after
        return True
    if here != HERE:
        raise SettingsError(
            "--port, --listen, --expose, --memory, --allow-host and --allow-origin are for a node that this command starts; "
            + ("another one is asked" if remote else "one runs here already"),
            hint="leave them out" if remote else "leave them out, or end that node first: `shoal leave`",
        )
    return False


def _flags(here: HereFlags) -> dict[str, object]:
    """What `shoal up` would be told."""
    return msgspec.structs.asdict(here.node()) | {"http": ("127.0.0.1", here.port), "coordinates": True, "eager": True}


def _serve_here(here: HereFlags, deploy: Callable[[Shoal, str], None]) -> None:
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
    interrupted = run(_flags(here), expose=here.expose, then=begin, terminal_level="warning")
    if failed and not interrupted:
        raise failed[0]
