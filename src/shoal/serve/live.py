"""HTTP answers that are produced while the caller is watched: JSON at the end, or server-sent events as they come."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
from litestar.types import Message, Receive, Scope, Send

from shoal.serve.answer import first_error
from shoal.serve.errors import encode_fault, fault_of, record
from shoal.serve.retries import Asked, Headers, Recorded, Retries

JSON: Headers = ((b"content-type", b"application/json"),)
# A proxy that buffers (nginx does by default) would hold tokens back.
EVENTS: Headers = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no"))  # fmt: skip
DONE = b"data: [DONE]\n\n"


class Connection:
    """One answer on its way: the head goes out with the first bytes, so that an error before them keeps its status code."""

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send = send
        self._headers = headers
        self._lock = anyio.Lock()
        self.started = False

    async def write(self, content: bytes, *, more: bool) -> None:
        """Send a part of the body; parts of several tasks do not mix."""
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(self._headers)})
            await self._send({"type": "http.response.body", "body": content, "more_body": more})

    async def event(self, data: bytes) -> None:
        """Send one server-sent event; *data* is JSON, so it has no line breaks."""
        await self.write(b"data: " + data + b"\n\n", more=True)


@dataclass(frozen=True, slots=True)
class Once:
    """What was asked, for whoever asks it again: *fingerprint* stands for the request's body."""

    retries: Retries
    fingerprint: bytes


class LiveAnswer:
    """An ASGI application for one response: runs *work* until it ends or the caller goes, whichever is first.

    With an `Idempotency-Key`, and *once*, it runs until it ends.
    """

    def __init__(
        self, work: Callable[[Connection], Awaitable[None]], headers: Headers, once: Once | None = None
    ) -> None:
        self._work = work
        self._headers = headers
        self._once = once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _header(scope, b"idempotency-key")
        if self._once is not None and key is not None:
            await self._follow(self._once, key, scope, receive, send)
            return
        connection = Connection(send, self._headers)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                await self._work(connection)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            await _raise_or_break_off(connection, first_error(errors), str(scope.get("path", "")))

    async def _follow(self, once: Once, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Hear the answer of that key, from its first byte; it goes on when the caller goes."""
        path = str(scope.get("path", ""))

        async def run(recorded: Recorded) -> None:
            async def note(message: Message) -> None:
                if message["type"] == "http.response.body":
                    recorded.add(message["body"])

            connection = Connection(note, self._headers)
            try:
                await self._work(connection)
            except Exception as error:
                if not connection.started:
                    raise
                recorded.broken = True
                await _break_off(connection, error, path)

        asked = Asked(
            path=path,
            credentials=_header(scope, b"authorization") or "",
            key=key,
            fingerprint=once.fingerprint,
        )
        recorded = once.retries.find(asked, self._headers, run)
        connection = Connection(send, recorded.headers)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                async for part in recorded.heard():
                    await connection.write(part, more=True)
                await connection.write(b"", more=False)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            await _raise_or_break_off(connection, first_error(errors), path)


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key == name), None)


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _raise_or_break_off(connection: Connection, error: BaseException, path: str) -> None:
    """An error before the first byte keeps its status code; one behind it is the stream's last event."""
    if not connection.started or not isinstance(error, Exception):
        raise error from None
    await _break_off(connection, error, path)


async def _break_off(connection: Connection, error: Exception, path: str) -> None:
    """End a stream that has begun with an error event, and without the `[DONE]` of complete ones."""
    status, fault = fault_of(error)
    if status == 500:
        record(error, path)
    await connection.event(encode_fault(fault))
    await connection.write(b"", more=False)
