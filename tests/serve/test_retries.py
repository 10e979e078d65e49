"""A request that is sent again with its key runs once."""

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import httpx
import pytest
from litestar import Litestar
from litestar.testing import TestClient

from shoal.clock import ManualClock
from shoal.errors import KeyReusedError, OverloadedError, ShardLostError, UnavailableError
from shoal.serve.retries import KEEP_S, KEPT, Asked, Recorded, Retries

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

CHAT = "/v1/chat/completions"
HI = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"Idempotency-Key": "k1"}


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, HI), (CHAT, HI | {"stream": True}), ("/v1/responses", {"model": "bytes", "input": "hi"})],
    ids=["whole", "stream", "responses"],
)
def test_the_second_gets_the_first_ones_answer(
    client: TestClient[Litestar], gateway: "Gateway", path: str, body: dict[str, object]
) -> None:
    first, second = (client.post(path, json=body, headers=KEY) for _ in range(2))

    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert first.headers["x-request-id"] == second.headers["x-request-id"]
    assert len(gateway.script.requests) == 1


def test_another_key_or_none_is_another_request(client: TestClient[Litestar], gateway: "Gateway") -> None:
    for headers in (KEY, {"Idempotency-Key": "k2"}, {}, {}):
        client.post(CHAT, json=HI, headers=headers)

    assert len(gateway.script.requests) == 4


def test_another_request_under_a_known_key_is_refused(client: TestClient[Litestar], gateway: "Gateway") -> None:
    client.post(CHAT, json=HI, headers=KEY)
    refused = client.post(CHAT, json=HI | {"max_tokens": 3}, headers=KEY)

    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert len(gateway.script.requests) == 1


def test_a_key_that_is_too_long_is_refused(client: TestClient[Litestar]) -> None:
    assert client.post(CHAT, json=HI, headers={"Idempotency-Key": "k" * 300}).status_code == 400


def test_whoever_asks_while_it_runs_hears_it_from_its_first_byte(http: httpx.Client, gateway: "Gateway") -> None:
    gateway.script.pace_s = 0.05
    bodies: list[bytes] = []

    def ask() -> None:
        bodies.append(http.post(CHAT, json=HI | {"stream": True}, headers=KEY).content)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()

    assert len(set(bodies)) == 1
    assert bodies[0].endswith(b"data: [DONE]\n\n")
    assert len(gateway.script.requests) == 1


def test_an_answer_goes_on_for_its_key_when_its_client_goes(http: httpx.Client, gateway: "Gateway") -> None:
    gateway.script.pace_s = 0.05
    with http.stream("POST", CHAT, json=HI | {"stream": True}, headers=KEY) as leaving:
        next(leaving.iter_bytes())
    again = http.post(CHAT, json=HI | {"stream": True}, headers=KEY)

    assert again.content.endswith(b"data: [DONE]\n\n")
    assert len(gateway.script.requests) == 1


@pytest.mark.parametrize("fails_after", [0, 4], ids=["before its first token", "in the middle"])
def test_what_failed_runs_anew(client: TestClient[Litestar], gateway: "Gateway", fails_after: int) -> None:
    gateway.script.failure, gateway.script.fails_after = ShardLostError("a worker died"), fails_after
    failed = client.post(CHAT, json=HI | {"stream": True}, headers=KEY)
    gateway.script.failure = None
    again = client.post(CHAT, json=HI | {"stream": True}, headers=KEY)

    assert b"a worker died" in failed.content
    assert again.status_code == 200
    assert again.content.endswith(b"data: [DONE]\n\n")
    assert len(gateway.script.requests) == 2


def asked(key: str, fingerprint: bytes = b"f") -> Asked:
    return Asked(path="/", credentials="Bearer x", key=key, fingerprint=fingerprint)


def test_an_answer_that_is_cancelled_with_its_gateway_is_no_whole_answer() -> None:
    async def all_of_it() -> None:
        async def run(recorded: Recorded) -> None:
            recorded.add(b"x")
            await anyio.sleep_forever()

        recorded = Retries(ManualClock()).find(asked("a"), (), run)
        heard = recorded.heard()
        assert await anext(heard) == b"x"
        assert recorded.task is not None
        recorded.task.cancel()
        with pytest.raises(UnavailableError, match="stopping"):
            await anext(heard)

    anyio.run(all_of_it)


def test_old_answers_and_too_many_are_forgotten() -> None:
    clock = ManualClock()
    retries = Retries(clock)
    runs: list[str] = []

    async def ask(key: str, fingerprint: bytes = b"f") -> None:
        async def run(recorded: Recorded) -> None:
            runs.append(key)
            recorded.add(b"x")

        recorded = retries.find(asked(key, fingerprint), (), run)
        assert b"".join([part async for part in recorded.heard()]) == b"x"

    async def all_of_it() -> None:
        await ask("a")
        await ask("a")
        with pytest.raises(KeyReusedError):
            await ask("a", b"g")
        clock.advance(KEEP_S + 1)
        await ask("a", b"g")
        for n in range(KEPT + 1):
            await ask(f"n{n}")
        await ask("n0")

    anyio.run(all_of_it)
    assert runs.count("a") == 2
    assert runs.count("n0") == 2


def test_an_error_reaches_everybody_who_listens() -> None:
    async def all_of_it() -> int:
        retries, errors = Retries(ManualClock()), []

        async def run(recorded: Recorded) -> None:
            await anyio.lowlevel.checkpoint()
            raise OverloadedError("the queue is full")

        async def ask() -> None:
            try:
                async for _ in retries.find(asked("a"), (), run).heard():
                    pass
            except OverloadedError as error:
                errors.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(ask)
        return len(errors)

    assert anyio.run(all_of_it) == 2
