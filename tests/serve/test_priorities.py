"""Whose answer is wanted first, and until when: from the API's words to requests, and back as refusals."""

from typing import TYPE_CHECKING

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from shoal.errors import DeadlineExceededError, OverloadedError, ShoalError
from shoal.ids import RequestId
from shoal.runtime.executor.failure import failure_of
from shoal.runtime.request import FinishReason, OutputDelta, Priority

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def body(path: str, **extra: object) -> dict[str, object]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": "bytes", "max_tokens": 100} | asked | extra


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("asked", "priority"),
    [
        ({}, Priority.INTERACTIVE),
        ({"service_tier": "auto"}, Priority.INTERACTIVE),
        ({"service_tier": "flex"}, Priority.BATCH),
        ({"priority": "batch"}, Priority.BATCH),
        ({"priority": "interactive", "service_tier": "flex"}, Priority.INTERACTIVE),
    ],
)
def test_flex_and_batch_are_work_that_nobody_waits_for(
    client: TestClient[Litestar], gateway: "Gateway", path: str, asked: dict[str, object], priority: Priority
) -> None:
    assert client.post(path, json=body(path, **asked)).status_code == 200

    assert gateway.script.requests[0].priority is priority


@pytest.mark.parametrize("asked", [{"priority": "high"}, {"service_tier": "turbo"}, {"timeout_s": 0}])
def test_what_is_no_priority_or_time_is_refused_by_name(client: TestClient[Litestar], asked: dict[str, object]) -> None:
    answer = client.post(CHAT, json=body(CHAT, **asked))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(asked))


def test_a_request_carries_what_is_left_of_its_time(client: TestClient[Litestar], gateway: "Gateway") -> None:
    client.post(TEXT, json=body(TEXT, timeout_s=30, n=2))

    left_s = [r.deadline_s for r in gateway.script.requests]
    assert all(left is not None and 0 < left <= 30 for left in left_s)


def test_the_gateway_ends_an_answer_that_no_pipeline_ends(
    client: TestClient[Litestar], gateway: "Gateway", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.serve.answer.GRACE_S", 0.0)
    gateway.script.reply, gateway.script.pace_s = "Hello, world! " * 40, 0.02

    answer = client.post(TEXT, json=body(TEXT, timeout_s=0.05))

    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert gateway.script.running == 0


@pytest.mark.parametrize("code", ["overloaded", "deadline_exceeded"])
def test_the_time_to_come_again_reaches_the_header(client: TestClient[Litestar], gateway: "Gateway", code: str) -> None:
    refused = OutputDelta(
        request=RequestId(""), finish=FinishReason.ERROR, error_code=code, error="later", retry_after_s=41.2
    )
    gateway.script.last_words = (refused,)

    answer = client.post(TEXT, json=body(TEXT))

    assert answer.headers["retry-after"] == "42"


@pytest.mark.parametrize("kind", [OverloadedError, DeadlineExceededError])
def test_an_error_from_the_pipeline_keeps_its_delay(kind: type[ShoalError]) -> None:
    error = failure_of(kind.code, "later\nhint: wait", 12.5)

    assert type(error) is kind
    assert (error.message, error.hint, getattr(error, "retry_after_s", None)) == ("later", "wait", 12.5)


def test_an_error_that_is_the_callers_has_no_delay() -> None:
    assert failure_of("invalid_request", "no", 3.0).message == "no"
