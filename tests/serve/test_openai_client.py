"""The official OpenAI client is the oracle: it must read every answer, over a real socket."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import openai
import pytest
from anyio.from_thread import start_blocking_portal

from shoal.errors import OverloadedError, ShardLostError
from shoal.serve.access import Access, digest_key
from shoal.serve.run import bind, serve

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_chat(api: openai.OpenAI, gateway: "Gateway") -> None:
    answer = api.chat.completions.create(model="bytes", messages=HI)

    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 12)
    assert answer._request_id == answer.id


def test_a_streamed_chat_with_usage(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="bytes", messages=HI, stream=True, stream_options={"include_usage": True}, max_tokens=5
    )

    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 5


def test_the_clients_own_stream_helper(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(model="bytes", messages=HI) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.content == "Hello, world"


def test_chat_logprobs(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="bytes", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2)

    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("H", -0.5, [72])
    assert [t.token for t in first.top_logprobs] == ["H", "I"]


def test_several_choices_streamed(api: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for chunk in api.chat.completions.create(model="bytes", messages=HI, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    assert texts == ["Hello, world"] * 3


def test_a_completion_and_its_stream(api: openai.OpenAI) -> None:
    whole = api.completions.create(model="bytes", prompt="x", stop=", w", logprobs=1)
    stream = api.completions.create(model="bytes", prompt="x", stop=", w", stream=True)

    assert whole.choices[0].text == "".join(c.choices[0].text for c in stream) == "Hello"
    assert whole.choices[0].logprobs.tokens == list("Hello")


def test_models(api: openai.OpenAI) -> None:
    assert [m.id for m in api.models.list()] == ["bytes", "org/minilm"]
    assert api.models.retrieve("bytes").created == 5


def test_embeddings_in_both_encodings_are_the_same_unit_vectors(api: openai.OpenAI) -> None:
    packed = api.embeddings.create(model="org/minilm", input=["abc", "b"])
    plain = api.embeddings.create(model="org/minilm", input=["abc", "b"], encoding_format="float")

    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert sum(x * x for x in one.embedding) == pytest.approx(1)
    assert packed.usage.prompt_tokens == 4


def test_an_unknown_model_is_not_found(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="gpt", messages=HI)

    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_a_bad_request(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="bytes", messages=HI, temperature=3)

    assert caught.value.param == "temperature"


def test_extensions_travel_as_extra_body(api: openai.OpenAI, gateway: "Gateway") -> None:
    api.chat.completions.create(model="bytes", messages=HI, extra_body={"top_k": 5, "min_p": 0.1})

    assert gateway.script.requests[0].sampling.top_k == 5


def test_too_many_requests(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.failure = OverloadedError("full", retry_after_s=3)

    with pytest.raises(openai.RateLimitError) as caught:
        api.chat.completions.create(model="bytes", messages=HI, stream=True)

    assert caught.value.response.headers["retry-after"] == "3"


def test_the_client_tries_again_when_the_gateway_says_later(url: str, gateway: "Gateway") -> None:
    gateway.script.failure = ShardLostError("stage 1 died", retry_after_s=0.01)

    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as api,
        pytest.raises(openai.InternalServerError),
    ):
        api.chat.completions.create(model="bytes", messages=HI)

    assert len(gateway.script.requests) == 2


def test_a_failure_in_the_middle_of_a_stream_is_an_api_error_after_the_text_so_far(
    api: openai.OpenAI, gateway: "Gateway"
) -> None:
    gateway.script.fails_after, gateway.script.failure = 5, ShardLostError("stage 1 died")
    seen: list[str] = []

    with pytest.raises(openai.APIError, match="stage 1 died") as caught:
        seen.extend(
            c.choices[0].delta.content or ""
            for c in api.chat.completions.create(model="bytes", messages=HI, stream=True)
        )

    assert "".join(seen) == "Hello"
    assert caught.value.code == "shard_lost"


def test_a_key_is_asked_for_and_taken(gateway: "Gateway") -> None:
    gateway.access = Access(keys=frozenset({digest_key("right")}))
    with start_blocking_portal() as portal:
        running, url = portal.start_task(partial(serve, gateway.app(), bind("127.0.0.1", 0), grace_s=1.0))
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as api,
            pytest.raises(openai.AuthenticationError),
        ):
            api.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0) as api:
            assert len(list(api.models.list())) == 2
        running.cancel()
