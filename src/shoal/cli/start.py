"""Starting a node from flags, and running it until a signal ends it (`up`, `join` and `serve` share this)."""

import asyncio
import contextlib
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import anyio
import typer
from anyio.abc import TaskStatus

from shoal.cli.addresses import check_free
from shoal.errors import SettingsError, ShoalError
from shoal.node.assemble import run_node
from shoal.node.options import NodeOptions, check_exposed, check_reachable, host_name, locator, parse_link, web_origin
from shoal.node.running import Running
from shoal.node.settings import read_settings
from shoal.observe.log import LogStyle, set_up_logs
from shoal.profile.fleet import Declared

_SIZE = re.compile(r"^(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B|B)?$", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


Stop = Callable[[], None]
"""Ends the node; may be called from any thread, and when it has ended."""


def run(
    flags: Mapping[str, Any],
    *,
    expose: bool,
    then: Callable[[Running, Stop], None] = lambda *_: None,
    terminal_level: str = "info",
) -> bool:
    """Start a node with *flags* and stay until it ends; *then* is called once it runs.  True when a signal ended it.

    *terminal_level* is what its log says on a terminal; elsewhere it says warnings.  Raises ShoalError as `run_node` does.
    """
    signalled = anyio.Event()
    options = check_start(flags, expose=expose)
    warnings = (
        check_exposed(options.listen, expose=expose),
        check_reachable(options.connect, options.listen),
    )
    for warning in filter(None, warnings):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    log = set_up_logs(sys.stderr, LogStyle.CONSOLE, terminal_level if sys.stderr.isatty() else "warning")

    def started(stop: Stop, running: Running) -> None:
        where = f"; API at {running.url}/v1" if running.url else ""
        typer.echo(f"node {running.name} ({running.node}) listens at {', '.join(running.locators)}{where}")
        sys.stdout.flush()
        then(running, stop)

    async def until_signal() -> None:
        async with anyio.create_task_group() as group:
            stop = partial(_call_soon, asyncio.get_running_loop(), group.cancel_scope.cancel)
            await group.start(partial(_cancel_on_signal, group.cancel_scope, signalled))
            await run_node(options, log, partial(started, stop))
            group.cancel_scope.cancel()

    try:
        anyio.run(until_signal)
    except BaseExceptionGroup as several:
        raise _first_of_ours(several) from several
    return signalled.is_set()


def check_start(flags: Mapping[str, Any], *, expose: bool) -> NodeOptions:
    """The options of a node that *flags* may start; raises SettingsError, or PortInUseError with the flag to give."""
    options = options_from(flags)
    check_exposed(options.listen, expose=expose)
    check_free(options, http_flag="--gateway" if flags.get("gateway") else "--port")
    return options


def options_from(flags: Mapping[str, Any]) -> NodeOptions:
    """Flags over settings, checked; raises SettingsError."""
    settings = read_settings()
    http = flags.get("http")
    if flags.get("gateway"):
        host, _, port = locator(flags["gateway"], what="--gateway").removeprefix("tcp/").rpartition(":")
        http = (host.strip("[]"), int(port))
    return NodeOptions(
        home=settings.home,
        name=flags["name"] or socket.gethostname(),
        listen=locator(flags["listen"], what="--listen"),
        connect=tuple(locator(text, what="ADDRESS") for text in flags.get("connect", ())),
        http=http,
        api_keys=flags["api_keys"],
        allow_hosts=tuple(host_name(text) for text in flags.get("allow_hosts") or ()),
        allow_origins=tuple(web_origin(text) for text in flags.get("allow_origins") or ()),
        quota_bytes=settings.quota_bytes,
        fetch_bytes_per_s=settings.fetch_bytes_per_s,
        move_dwell_s=settings.move_dwell_s,
        memory_bytes=_budget_bytes(flags["memory"]),
        threads=flags["threads"],
        coordinates=bool(flags.get("coordinates")),
        eager=bool(flags.get("eager")),
        discover=flags["discover"],
        slowdown=flags["slowdown"],
        declared=declared_from(flags),
        links=tuple(parse_link(text) for text in flags["links"] or ()),
    )


def _budget_bytes(text: str) -> int:
    """What models may use; 0 where nothing is said, which means all that is free: a budget of 0 must not mean the same."""
    budget = parse_size(text) if text else 0
    if text and not budget:
        raise SettingsError(
            f"--memory {text} leaves nothing for models",
            hint="write 800MB or 2GiB; or leave it out, for all that is free",
            param="memory",
        )
    return budget


def declared_from(flags: Mapping[str, Any]) -> Declared:
    """What the owner says of the node; commands without these flags say nothing."""
    return Declared(
        watts=flags.get("watts", 0.0),
        price_per_hour=flags.get("price_per_hour", 0.0),
        joules_per_byte=flags.get("joules_per_mb", 0.0) / 1e6,
        region=flags.get("region", ""),
        trust=flags.get("trust", ""),
    )


def parse_size(text: str) -> int:
    """Bytes of `800MB`, `2GiB` or a plain number; raises SettingsError."""
    found = _SIZE.match(text.strip())
    if found is None:
        raise SettingsError(f"{text!r} is no size", hint="write 800MB, 2GiB or a number of bytes", param="memory")
    return int(float(found["number"]) * _UNITS[(found["unit"] or "").lower()])


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: what was to end has ended
        loop.call_soon_threadsafe(call)


async def _cancel_on_signal(scope: anyio.CancelScope, signalled: anyio.Event, *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            signalled.set()
            scope.cancel()
            return


def _first_of_ours(several: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to show: one of our tree if there is one, else the first."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [several]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
        else:
            flat.append(error)
    return next((error for error in flat if isinstance(error, ShoalError)), flat[0])
