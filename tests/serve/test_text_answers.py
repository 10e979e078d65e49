"""What the two text protocols ask of the executor, and how they tell the answer."""

import json
from typing import TYPE_CHECKING, Any

import pytest
from httpx import Response
from litestar import Litestar
from litestar.testing import TestClient

from shoal.errors import ShardLostError
from shoal.serve.job import answer_tokens, derived_seed

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(**extra: object) -> dict[str, object]:
    return {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]} | extra


def text(**extra: object) -> dict[str, object]:
    return {"model": "bytes", "prompt": "hi", "max_tokens": 100} | extra


def events(answer: Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_is_rendered_by_the_template_and_sampled_as_openai_does_by_default(
    client: TestClient[Litestar], gateway: "Gateway"
) -> None:
    client.post(CHAT, json=chat())

    request = gateway.script.requests[0]
    assert bytes(request.prompt) == b"user:hi\nassistant:"
    assert request.max_tokens == 512 - len(request.prompt)
    assert request.sampling.temperature == 1.0
    assert request.sampling.logprobs is None
    assert request.stop_token_ids == (256,)


def test_a_completion_keeps_the_space_that_joins_it_to_its_prompt(
    client: TestClient[Litestar], gateway: "Gateway"
) -> None:
    gateway.script.reply = " there"

    assert client.post(TEXT, json=text()).json()["choices"][0]["text"] == " there"


def test_a_chat_answer_begins_without_the_space_of_the_vocabulary(
    client: TestClient[Litestar], gateway: "Gateway"
) -> None:
    gateway.script.reply = " there"

    assert client.post(CHAT, json=chat()).json()["choices"][0]["message"]["content"] == "there"


def test_every_sampling_field_reaches_the_executor(client: TestClient[Litestar], gateway: "Gateway") -> None:
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "seed": 7,
    }  # fmt: skip

    client.post(CHAT, json=chat(**sampling, logit_bias={"65": -100}, ignore_eos=True, max_completion_tokens=5))

    request = gateway.script.requests[0]
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert request.sampling.logit_bias == {65: -100.0}
    assert (request.ignore_eos, request.max_tokens) == (True, 5)


def test_system_developer_and_parts_become_what_templates_know(
    client: TestClient[Litestar], gateway: "Gateway"
) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]

    client.post(CHAT, json=chat(messages=messages))

    assert bytes(gateway.script.requests[0].prompt) == b"system:be brief\nuser:a\nb\nassistant:"


def test_tools_are_shown_to_the_template_unless_the_choice_is_none(
    client: TestClient[Litestar], gateway: "Gateway"
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]

    client.post(CHAT, json=chat(tools=tools))
    client.post(CHAT, json=chat(tools=tools, tool_choice="none"))

    assert [b"tools" in bytes(r.prompt) for r in gateway.script.requests] == [True, False]


def test_an_absent_seed_is_drawn_and_a_negative_one_is_taken(client: TestClient[Litestar], gateway: "Gateway") -> None:
    client.post(CHAT, json=chat())
    client.post(CHAT, json=chat())
    client.post(CHAT, json=chat(seed=-1))

    first, second, given = (r.sampling.seed for r in gateway.script.requests)
    assert first != second
    assert given == 2**63 - 1


def test_completions_have_sixteen_tokens_unless_asked(client: TestClient[Litestar], gateway: "Gateway") -> None:
    gateway.script.reply = "x" * 40

    answer = client.post(TEXT, json={"model": "bytes", "prompt": "hi"}).json()

    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 16,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
def test_a_prompt_may_be_text_or_token_ids(client: TestClient[Litestar], gateway: "Gateway", prompt: object) -> None:
    client.post(TEXT, json=text(prompt=prompt))

    assert [bytes(r.prompt) for r in gateway.script.requests] == [b"hi"]


def test_choices_are_numbered_by_prompt_then_copy_and_differ_in_their_seeds(
    client: TestClient[Litestar], gateway: "Gateway"
) -> None:
    answer = client.post(TEXT, json=text(prompt=["a", "b"], n=2, seed=5)).json()

    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    asked = {r.request.rsplit("-", 1)[1]: (bytes(r.prompt), r.sampling.seed) for r in gateway.script.requests}
    other = derived_seed(5, 1)
    assert asked == {"0": (b"a", 5), "1": (b"a", other), "2": (b"b", 5), "3": (b"b", other)}
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4 * len("Hello, world")


