"""Tools and formats as the official OpenAI client asks for them and reads them."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import openai
import pytest

from shoal.runtime.grammar import GrammarKind

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

HI = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_call_is_told_from_text(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.reply = f"Let me see.\n{CALL}\n{CALL}"

    choice = api.chat.completions.create(model="bytes", messages=HI, tools=[WEATHER]).choices[0]

    assert choice.message.content == "Let me see."
    assert choice.finish_reason == "tool_calls"
    assert [c.function.name for c in choice.message.tool_calls] == ["weather", "weather"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rome"}
    assert len({c.id for c in choice.message.tool_calls}) == 2


def test_an_answer_that_only_calls_has_no_content(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.reply = CALL

    message = api.chat.completions.create(model="bytes", messages=HI, tools=[WEATHER]).choices[0].message

    assert message.content is None
    assert len(message.tool_calls) == 1


def test_an_answer_without_a_call_is_an_answer(api: openai.OpenAI) -> None:
    choice = api.chat.completions.create(model="bytes", messages=HI, tools=[WEATHER]).choices[0]

    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Hello, world", None, "stop")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_clients_own_helper_puts_a_streamed_call_together(
    api: openai.OpenAI, gateway: "Gateway", chunk: int
) -> None:
    gateway.script.reply, gateway.script.chunk = f"Well. {CALL}", chunk

    with api.chat.completions.stream(model="bytes", messages=HI, tools=[WEATHER]) as stream:
        final = stream.get_final_completion().choices[0]

    assert final.message.content == "Well."
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.name == "weather"
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Rome"}


def test_a_stream_names_a_call_once_and_its_arguments_in_parts(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.reply = CALL

    chunks = list(api.chat.completions.create(model="bytes", messages=HI, tools=[WEATHER], stream=True))
    news = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or []]

    assert [(n.index, n.id is not None, n.function.name) for n in news if n.id] == [(0, True, "weather")]
    assert "".join(n.function.arguments for n in news) == '{"city": "Rome"}'
    assert len(news) > 2


def test_calls_and_results_of_earlier_turns_reach_the_template(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.reply = CALL
    first = api.chat.completions.create(model="bytes", messages=HI, tools=[WEATHER]).choices[0].message
    gateway.script.reply = "Sunny."
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}

    answer = api.chat.completions.create(model="bytes", messages=[*HI, first, result], tools=[WEATHER])

    assert answer.choices[0].message.content == "Sunny."
    assert b"tool:sun" in bytes(gateway.script.requests[-1].prompt)


@pytest.mark.parametrize(
    ("choice", "constrained"),
    [
        ("auto", True),
        ("required", True),
        ("none", False),
        ({"type": "function", "function": {"name": "weather"}}, True),
    ],
    ids=str,
)
def test_the_choice_decides_what_the_answer_must_look_like(
    api: openai.OpenAI, gateway: "Gateway", choice: object, constrained: bool
) -> None:
    api.chat.completions.create(model="bytes", messages=HI, tools=[WEATHER], tool_choice=choice)

    grammar = gateway.script.requests[0].grammar
    assert (grammar is not None) == constrained
    if grammar is not None:
        assert ("text" in grammar.text) == (choice == "auto")


def test_formats_become_grammars(api: openai.OpenAI, gateway: "Gateway") -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS, "strict": True}}
    regex = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}
    for wanted in ({"type": "text"}, {"type": "json_object"}, schema, regex):
        api.chat.completions.create(model="bytes", messages=HI, response_format=wanted)

    kinds = [r.grammar.kind if r.grammar else None for r in gateway.script.requests]
    assert kinds == [None, GrammarKind.JSON_SCHEMA, GrammarKind.JSON_SCHEMA, GrammarKind.REGEX]
    assert json.loads(gateway.script.requests[2].grammar.text) == PARAMETERS


def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(api: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "strange"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="bytes", messages=HI, response_format=wanted)

    assert refused.value.param == "response_format"
    assert "strange" in refused.value.message
