"""Calls of tools: the language of the answers, and how they are read."""

import itertools
import json
from collections.abc import Callable
from random import Random

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.model.tokenizer import Tokenizer
from shoal.model.tool_format import HERMES, LLAMA_3, MISTRAL, MISTRAL_NAMED, PHI_4, ToolFormat, format_of
from shoal.model.tool_prompt import told
from shoal.runtime.backend.guided import GuidedGrammars, validate
from shoal.runtime.grammar import JSON_OBJECT, Grammar
from shoal.runtime.request import FinishReason
from shoal.serve.assemble import CallNews, Piece
from shoal.serve.formats import schema_grammar
from shoal.serve.tool_reader import ToolReader, call_id, whole_calls
from shoal.serve.tools import Tool, ToolUse, tool_grammar, tool_use

FORMS = [HERMES, LLAMA_3, MISTRAL, MISTRAL_NAMED, PHI_4]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (Tool(name="weather", parameters=WEATHER), Tool(name="time"))


def use(*, required: bool = False, parallel: bool = True) -> ToolUse:
    return ToolUse(tools=TOOLS, callable=frozenset({"weather", "time"}), required=required, parallel=parallel)


def reader(form: ToolFormat) -> ToolReader:
    numbers = itertools.count()
    return ToolReader(form=form, new_id=lambda: call_id(next(numbers), form.id_chars))


def written(form: ToolFormat, calls: list[tuple[str, dict[str, object]]]) -> str:
    """Calls as a model of that format writes them."""
    objects = [json.dumps({form.name_key: n, form.arguments_key: a}) for n, a in calls]
    match form.name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{o}\n</tool_call>" for o in objects)
        case "llama3":
            return objects[0]
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case "mistral-named":
            return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)
        case _:
            return f"<|tool_call|>[{', '.join(objects)}]<|/tool_call|>"


def read(form: ToolFormat, parts: list[str]) -> tuple[str, list[CallNews]]:
    """The text and the whole calls of an answer that comes in *parts*."""
    one = reader(form)
    pieces = [one.read(Piece(text=part)) for part in parts]
    pieces.append(one.read(Piece(finish=FinishReason.STOP)))
    return "".join(p.text for p in pieces), whole_calls(tuple(c for p in pieces for c in p.calls))


arguments = st.dictionaries(
    st.text(max_size=5), st.integers() | st.text() | st.lists(st.booleans(), max_size=2) | st.none(), max_size=3
)


