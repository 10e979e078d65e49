"""Listening: the socket is ours, the HTTP server runs inside our task group.

The socket is bound before anything is started, so that "port in use" is an error of the command and not a line in a log, and so
that port 0 gives a port that can be told to others.  The server installs no signal handlers: whoever cancels the task stops it.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import uvicorn
from anyio.abc import TaskStatus
from litestar import Litestar

from shoal.errors import PortInUseError, SettingsError

_BACKLOG = 512
_MAX_PORT = 65535


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.  Raises PortInUseError, or SettingsError for a host that is not ours."""
    if not 0 <= port <= _MAX_PORT:  # the resolver would take it modulo 65536
        raise SettingsError(f"port {port} is outside [0, {_MAX_PORT}]", param="port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise SettingsError(f"cannot listen on {host!r} port {port}: {error}", param="host") from error
    # asyncio turns Nagle's algorithm off only where the protocol is spelt out; left on, it and the peer's delayed
    # acknowledgements hold the second packet of every answer (its first token) back for 40 ms.
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(error, host, port) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients on this machine reach *listener*: `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: Litestar,
    listener: socket.socket,
    *,
    grace_s: float = 5.0,
    task_status: TaskStatus[str] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on *listener* until cancelled; then running answers get *grace_s* to end.  Reports the URL once it answers."""
    logging.getLogger("uvicorn.error").addFilter(_worth_saying)
    server = _Server(_config(app, grace_s))
    async with anyio.create_task_group() as group:
        group.start_soon(_shielded, server, listener)
        try:
            await server.answering.wait()
            task_status.started(url_of(listener))
            await server.stopped.wait()
        finally:
            server.should_exit = True


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not the traceback of an answer that was cut on purpose, nor a bare line for what a port scanner sent (it was told 400)."""
    cut = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and record.msg != "Invalid HTTP request received."


class _Server(uvicorn.Server):
    """Uvicorn without signal handlers, and with events for what it otherwise only sets flags for."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = anyio.Event()
        self.stopped = anyio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()


async def _shielded(server: _Server, listener: socket.socket) -> None:
    """Cancellation reaches the server as `should_exit`, so that it can end answers in order."""
    try:
        with anyio.CancelScope(shield=True), listener:
            await server.serve(sockets=[listener])
    finally:
        server.answering.set()
        server.stopped.set()


def _config(app: Litestar, grace_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",
        http="h11",
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )


def _refused(error: OSError, host: str, port: int) -> PortInUseError | SettingsError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {port} on {host} is in use",
            hint="another shoal? stop it, or choose another port, or 0 for any free one",
        )
    hint = "ports below 1024 need privileges: choose a higher one" if isinstance(error, PermissionError) else ""
    return SettingsError(f"cannot listen on {host} port {port}: {error}", hint=hint, param="port")
