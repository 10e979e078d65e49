"""Every endpoint and every error, as the official OpenAI client understands it: class, status, code, and a next step."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from shoal.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InfeasibleError,
    InvalidRequestError,
    KeyReusedError,
    OverloadedError,
    RequestTooLargeError,
    ShardLostError,
    ShoalError,
    UnavailableError,
    UntrustedError,
)
from shoal.serve.ports import Limits

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

HI = [{"role": "user", "content": "hi"}]
TEXT, VECTORS = "bytes", "org/minilm"
Ask = Callable[..., object]


def chat(api: openai.OpenAI, model: str = TEXT, **more: object) -> object:
    return api.chat.completions.create(model=model, messages=HI, **more)


def chat_stream(api: openai.OpenAI, model: str = TEXT, **more: object) -> object:
    return list(api.chat.completions.create(model=model, messages=HI, stream=True, **more))


def completion(api: openai.OpenAI, model: str = TEXT, **more: object) -> object:
    return api.completions.create(model=model, prompt="x", **more)


def completion_stream(api: openai.OpenAI, model: str = TEXT, **more: object) -> object:
    return list(api.completions.create(model=model, prompt="x", stream=True, **more))


def response(api: openai.OpenAI, model: str = TEXT, **more: object) -> object:
    return api.responses.create(model=model, input="hi", **more)


def response_stream(api: openai.OpenAI, model: str = TEXT, **more: object) -> object:
    return list(api.responses.create(model=model, input="hi", stream=True, **more))


def embedding(api: openai.OpenAI, model: str = VECTORS, **more: object) -> object:
    return api.embeddings.create(model=model, input="hi", **more)


ANSWERS: tuple[Ask, ...] = (chat, chat_stream, completion, completion_stream, response, response_stream)
ALL: tuple[Ask, ...] = (*ANSWERS, embedding)

FAILURES = [
    (InvalidRequestError("no", param="temperature"), openai.BadRequestError, 400, "invalid_request"),
    (ContextLengthError("9 of 8"), openai.BadRequestError, 400, "context_length_exceeded"),
    (InfeasibleError("3 MB are missing"), openai.ConflictError, 409, "no_plan_fits"),
    (RequestTooLargeError("9 of 8 bytes"), openai.APIStatusError, 413, "request_too_large"),
    (KeyReusedError("another request had it"), openai.UnprocessableEntityError, 422, "idempotency_key_reused"),
    (OverloadedError("full", retry_after_s=3), openai.RateLimitError, 429, "overloaded"),
    (ShoalError("the engine failed"), openai.InternalServerError, 500, "internal_error"),
    (UntrustedError("a frame lies"), openai.InternalServerError, 502, "untrusted"),
    (UnavailableError("loading", retry_after_s=2), openai.InternalServerError, 503, "unavailable"),
    (ShardLostError("stage 1 is gone"), openai.InternalServerError, 503, "shard_lost"),
    (DeadlineExceededError("took 9 s"), openai.InternalServerError, 504, "deadline_exceeded"),
]


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def named(ask: Ask) -> str:
    return ask.__name__


@pytest.mark.parametrize("ask", ALL, ids=named)
def test_a_failure_before_the_first_token_is_the_clients_own_error(
    api: openai.OpenAI, gateway: "Gateway", ask: Ask
) -> None:
    for failure, kind, status, code in FAILURES:
        gateway.script.failure = failure

        with pytest.raises(kind) as caught:
            ask(api)

        error = caught.value
        assert isinstance(error, openai.APIStatusError)
        assert (error.status_code, error.code) == (status, code), failure
        assert failure.message in error.message
        assert error.body["hint"], "what to do next"
        if isinstance(failure, UnavailableError) and failure.retry_after_s:
            assert float(error.response.headers["retry-after"]) == failure.retry_after_s


@pytest.mark.parametrize("ask", ALL, ids=named)
def test_a_model_that_is_not_there(api: openai.OpenAI, ask: Ask) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(api, model="gpt-9")

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_that_is_looked_up_and_not_there(api: openai.OpenAI) -> None:
    assert api.models.retrieve(TEXT).id == TEXT
    assert {model.id for model in api.models.list()} == {TEXT, VECTORS}
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("gpt-9")

    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("ask", ALL, ids=named)
def test_a_wrong_kind_of_model(api: openai.OpenAI, ask: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, model=TEXT if ask is embedding else VECTORS)

    assert caught.value.param == "model"


@pytest.mark.parametrize("ask", ALL, ids=named)
def test_a_field_that_nobody_knows(api: openai.OpenAI, ask: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, extra_body={"temprature": 1})

    assert "temprature" in caught.value.message


@pytest.mark.parametrize("ask", ALL, ids=named)
def test_a_body_that_is_too_long(api: openai.OpenAI, ask: Ask) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(api, extra_body={"user": "x" * 2 * Limits().body_bytes})

    assert caught.value.status_code == 413


@pytest.mark.parametrize("ask", [chat, completion, response, embedding], ids=named)
def test_a_text_that_does_not_fit_the_context_says_the_numbers(api: openai.OpenAI, ask: Ask) -> None:
    long = "x" * 5000
    given = {chat: {"messages": [{"role": "user", "content": long}]}, completion: {"prompt": long}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, extra_body=given.get(ask, {"input": long}))

    assert caught.value.code == "context_length_exceeded"
    assert ("64" if ask is embedding else "512") in caught.value.message


@pytest.mark.parametrize("ask", [chat_stream, completion_stream, response_stream], ids=named)
def test_a_failure_in_the_middle_of_a_stream(api: openai.OpenAI, gateway: "Gateway", ask: Ask) -> None:
    gateway.script.fails_after, gateway.script.failure = 5, ShardLostError("stage 1 is gone")

    with pytest.raises(openai.APIError, match="stage 1 is gone") as caught:
        ask(api)

    assert caught.value.code == "shard_lost"


def test_a_client_that_does_not_wait_gets_its_own_timeout_and_the_answer_is_cancelled(
    url: str, gateway: "Gateway"
) -> None:
    gateway.script.reply, gateway.script.pace_s = "Hello" * 100, 0.05
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.3) as api,
        pytest.raises(openai.APITimeoutError),
    ):
        chat(api)

    with httpx.Client() as client:  # the gateway goes on
        assert client.get(f"{url}/v1/models").status_code == 200


def test_a_gateway_that_is_not_there(gateway: "Gateway") -> None:
    with (
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as api,
        pytest.raises(openai.APIConnectionError),
    ):
        chat(api)
