"""Bad requests get an OpenAI-shaped body that names what is wrong."""

from typing import TYPE_CHECKING

import msgspec
import pytest
from litestar import Litestar
from litestar.testing import TestClient

from shoal.errors import (
    DeadlineExceededError,
    DigestMismatchError,
    InfeasibleError,
    OverloadedError,
    ShardLostError,
    ShoalError,
)
from shoal.ids import RequestId
from shoal.runtime.request import FinishReason, OutputDelta
from shoal.serve.ports import Limits

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HI = [{"role": "user", "content": "hi"}]


BROKEN = {"type": "object", "properties": {"a": {"type": "strange"}}}
FALSE = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f"}}
BROKEN_TOOL = {"type": "function", "function": {"name": "f", "parameters": BROKEN}}
NAMED = {"type": "function", "function": {"name": "g"}}
CALLED = [
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]}
]


def schema_of(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def chat(**extra: object) -> tuple[str, dict[str, object]]:
    return CHAT, {"model": "bytes", "messages": HI} | extra


def text(**extra: object) -> tuple[str, dict[str, object]]:
    return TEXT, {"model": "bytes", "prompt": "hi"} | extra


def embed(**extra: object) -> tuple[str, dict[str, object]]:
    return EMBED, {"model": "org/minilm", "input": "hi"} | extra


BAD = [
    # what, request, status, code, param
    ("unknown model", chat(model="gpt-4"), 404, "model_not_found", "model"),
    ("no model", (CHAT, {"messages": HI}), 400, "invalid_request", "model"),
    ("no messages", (CHAT, {"model": "bytes"}), 400, "invalid_request", "messages"),
    ("empty messages", chat(messages=[]), 400, "invalid_request", "messages"),
    ("messages of the wrong type", chat(messages="hi"), 400, "invalid_request", "messages"),
    (
        "a role that does not exist",
        chat(messages=[{"role": "boss", "content": "x"}]),
        400,
        "invalid_request",
        "messages[0].role",
    ),
    (
        "a message without content",
        chat(messages=[*HI, {"role": "user"}]),
        400,
        "invalid_request",
        "messages[1].content",
    ),
    (
        "content of the wrong type",
        chat(messages=[{"role": "user", "content": 5}]),
        400,
        "invalid_request",
        "messages[0].content",
    ),
    (
        "an image",
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "invalid_request",
        "messages[0].content[0].type",
    ),
    (
        "an unknown field of a message",
        chat(messages=[{**HI[0], "rôle": 1}]),
        400,
        "invalid_request",
        "messages[0].rôle",
    ),
    ("a text where a number belongs", chat(max_tokens="5"), 400, "invalid_request", "max_tokens"),
    ("true where a number belongs", chat(max_tokens=True), 400, "invalid_request", "max_tokens"),
    ("a fraction where a count belongs", chat(max_tokens=1.5), 400, "invalid_request", "max_tokens"),
    ("negative max_tokens", chat(max_tokens=-1), 400, "invalid_request", "max_tokens"),
    ("zero max_tokens", chat(max_tokens=0), 400, "invalid_request", "max_tokens"),
    ("max_tokens beyond 64 bits", chat(max_tokens=10**30), 400, "invalid_request", "max_tokens"),
    ("max_tokens beyond the context", chat(max_tokens=100_000), 400, "context_length_exceeded", "max_tokens"),
    (
        "max_completion_tokens beyond the context",
        chat(max_completion_tokens=512),
        400,
        "context_length_exceeded",
        "max_tokens",
    ),
    ("two different limits", chat(max_tokens=3, max_completion_tokens=4), 400, "invalid_request", "max_tokens"),
    (
        "a prompt beyond the context",
        chat(messages=[{"role": "user", "content": "x" * 600}]),
        400,
        "context_length_exceeded",
        "messages",
    ),
    ("temperature above 2", chat(temperature=2.5), 400, "invalid_request", "temperature"),
    ("temperature below 0", chat(temperature=-0.1), 400, "invalid_request", "temperature"),
    ("top_p above 1", chat(top_p=1.1), 400, "invalid_request", "top_p"),
    ("min_p below 0", chat(min_p=-1), 400, "invalid_request", "min_p"),
    ("negative top_k", chat(top_k=-1), 400, "invalid_request", "top_k"),
    ("presence penalty above 2", chat(presence_penalty=3), 400, "invalid_request", "presence_penalty"),
    ("frequency penalty below -2", chat(frequency_penalty=-3), 400, "invalid_request", "frequency_penalty"),
    ("repetition penalty 0", chat(repetition_penalty=0), 400, "invalid_request", "repetition_penalty"),
    ("n above 8", chat(n=9), 400, "invalid_request", "n"),
    ("n of 0", chat(n=0), 400, "invalid_request", "n"),
    ("a seed beyond 64 bits", chat(seed=2**70), 400, "invalid_request", "seed"),
    ("21 top_logprobs", chat(logprobs=True, top_logprobs=21), 400, "invalid_request", "top_logprobs"),
    ("top_logprobs without logprobs", chat(top_logprobs=2), 400, "invalid_request", "top_logprobs"),
    ("logit_bias of no token", chat(logit_bias={"hello": 1}), 400, "invalid_request", "logit_bias"),
    ("logit_bias outside the vocabulary", chat(logit_bias={"257": 1}), 400, "invalid_request", "logit_bias"),
    ("logit_bias above 100", chat(logit_bias={"5": 101}), 400, "invalid_request", "logit_bias[...]"),
    ("an empty stop string", chat(stop=""), 400, "invalid_request", "stop"),
    ("17 stop strings", chat(stop=["x"] * 17), 400, "invalid_request", "stop"),
    ("a stop of the wrong type", chat(stop=[1]), 400, "invalid_request", "stop[0]"),
    ("stream of the wrong type", chat(stream="yes"), 400, "invalid_request", "stream"),
    (
        "stream_options without stream",
        chat(stream_options={"include_usage": True}),
        400,
        "invalid_request",
        "stream_options",
    ),
    (
        "required tools",
        chat(tools=[{"type": "function"}], tool_choice="required"),
        400,
        "invalid_request",
        "tools[0].function",
    ),
    ("a named tool", chat(tool_choice={"type": "function"}), 400, "invalid_request", "tool_choice.function"),
    ("a tool that is not there", chat(tool_choice=NAMED, tools=[TOOL]), 400, "invalid_request", "tool_choice"),
    ("a call of nothing", chat(tool_choice="required"), 400, "invalid_request", "tool_choice"),
    ("two tools of a name", chat(tools=[TOOL, TOOL]), 400, "invalid_request", "tools"),
    ("a tool's broken schema", chat(tools=[BROKEN_TOOL]), 400, "invalid_request", "tools"),
    ("arguments that are no JSON", chat(messages=CALLED), 400, "invalid_request", "messages[0].tool_calls"),
    ("an unknown format", chat(response_format={"type": "yaml"}), 400, "invalid_request", "response_format.type"),
    ("a broken schema", chat(response_format=schema_of(BROKEN)), 400, "invalid_request", "response_format"),
    ("a schema that none can meet", chat(response_format=schema_of(FALSE)), 400, "invalid_request", "response_format"),
    (
        "JSON that may not end",
        chat(response_format={"type": "json_object"}, ignore_eos=True),
        400,
        "invalid_request",
        "ignore_eos",
    ),
    (
        "a JSON schema",
        chat(response_format={"type": "json_schema"}),
        400,
        "invalid_request",
        "response_format.json_schema",
    ),
    ("audio", chat(audio={"voice": "x"}), 400, "invalid_request", "audio"),
    ("modalities beyond text", chat(modalities=["text", "audio"]), 400, "invalid_request", "modalities"),
    ("functions", chat(functions=[{"name": "f"}]), 400, "invalid_request", "functions"),
    ("web search", chat(web_search_options={}), 400, "invalid_request", "web_search_options"),
    ("an unknown field", chat(temprature=1), 400, "invalid_request", "temprature"),
    ("an encoder asked to chat", chat(model="org/minilm"), 400, "invalid_request", "model"),
    ("best_of", text(best_of=3), 400, "invalid_request", "best_of"),
    ("echo", text(echo=True), 400, "invalid_request", "echo"),
    ("suffix", text(suffix="end"), 400, "invalid_request", "suffix"),
    ("an empty prompt", text(prompt=""), 400, "invalid_request", "prompt"),
    ("an empty list of prompts", text(prompt=[]), 400, "invalid_request", "prompt"),
    ("prompts of mixed kinds", text(prompt=["a", 5]), 400, "invalid_request", "prompt"),
    ("a negative token id", text(prompt=[1, -5]), 400, "invalid_request", "prompt"),
    ("a token id outside the vocabulary", text(prompt=[[1, 257]]), 400, "invalid_request", "prompt"),
    ("too many answers", text(prompt=["a"] * 17, n=2), 400, "invalid_request", "n"),
    ("completions without a prompt", (TEXT, {"model": "bytes"}), 400, "invalid_request", "prompt"),
    ("logprobs: true where a count belongs", text(logprobs=True), 400, "invalid_request", "logprobs"),
    ("dimensions", embed(dimensions=4), 400, "invalid_request", "dimensions"),
    ("an unknown encoding", embed(encoding_format="hex"), 400, "invalid_request", "encoding_format"),
    ("no input", embed(input=[]), 400, "invalid_request", "input"),
    ("an empty input", embed(input=["a", ""]), 400, "invalid_request", "input"),
    ("an input too long", embed(input="x" * 65), 400, "context_length_exceeded", "input"),
    ("too many inputs", embed(input=["a"] * 257), 400, "invalid_request", "input"),
    ("a token id that is not there", embed(input=[999]), 400, "invalid_request", "input"),
    ("a text model asked to embed", embed(model="bytes"), 400, "invalid_request", "model"),
]


@pytest.mark.parametrize(("request_", "status", "code", "param"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_request_is_answered_with_what_is_wrong(
    client: TestClient[Litestar],
    gateway: "Gateway",
    request_: tuple[str, dict[str, object]],
    status: int,
    code: str,
    param: str,
) -> None:
    path, body = request_

    answer = client.post(path, json=body)

    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"].count("got ") <= 1
    assert error["hint"]
    assert "NaN" not in error["hint"]
    assert gateway.script.requests == []


BROKEN = {
    "nothing": b"",
    "half an object": b'{"model": "bytes", "messages": [',
    "not JSON": b"model=bytes",
    "a list": b"[]",
    "NaN": b'{"model": "bytes", "prompt": "x", "temperature": NaN}',
    "infinity by overflow": b'{"model": "bytes", "prompt": "x", "temperature": 1e999}',
    "not UTF-8": b'{"model": "bytes", "prompt": "\xff"}',
    "half a surrogate pair": b'{"model": "bytes", "prompt": "\\ud800"}',
    "deep lists": b'{"model": "bytes", "prompt": ' + b"[" * 100_000,
    "deep objects": b'{"model": "bytes", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_bytes_that_are_no_request_are_refused(client: TestClient[Litestar], body: bytes) -> None:
    answer = client.post(TEXT, content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["hint"]
    assert ("NaN" in error["hint"]) == (b"NaN" in body)


def test_what_is_no_json_is_told_apart(client: TestClient[Litestar]) -> None:
    hints = [
        client.post(TEXT, content=body, headers={"content-type": "application/json"}).json()["error"]["hint"]
        for body in (b"[}", BROKEN["NaN"], BROKEN["infinity by overflow"])
    ]

    assert [word for word, hint in zip(("brackets", "NaN", "1.8e308"), hints, strict=True) if word not in hint] == []


def test_a_number_of_the_wrong_type_is_shown_once(client: TestClient[Litestar]) -> None:
    error = client.post(CHAT, json=chat(max_tokens=1.5)[1]).json()["error"]

    assert error["message"] == "max_tokens: expected `int | null`, got `float` (1.5)"
    assert error["hint"] == "see /schema for what max_tokens may be"


def test_a_body_above_the_limit_is_refused(gateway: "Gateway") -> None:
    gateway.limits = Limits(body_bytes=1000)

    answer = gateway.client().post(TEXT, content=b"x" * 12_345)
    piecewise = gateway.client().post(TEXT, content=iter([b"x" * 700, b"x" * 700]))

    for refused, said in ((answer, "this one has 12,345"), (piecewise, "bodies")):
        assert refused.status_code == 413
        error = refused.json()["error"]
        assert error["code"] == "request_too_large"
        assert said in error["message"]
        assert "at most 1,000 bytes" in error["message"]
        assert "several requests" in error["hint"]


def test_fields_that_change_nothing_are_accepted(client: TestClient[Litestar]) -> None:
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "stop": None, "n": 1,
        "reasoning_effort": "low",
        "messages": [{"role": "assistant", "content": "x", "refusal": None, "annotations": []}, *HI],
    }  # fmt: skip

    assert client.post(CHAT, json=chat()[1] | harmless).status_code == 200
    assert client.post(TEXT, json=text(best_of=1, echo=False, suffix="")[1]).status_code == 200


def test_a_misspelt_field_is_answered_with_the_right_spelling(client: TestClient[Litestar]) -> None:
    error = client.post(CHAT, json=chat(temprature=1)[1]).json()["error"]

    assert error["hint"] == "did you mean temperature?"


def test_the_context_error_says_the_numbers(client: TestClient[Litestar]) -> None:
    error = client.post(TEXT, json=text(prompt="x" * 500, max_tokens=20)[1]).json()["error"]

    assert "512 tokens" in error["message"]
    assert "500 for the prompt and 20 for the answer" in error["message"]
    assert error["hint"] == "ask for at most 12 tokens"


def test_an_unknown_path_and_a_wrong_method_have_the_same_shape(client: TestClient[Litestar]) -> None:
    assert client.get("/v2/nothing").json()["error"]["code"] == "not_found"
    assert client.get(CHAT).status_code == 405
    error = client.get(CHAT).json()["error"]
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{CHAT} does not take GET"
    assert "/schema" in error["hint"]


FAILURES = [
    (OverloadedError("8 wait already", retry_after_s=2.5), 429, "overloaded", "rate_limit_error", "3"),
    (ShardLostError("worker 2 died", retry_after_s=1), 503, "shard_lost", "unavailable_error", "1"),
    (DeadlineExceededError("too slow"), 504, "deadline_exceeded", "unavailable_error", "1"),
    (DigestMismatchError("chunk x"), 502, "digest_mismatch", "untrusted_error", None),
    (InfeasibleError("no room"), 409, "no_plan_fits", "invalid_request_error", None),
    (ShoalError("logits are NaN"), 500, "internal_error", "server_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code", "kind", "retry_after"), FAILURES, ids=lambda f: getattr(f, "code", None)
)
def test_a_failure_before_the_first_token_has_its_status_even_in_a_stream(
    gateway: "Gateway", failure: Exception, status: int, code: str, kind: str, retry_after: str | None, stream: bool
) -> None:
    gateway.script.failure = failure

    answer = gateway.client().post(CHAT, json=chat(stream=stream)[1])

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == retry_after
    assert (answer.json()["error"]["code"], answer.json()["error"]["type"]) == (code, kind)
    assert answer.json()["error"]["hint"] == (
        f"try again in {retry_after} s" if retry_after else answer.json()["error"]["hint"]
    )
    assert answer.json()["error"]["hint"]


def test_an_unforeseen_failure_tells_nothing_of_the_inside_and_logs_no_prompt(
    gateway: "Gateway", caplog: pytest.LogCaptureFixture
) -> None:
    gateway.script.failure = RuntimeError("while reading 'my secret prompt'")

    answer = gateway.client().post(CHAT, json=chat()[1])

    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_a_failed_delta_becomes_the_error_that_it_names(gateway: "Gateway") -> None:
    from shoal.ids import RequestId

    failed = OutputDelta(
        request=RequestId(""), finish=FinishReason.ERROR, error_code="shard_lost", error="stage 1 died"
    )
    gateway.script.last_words = (failed,)

    answer = gateway.client().post(CHAT, json=chat()[1])

    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "stage 1 died"


def test_an_answer_that_breaks_off_without_a_reason_is_a_lost_shard(gateway: "Gateway") -> None:
    gateway.script.last_words = ()

    answer = gateway.client().post(CHAT, json=chat()[1])

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shard_lost"


def test_a_deployment_that_stops_sends_its_callers_elsewhere(gateway: "Gateway") -> None:
    gateway.script.last_words = (OutputDelta(request=RequestId(""), finish=FinishReason.CANCELLED),)

    answer = gateway.client().post(CHAT, json=chat()[1])

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_a_full_gateway_says_when_to_come_back(gateway: "Gateway") -> None:
    gateway.limits = Limits(in_flight=0)

    answer = gateway.client().post(CHAT, json=chat()[1])

    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long_is_a_timeout(gateway: "Gateway") -> None:
    gateway.script.reply, gateway.script.pace_s = "Hello, world! " * 40, 0.02
    gateway.limits = Limits(answer_s=0.05)

    answer = gateway.client().post(CHAT, json=chat()[1])

    assert answer.status_code == 504
    assert gateway.script.running == 0


def test_every_answer_to_garbage_is_an_error_body(client: TestClient[Litestar]) -> None:
    for body in (b"\x00", b"null", b'"x"', b"{}", b'{"model": null, "messages": null}'):
        answer = client.post(CHAT, content=body)
        assert answer.status_code == 400
        msgspec.json.decode(answer.content, type=dict[str, dict[str, str | float | None]])