@given(
    form=st.sampled_from(FORMS),
    calls=st.lists(st.tuples(st.sampled_from(["weather", "time"]), arguments), min_size=1, max_size=3),
    before=st.sampled_from(["", "Let me see. ", "a < b and [1]"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_calls_are_read_whole_wherever_the_stream_is_cut(
    form: ToolFormat, calls: list[tuple[str, dict[str, object]]], before: str, cuts: list[int]
) -> None:
    if form is LLAMA_3:
        before, calls = "", calls[:1]
    text = before + written(form, calls)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]

    shown, found = read(form, [text[a:b] for a, b in itertools.pairwise(edges)])

    assert shown == before.rstrip()
    assert [(c.name, json.loads(c.arguments)) for c in found] == calls
    assert len({c.id for c in found}) == len(calls)


@given(text=st.text(alphabet='<>/_tolca[]{}"\n TOLCA', max_size=40), form=st.sampled_from(FORMS))
def test_no_text_is_lost_or_taken_for_a_call_without_a_mark(text: str, form: ToolFormat) -> None:
    if form.begin in text or text.lstrip().startswith("{"):
        return
    shown, found = read(form, list(text))

    assert shown == text
    assert not found


def test_arguments_come_as_they_are_written() -> None:
    one = reader(HERMES)
    one.push('<tool_call>\n{"name": "weather", "arguments": {"ci')
    _, news = one.push('ty": "Rome')

    assert news == (CallNews(index=0, arguments='ty": "Rome'),)


def test_ids_have_the_length_that_a_template_insists_on() -> None:
    assert len(call_id(123456789, 9)) == 9
    assert call_id(255, 0) == "call_00000000000000ff"


class Speaker:
    """Draws answers that a grammar admits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.grammars = GuidedGrammars(lambda: tokenizer, tokenizer.vocabulary, (1,))

    def say(self, grammar: Grammar, random: Random, most: int = 600) -> str:
        matcher, output = self.grammars.matcher(grammar), []
        while not matcher.complete(output) and len(output) < most:
            ids = [int(i) for i in np.flatnonzero(matcher.allowed(output))]
            output.append(1 if 1 in ids else random.choice(ids))
        return b"".join(map(self.tokenizer.token_bytes, output)).decode()

    def admits(self, grammar: Grammar, text: str) -> bool:
        matcher, output = self.grammars.matcher(grammar), []
        for token in (*self.tokenizer.encode(text, add_special=False), 1):
            if matcher.complete(output):
                return token == 1
            if not matcher.allowed(output)[token]:
                return False
            output.append(token)
        return True


@pytest.fixture
def speaker(small_tokenizer: Callable[[str], Tokenizer]) -> Speaker:
    return Speaker(small_tokenizer("byte_level"))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_an_answer_that_must_call_is_calls_that_fit_the_schemas(speaker: Speaker, form: ToolFormat) -> None:
    grammar = tool_grammar(form, use(required=True))
    for seed in range(8):
        shown, calls = read(form, [speaker.say(grammar, Random(seed))])

        assert shown.strip() == ""
        assert calls
        for call in calls:
            schema = next(t.parameters for t in TOOLS if t.name == call.name)
            jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_an_answer_that_may_call_is_text_or_calls_and_nothing_between(speaker: Speaker, form: ToolFormat) -> None:
    grammar = tool_grammar(form, use())
    good = written(form, [("weather", {"city": "Rome"})])
    bad = written(form, [("weather", {"town": "Rome"})])

    assert speaker.admits(grammar, "It rains.")
    assert speaker.admits(grammar, good)
    assert not speaker.admits(grammar, bad)
    assert not speaker.admits(grammar, written(form, [("rockets", {})]))


def test_one_call_at_most_without_parallel_calls(speaker: Speaker) -> None:
    twice = written(HERMES, [("time", {}), ("time", {})])

    assert speaker.admits(tool_grammar(HERMES, use(required=True)), twice)
    assert not speaker.admits(tool_grammar(HERMES, use(required=True, parallel=False)), twice)


def test_only_named_tools_can_be_called(speaker: Speaker) -> None:
    grammar = tool_grammar(HERMES, tool_use(TOOLS, "required", ["time"], parallel=True))

    assert speaker.admits(grammar, written(HERMES, [("time", {})]))
    assert not speaker.admits(grammar, written(HERMES, [("weather", {"city": "Rome"})]))


def test_an_answer_of_a_schema_may_stand_beside_calls(speaker: Speaker) -> None:
    grammar = tool_grammar(HERMES, use(), schema_grammar(WEATHER))

    assert speaker.admits(grammar, '{"city":"Rome"}')
    assert speaker.admits(grammar, written(HERMES, [("time", {})]))
    assert not speaker.admits(grammar, "It rains.")


def test_references_of_a_tools_schema_follow_it(speaker: Speaker) -> None:
    tree = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}},
        "required": ["v"],
        "additionalProperties": False,
    }
    tools = (Tool(name="grow", parameters=tree),)
    grammar = tool_grammar(HERMES, tool_use(tools, "required", None, parallel=False))
    validate(grammar)

    assert speaker.admits(grammar, written(HERMES, [("grow", {"v": 1, "next": {"v": 2}})]))
    assert not speaker.admits(grammar, written(HERMES, [("grow", {"v": 1, "next": {"w": 2}})]))


@pytest.mark.parametrize(
    ("tools", "choice", "named", "param"),
    [
        ((*TOOLS, Tool(name="time")), "auto", None, "tools"),
        (TOOLS, "required", ["rain"], "tool_choice"),
        ((), "required", None, "tool_choice"),
    ],
    ids=["twice the same name", "a name that is not there", "a call of nothing"],
)
def test_tools_that_contradict_each_other_are_refused(
    tools: tuple[Tool, ...], choice: str, named: list[str] | None, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        tool_use(tools, choice, named, parallel=True)

    assert refused.value.param == param


def test_a_format_whose_calls_are_the_whole_answer_takes_no_answer_beside_them() -> None:
    with pytest.raises(InvalidRequestError):
        tool_grammar(LLAMA_3, use(), JSON_OBJECT)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('{% for t in tools %}{% endfor %}<tool_call>\n{"name": x, "arguments": y}', "hermes"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}[TOOL_CALLS][ARGS]", "mistral-named"),
        ("{{ tools }}<|tool_call|>", "phi4"),
        ('{{ tools }}"parameters": ', "llama3"),
        ("{{ tools }} in some other way", "told"),
    ],
)
def test_the_format_is_read_off_the_template(template: str, name: str) -> None:
    form = format_of(template, {"[TOOL_CALLS]": 5, "<|im_end|>": 2}, takes_tools=True)

    assert form.name == name
    assert form.special == ({"[TOOL_CALLS]": 5} if "mistral" in name else {})


def test_a_model_whose_template_shows_no_tools_is_told_of_them_in_words() -> None:
    shown = [tool.shown() for tool in TOOLS]
    call = {"id": "c", "type": "function", "function": {"name": "time", "arguments": {}}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c"},
    ]
    form = format_of("plain", {}, takes_tools=False)

    system, asked, called, result = told(messages, shown, form)

    assert system["role"] == "system"
    assert '"name": "weather"' in str(system["content"])
    assert asked == messages[0]
    assert called["content"] == '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert result == {"role": "user", "content": "<tool_response>\nnoon\n</tool_response>"}
    assert told(messages[:1], [], form) == messages[:1]
    assert msgspec.json.encode(called)
