"""Sockets: binding, callers who vanish, bodies that are too big, stopping in order."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from shoal.client import Shoal
from shoal.errors import NodeUnreachableError, PortInUseError, SettingsError
from shoal.serve.run import bind, serve, url_of

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

STREAM = {"model": "bytes", "prompt": "hi", "max_tokens": 500, "stream": True}


def until(true: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Wait for another thread; the limit only ends a test that would fail anyway."""
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def head(method: str, path: str, length: int) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


def test_any_free_port_is_taken_for_port_zero() -> None:
    with bind("127.0.0.1", 0) as one, bind("127.0.0.1", 0) as other:
        assert one.getsockname()[1] != other.getsockname()[1] != 0
        assert url_of(one) == f"http://127.0.0.1:{one.getsockname()[1]}"


def test_connections_will_not_hold_small_packets_back() -> None:
    """Asyncio sets TCP_NODELAY on connections whose listener names its protocol, and on no others."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_taken_port_is_named_with_a_way_out() -> None:
    with bind("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        with pytest.raises(PortInUseError) as caught:
            bind("127.0.0.1", port)

    assert str(port) in caught.value.message
    assert "choose another port" in caught.value.hint


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70_000), ("", -1)])
def test_an_address_that_is_not_ours_is_a_setting_to_change(host: str, port: int) -> None:
    with pytest.raises(SettingsError):
        bind(host, port)


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_vanishes_cancels_the_request_at_once(url: str, gateway: "Gateway", stream: bool) -> None:
    gateway.script.reply, gateway.script.pace_s = "Hello, world! " * 40, 0.02
    body = json.dumps(STREAM | {"stream": stream}).encode()
    with connect(url) as caller:
        caller.sendall(head("POST", "/v1/completions", len(body)) + body)
        if stream:
            assert b"200" in caller.recv(100)
        assert until(lambda: gateway.script.running == 1)

    assert until(lambda: gateway.script.running == 0)
    assert gateway.script.closed == [gateway.script.requests[0].request]
    assert until(lambda: bool(gateway.fleet.outcomes))
    assert gateway.fleet.outcomes[0][1] == "cancelled"


def test_a_body_that_is_announced_too_big_is_refused_unread(url: str) -> None:
    with connect(url) as caller:
        caller.sendall(head("POST", "/v1/completions", 10_000_000))
        answer = b""
        while b"request_too_large" not in answer:
            part = caller.recv(10_000)
            assert part, answer
            answer += part

    assert answer.startswith(b"HTTP/1.1 413")


def test_ten_megabytes_are_answered_with_413(url: str) -> None:
    body = b'{"model": "bytes", "prompt": "' + b"x" * 10_000_000 + b'"}'

    assert httpx.post(f"{url}/v1/completions", content=body).status_code == 413


def test_ten_megabytes_without_announcement_are_answered_with_413(url: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(160):
            yield b"x" * 65536

    assert httpx.post(f"{url}/v1/completions", content=chunks()).status_code == 413


def test_other_requests_are_answered_after_a_refused_one(url: str) -> None:
    httpx.post(f"{url}/v1/completions", content=b"x" * 10_000_000)

    assert httpx.get(f"{url}/livez").json() == {"live": True}


def test_tls_to_a_plain_gateway_is_told_so(url: str) -> None:
    with Shoal(url.replace("http:", "https:")) as shoal, pytest.raises(NodeUnreachableError) as refused:
        shoal.nodes()

    assert "plain HTTP" in refused.value.hint


def test_garbage_instead_of_http_does_not_disturb_others(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(url) as caller:
        caller.sendall(b"\x16\x03\x01\x02\x00garbage\r\n\r\n")
        assert b"400" in caller.recv(1000)

    assert httpx.get(f"{url}/livez").status_code == 200
    assert "Invalid HTTP request" not in caplog.text


def test_stopping_waits_for_a_running_answer_and_frees_the_port(gateway: "Gateway") -> None:
    gateway.script.reply = "x" * 400
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    lines: list[str] = []

    async def read(url: str, begun: anyio.Event) -> None:
        async with httpx.AsyncClient() as client, client.stream("POST", f"{url}/v1/completions", json=STREAM) as answer:
            async for line in answer.aiter_lines():
                lines.append(line)
                begun.set()

    async def begin_and_stop() -> None:
        async with anyio.create_task_group() as outer:
            async with anyio.create_task_group() as serving:
                url = await serving.start(partial(serve, gateway.app(), listener, grace_s=10.0))
                begun = anyio.Event()
                outer.start_soon(read, url, begun)
                await begun.wait()
                serving.cancel_scope.cancel()
            assert gateway.script.running == 0

    anyio.run(begin_and_stop)

    assert [line for line in lines if line][-1] == "data: [DONE]"
    with contextlib.closing(bind("127.0.0.1", port)):
        pass


def test_stopping_cuts_a_call_that_outlasts_the_grace_without_a_traceback(
    gateway: "Gateway", caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: object) -> None:
        begun.set()
        await anyio.sleep_forever()
        raise AssertionError

    begun = threading.Event()
    monkeypatch.setattr(gateway.fleet, "plan", never)
    with start_blocking_portal() as portal, ThreadPoolExecutor(1) as pool:
        running, url = portal.start_task(partial(serve, gateway.app(), bind("127.0.0.1", 0), grace_s=0.1))
        asked = pool.submit(httpx.post, f"{url}/shoal/v1/plan", json={"model": "m"})
        assert begun.wait(10)
        running.cancel()
        with contextlib.suppress(httpx.TransportError):
            asked.result(timeout=20)

    assert "shutdown exceeded" in caplog.text
    assert "Traceback" not in caplog.text


def test_stopping_cuts_an_answer_that_outlasts_the_grace(gateway: "Gateway") -> None:
    gateway.script.reply, gateway.script.pace_s = "Hello, world! " * 40, 0.02
    with start_blocking_portal() as portal:
        running, url = portal.start_task(partial(serve, gateway.app(), bind("127.0.0.1", 0), grace_s=0.1))
        with httpx.stream("POST", f"{url}/v1/completions", json=STREAM | {"max_tokens": 500}) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.cancel()
            with contextlib.suppress(httpx.TransportError):
                list(lines)

    assert gateway.script.running == 0
