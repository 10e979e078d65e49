"""The SDK without a gateway: what is sent, and how answers and failures are read."""

import httpx
import pytest

from shoal.client import AsyncShoal, Shoal, calls
from shoal.client.calls import gateway_url, read_event, read_events
from shoal.errors import (
    MalformedFrameError,
    NodeUnreachableError,
    OverloadedError,
    SettingsError,
    ShardLostError,
    ShoalError,
    UnavailableError,
)
from shoal.fleet.views import EventView


def shoal_behind(status: int, content: bytes, headers: dict[str, str] | None = None) -> Shoal:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content, headers=headers))
    return Shoal("http://box:8000", transport=transport)


def test_key_and_names_travel_as_they_should() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(204)

    with Shoal("http://box:8000", api_key="k", transport=httpx.MockTransport(answer)) as shoal:
        shoal.stop("org/model name")
        shoal.leave("a/b")

    assert seen[0].headers["authorization"] == "Bearer k"
    assert seen[0].url.raw_path == b"/shoal/v1/deployments/org/model%20name"
    assert seen[1].url.raw_path == b"/shoal/v1/nodes/a%2Fb/leave"


def test_retry_after_is_read_from_the_header_too() -> None:
    body = b'{"error": {"message": "full", "type": "rate_limit_error", "code": "overloaded"}}'

    with shoal_behind(429, body, {"Retry-After": "7"}) as shoal, pytest.raises(OverloadedError) as caught:
        shoal.nodes()

    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("status", [200, 302, 404])
def test_something_that_is_no_gateway_is_named_as_such(status: int) -> None:
    with (
        shoal_behind(status, b"<html>a router's login page</html>") as shoal,
        pytest.raises(MalformedFrameError, match="no answer of Shoal"),
    ):
        shoal.nodes()


def test_a_proxys_bad_gateway_means_later() -> None:
    with shoal_behind(502, b"<html>") as shoal, pytest.raises(UnavailableError):
        shoal.nodes()


def test_fields_of_a_newer_gateway_are_ignored() -> None:
    body = b'[{"id": "n", "name": "pi", "standing": "alive", "colour": "red"}]'

    with shoal_behind(200, body) as shoal:
        assert shoal.nodes()[0].name == "pi"


def test_a_connection_that_breaks_is_unreachable() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    with Shoal(transport=httpx.MockTransport(broken)) as shoal:
        with pytest.raises(NodeUnreachableError):
            shoal.nodes()
        with pytest.raises(NodeUnreachableError):
            list(shoal.follow())


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8400",
        "127.0.0.1:8400",
        "http://",
        "http://h:port",
        "http://h:99999",
        "http://[::1",
        "http://a b",
        "ftp://h",
        "",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_asked(url: str) -> None:
    for client in (Shoal, AsyncShoal):
        with pytest.raises(SettingsError) as refused:
            client(url)

        assert repr(url) in refused.value.message
        assert "http://HOST:PORT" in refused.value.hint


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_address_that_openais_clients_want_is_understood(url: str) -> None:
    assert gateway_url(url) == "http://h:1"


def test_a_redirect_without_end_is_unreachable_too() -> None:
    def circling(_: httpx.Request) -> httpx.Response:
        raise httpx.TooManyRedirects("20 times")

    with Shoal(transport=httpx.MockTransport(circling)) as shoal, pytest.raises(NodeUnreachableError):
        shoal.nodes()


def test_a_stream_is_read_line_by_line() -> None:
    lines = [": open", "", 'data: {"sequence": 1, "kind": "x"}', "", ": quiet", 'data: {"sequence": 2, "kind": "y"}']

    assert list(read_events(lines)) == [EventView(sequence=1, kind="x"), EventView(sequence=2, kind="y")]


def test_an_error_event_ends_a_stream_with_that_error() -> None:
    with pytest.raises(ShardLostError):
        read_event('data: {"error": {"message": "gone", "code": "shard_lost"}}')


def test_a_refused_stream_raises_what_the_gateway_says() -> None:
    body = b'{"error": {"message": "no", "type": "server_error", "code": "internal_error"}}'

    with shoal_behind(500, body) as shoal, pytest.raises(ShoalError, match="no"):
        list(shoal.follow())


def test_slow_calls_have_no_read_timeout_and_quick_ones_have() -> None:
    assert calls.deploy("m", "", {}).slow
    assert not calls.list_nodes().slow
