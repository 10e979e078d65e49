"""The Responses API, as the official OpenAI client asks and reads it."""

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError, ShardLostError
from shoal.runtime.grammar import GrammarKind
from shoal.runtime.request import FinishReason
from shoal.serve.assemble import CallNews, Piece
from shoal.serve.openai_answers import Usage
from shoal.serve.openai_requests import Message
from shoal.serve.openai_responses import Response, ResponseEvent, TextConfig
from shoal.serve.response_items import input_messages
from shoal.serve.response_writer import ResponseWriter
from shoal.serve.turns import KEPT, MOST_BYTES, Turns

if TYPE_CHECKING:
    from tests.serve.conftest import Gateway

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def prompt_of(gateway: "Gateway") -> str:
    return bytes(gateway.script.requests[-1].prompt).decode()


def test_a_text_is_answered(api: openai.OpenAI, gateway: "Gateway") -> None:
    answer = api.responses.create(model="bytes", input="hi", instructions="be brief", temperature=0.5)

    assert answer.output_text == "Hello, world"
    assert answer.status == "completed"
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (12, answer.usage.input_tokens + 12)
    assert prompt_of(gateway) == "system:be brief\nuser:hi\nassistant:"
    assert gateway.script.requests[0].sampling.temperature == 0.5


def test_an_answer_that_is_cut_off_says_so(api: openai.OpenAI) -> None:
    answer = api.responses.create(model="bytes", input="hi", max_output_tokens=5)

    assert (answer.output_text, answer.status) == ("Hello", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_the_clients_own_stream_helper_reads_every_event(api: openai.OpenAI) -> None:
    with api.responses.stream(model="bytes", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()

    assert final.output_text == "Hello, world"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert kinds.count("response.output_text.delta") == 12


def test_a_stream_says_the_same_as_the_whole_answer(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.reply = f"Well. {CALL}"
    asked = {"model": "bytes", "input": "hi", "tools": [WEATHER]}
    whole = api.responses.create(**asked)
    events = list(api.responses.create(**asked, stream=True))

    def plain(response: object) -> list[dict[str, object]]:
        items = response.to_dict()["output"]  # type: ignore[attr-defined]
        return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert plain(events[-1].response) == plain(whole)
    assert [item.type for item in whole.output] == ["message", "function_call"]


def test_a_call_and_its_result_go_round(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.reply = CALL
    first = api.responses.create(model="bytes", input="hi", tools=[WEATHER])
    (call,) = first.output
    gateway.script.reply = "Sunny."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    second = api.responses.create(model="bytes", input=[result], previous_response_id=first.id, tools=[WEATHER])

    assert json.loads(call.arguments) == {"city": "Rome"}
    assert second.output_text == "Sunny."
    assert prompt_of(gateway).splitlines()[:3] == ["user:hi", "assistant:", "tool:sun"]


def test_a_conversation_is_continued_by_its_id_or_by_all_of_it(api: openai.OpenAI, gateway: "Gateway") -> None:
    first = api.responses.create(model="bytes", input="one")
    api.responses.create(model="bytes", input="two", previous_response_id=first.id)
    by_id = prompt_of(gateway)
    said = [
        {"role": "user", "content": "one"},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": "two"},
    ]
    api.responses.create(model="bytes", input=said)

    assert by_id == prompt_of(gateway) == "user:one\nassistant:Hello, world\nuser:two\nassistant:"


def test_what_is_not_to_be_stored_is_not_remembered(api: openai.OpenAI) -> None:
    first = api.responses.create(model="bytes", input="one", store=False)

    with pytest.raises(openai.BadRequestError) as refused:
        api.responses.create(model="bytes", input="two", previous_response_id=first.id)

    assert refused.value.param == "previous_response_id"


def test_a_format_becomes_a_grammar(api: openai.OpenAI, gateway: "Gateway") -> None:
    schema = {"type": "json_schema", "name": "place", "schema": PARAMETERS, "strict": True}
    api.responses.create(model="bytes", input="hi", text={"format": schema})

    grammar = gateway.script.requests[0].grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(grammar.text) == PARAMETERS


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"tool_choice": {"type": "function", "name": "rain"}, "tools": [WEATHER]}, "tool_choice"),
        ({"previous_response_id": "resp_gone"}, "previous_response_id"),
        ({"top_p": 7}, "top_p"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(api: openai.OpenAI, extra: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.responses.create(**({"model": "bytes", "input": "hi"} | {"extra_body": extra}))

    assert refused.value.param == param


def test_an_unknown_model_is_not_found(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        api.responses.create(model="nobody", input="hi")


def test_a_failure_in_the_middle_is_an_api_error_after_the_text_so_far(api: openai.OpenAI, gateway: "Gateway") -> None:
    gateway.script.failure, gateway.script.fails_after = ShardLostError("a worker died"), 5
    seen: list[str] = []

    def read() -> None:
        for event in api.responses.create(model="bytes", input="hi", stream=True):
            seen.extend([event.delta] if event.type == "response.output_text.delta" else [])

    with pytest.raises(openai.APIError, match="a worker died"):
        read()

    assert "".join(seen) == "Hello"


def usage() -> Usage:
    return Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)


def writer() -> ResponseWriter:
    numbers = itertools.count()
    blank = Response(
        id="resp_1", created_at=1, model="m", status="in_progress", output=[], instructions=None, previous_response_id=None,
        max_output_tokens=None, temperature=1.0, top_p=1.0, tools=[], tool_choice="auto", parallel_tool_calls=True,
        text=TextConfig(), metadata={}, store=True,
    )  # fmt: skip
    return ResponseWriter(blank, lambda prefix: f"{prefix}_{next(numbers)}")


def called(index: int) -> Piece:
    begun = CallNews(index=index, id=f"c{index}", name="f", arguments="{")
    return Piece(calls=(begun, CallNews(index=index, arguments="}")))


pieces = st.lists(st.builds(Piece, text=st.sampled_from(["", "a", "bc"])) | st.integers(0, 3).map(called), max_size=8)


@given(pieces)
def test_items_begin_grow_and_end_one_after_another(news: list[Piece]) -> None:
    one = writer()
    events: list[ResponseEvent] = [*one.begin()]
    for piece in [*news, Piece(finish=FinishReason.STOP)]:
        events += one.news(piece)
    events += one.end(usage())

    assert [event.sequence_number for event in events] == list(range(len(events)))
    open_item = None
    texts: dict[object, str] = {}
    for event in events[2:-1]:
        if event.type == "response.output_item.added":
            assert open_item is None
            open_item = event.item.id  # type: ignore[union-attr]
        elif event.type == "response.output_item.done":
            assert event.item.id == open_item  # type: ignore[union-attr]
            open_item = None
        else:
            assert event.item_id == open_item
            texts[open_item] = texts.get(open_item, "") + (event.delta or "" if event.type.endswith("delta") else "")
    assert open_item is None
    whole = one.whole(usage())
    assert [texts[i.id] for i in whole.output] == [
        getattr(i, "arguments", None) or i.content[0].text for i in whole.output
    ]  # type: ignore[union-attr]


def test_only_the_newest_conversations_are_remembered() -> None:
    turns = Turns()
    for n in range(KEPT + 1):
        turns.keep(f"r{n}", (Message(role="user", content="x"),))

    assert turns.find(f"r{KEPT}")
    with pytest.raises(InvalidRequestError, match="r0"):
        turns.find("r0")


def test_long_conversations_push_out_others_and_the_longest_are_not_kept() -> None:
    turns = Turns()
    for n in range(8):
        turns.keep(f"r{n}", (Message(role="user", content="x" * (MOST_BYTES // 5)),))
    turns.keep("huge", (Message(role="user", content="x" * MOST_BYTES),))

    assert turns.size_bytes <= MOST_BYTES
    assert turns.find("r7")
    for gone in ("r0", "huge"):
        with pytest.raises(InvalidRequestError):
            turns.find(gone)


def test_calls_that_follow_each_other_are_one_turn() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    turns = input_messages([{"role": "user", "content": "x"}, {"role": "assistant", "content": "ok"}, call, call])

    assert [(t.role, len(t.tool_calls or ())) for t in turns] == [("user", 0), ("assistant", 2)]