def test_no_more_choices_run_at_once_than_allowed(client: TestClient[Litestar], gateway: "Gateway") -> None:
    client.post(TEXT, json=text(n=8))

    assert gateway.script.most_running == gateway.limits.parallel_choices
    assert len(gateway.script.closed) == 8


def test_a_stream_says_the_same_as_the_whole_answer(gateway: "Gateway") -> None:
    gateway.script.reply, gateway.script.chunk = "naïve 漢字 🐟 END never", 3
    asked = chat(stop=["END"], logprobs=True, top_logprobs=2, n=2)

    whole = gateway.client().post(CHAT, json=asked).json()
    stream = events(
        gateway.client().post(CHAT, json=asked | {"stream": True, "stream_options": {"include_usage": True}})
    )

    for choice in whole["choices"]:
        own = [c for e in stream for c in e["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"] == "naïve 漢字 🐟 "
        told = [token for c in own for token in (c["logprobs"] or {"content": []})["content"]]
        assert told == choice["logprobs"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == whole["usage"]
    assert all(e["usage"] is None for e in stream[:-1])


def test_a_stream_without_usage_does_not_mention_it(client: TestClient[Litestar]) -> None:
    assert all("usage" not in e for e in events(client.post(CHAT, json=chat(stream=True))))


def test_logprobs_of_the_older_protocol_are_parallel_lists(gateway: "Gateway") -> None:
    gateway.script.reply = "aé"

    told = gateway.client().post(TEXT, json=text(logprobs=1)).json()["choices"][0]["logprobs"]

    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert told["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert told["text_offset"] == [0, 1, 1]
    assert told["top_logprobs"][0] == {"a": -0.5}


def test_a_stop_string_cancels_the_request(gateway: "Gateway") -> None:
    gateway.script.reply = "Hello, world! " * 7

    answer = gateway.client().post(TEXT, json=text(stop="wor")).json()

    assert answer["choices"][0]["text"] == "Hello, "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert gateway.script.closed == [gateway.script.requests[0].request]


def test_a_failure_in_the_middle_ends_the_stream_with_an_error_event_and_without_done(gateway: "Gateway") -> None:
    gateway.script.fails_after, gateway.script.failure = 5, ShardLostError("worker 2 died", hint="again")

    answer = gateway.client().post(CHAT, json=chat(stream=True))

    lines = [line for line in answer.text.splitlines() if line]
    assert answer.status_code == 200
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shard_lost"
    assert "[DONE]" not in answer.text


def test_times_and_outcomes_are_measured(gateway: "Gateway") -> None:
    gateway.client().post(CHAT, json=chat())
    gateway.script.failure = RuntimeError("x")
    gateway.client().post(CHAT, json=chat())

    assert len(gateway.fleet.first) == 1
    assert len(gateway.fleet.later) == len("Hello, world") - 1
    assert gateway.fleet.outcomes == [("bytes", "stop", 18, 12), ("bytes", "internal_error", 18, 0)]


def test_tokens_that_come_together_share_the_time_since_the_ones_before(gateway: "Gateway") -> None:
    gateway.script.reply, gateway.script.chunk = "12345678", 4
    gateway.script.tick = lambda: gateway.clock.advance(1.0)

    gateway.client().post(CHAT, json=chat())

    assert gateway.fleet.first == [1.0]
    assert gateway.fleet.later == [0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25]


def test_answers_fit_behind_the_prompt() -> None:
    assert answer_tokens(10, None, 16, "prompt") == 6
    assert answer_tokens(10, 6, 16, "prompt") == 6


def test_models_are_listed_and_found_by_names_with_slashes(client: TestClient[Litestar]) -> None:
    listed = client.get("/v1/models").json()["data"]

    assert [(m["id"], m["embeddings"]) for m in listed] == [("bytes", False), ("org/minilm", True)]
    assert client.get("/v1/models/org/minilm").json() == listed[1]
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
