"""Who may call: keys, host names, origins."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from shoal.errors import InvalidRequestError, SettingsError, UnauthorizedError
from shoal.serve.access import Access, access_for, check_caller, check_key, digest_key, is_loopback, read_keys

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

KEY = "a-key-of-some-length"
KEYS = frozenset({digest_key(KEY), digest_key("another-key-of-ours")})


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("192.168.1.5", False), ("example.org", False)],
)  # fmt: skip
def test_only_loopback_is_private(host: str, allowed: bool) -> None:
    assert is_loopback(host) is allowed


def test_beyond_loopback_a_key_is_demanded_and_the_error_says_how_to_make_one() -> None:
    with pytest.raises(SettingsError) as caught:
        access_for("0.0.0.0", frozenset())

    assert "secrets" in caught.value.hint
    assert caught.value.param == "api_keys"
    assert access_for("0.0.0.0", KEYS).keys == KEYS


def test_on_loopback_keys_are_optional_and_demanded_when_given() -> None:
    check_key(access_for("127.0.0.1", frozenset()), None)
    with pytest.raises(UnauthorizedError):
        check_key(access_for("127.0.0.1", KEYS), None)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Bearer \xff"],
)
def test_anything_but_a_known_key_is_refused(header: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        check_key(Access(keys=KEYS), header)


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer  {KEY} ", "Bearer another-key-of-ours"])
def test_each_known_key_is_taken(header: str) -> None:
    check_key(Access(keys=KEYS), header)
    with pytest.raises(UnauthorizedError):  # where the door knows another one
        check_key(Access(keys=frozenset({digest_key("a-third-key-of-ours")})), header)


def test_a_key_file_has_one_key_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{KEY}\n  another-key-of-ours  \n")

    assert read_keys(path) == KEYS


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n"])
def test_a_key_file_without_a_usable_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)

    with pytest.raises(SettingsError):
        read_keys(path)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing-here"):
        read_keys(tmp_path / "nothing-here")


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "LOCALHOST"])
def test_loopback_names_reach_a_loopback_gateway(host: str) -> None:
    check_caller(Access(), host, None)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.nip.io", "[::2]"]
)
def test_other_names_do_not(host: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_caller(Access(), host, None)
    assert "--allow-host" in caught.value.hint


def test_further_names_can_be_configured() -> None:
    access = access_for("127.0.0.1", frozenset(), names=("Box.local",))

    check_caller(access, "box.local:8000", None)
    check_caller(access, "localhost", None)
    with pytest.raises(InvalidRequestError):
        check_caller(access, "other.local", None)


def test_beyond_loopback_any_name_reaches_it_unless_names_are_given() -> None:
    check_caller(access_for("0.0.0.0", KEYS), "anything", None)
    with pytest.raises(InvalidRequestError):
        check_caller(access_for("0.0.0.0", KEYS, names=("box",)), "anything", None)


def test_a_page_of_another_origin_may_not_call() -> None:
    check_caller(Access(), "localhost:8000", "http://localhost:8000")
    for origin in ("https://evil.example", "null", "http://localhost:9000"):
        with pytest.raises(InvalidRequestError) as caught:
            check_caller(Access(), "localhost:8000", origin)
        assert f"--allow-origin {origin}" in caught.value.hint
    check_caller(Access(origins=frozenset({"https://ours.example"})), "localhost", "https://ours.example")


OPEN = ["/livez", "/readyz", "/schema", "/schema/openapi.json"]
CLOSED = [
    "/healthz",
    "/metrics",
    "/v1/models",
    "/v1/models/bytes",
    "/shoal/v1/nodes",
    "/shoal/v1/events",
    "/shoal/v1/join",
]


def test_a_keyed_gateway_answers_nothing_but_probes_and_its_schema_to_strangers(gateway: "Gateway") -> None:
    gateway.access = Access(keys=KEYS)
    client = gateway.client()

    assert {path: client.get(path).status_code for path in OPEN} == dict.fromkeys(OPEN, 200)
    assert {path: client.get(path).status_code for path in CLOSED} == dict.fromkeys(CLOSED, 401)
    assert client.post("/v1/chat/completions", content=b"garbage").status_code == 401
    assert client.delete("/shoal/v1/deployments/x").status_code == 401
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert {path: client.get(path, headers=bearer).status_code for path in CLOSED} == dict.fromkeys(CLOSED, 200)


def test_the_401_names_the_scheme(gateway: "Gateway") -> None:
    gateway.access = Access(keys=KEYS)

    answer = gateway.client().get("/v1/models")

    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_foreign_names_and_origins_are_refused_by_every_route(client: TestClient[Litestar], gateway: "Gateway") -> None:
    assert client.get("/livez", headers={"Host": "evil.example"}).status_code == 400
    assert (
        client.post("/shoal/v1/deployments", headers={"Origin": "null"}, json={"plan": {"model": "x"}}).status_code
        == 400
    )
    assert gateway.fleet.views == {}


def test_no_cross_origin_header_is_sent_unless_configured(client: TestClient[Litestar], gateway: "Gateway") -> None:
    assert "access-control-allow-origin" not in client.get("/livez").headers
    gateway.access = Access(origins=frozenset({"https://ours.example"}))

    told = gateway.client().get("/livez", headers={"Origin": "https://ours.example"})

    assert told.headers["access-control-allow-origin"] == "https://ours.example"
