"""Tools that a request offers, and the language of answers that may call them.

A call is never free text: from its first mark on the answer follows the tool's schema, whoever the model is.  With `auto` it may
write anything until then; with `required` it can do nothing but call.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.errors import InvalidRequestError
from shoal.model.tool_format import Layout, ToolFormat
from shoal.runtime.grammar import JSON_WHITESPACE, Grammar, GrammarKind

Schema = Mapping[str, object]
NO_PARAMETERS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
_TEXT = r"/(.|\n)*/"
_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are no schemas."""
_NOT_JSON = r"/[^{](.|\n)*/"
"""Text of a model whose calls are bare objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that may be called.  `strict`: a schema that cannot be followed to the letter is refused."""

    name: str
    description: str | None = None
    parameters: Schema = field(default_factory=lambda: NO_PARAMETERS)
    strict: bool = False

    def shown(self) -> dict[str, object]:
        """As chat templates expect it."""
        said = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **said, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request offers: all *tools* are shown, those named in *callable* may be called."""

    tools: tuple[Tool, ...] = ()
    callable: frozenset[str] = frozenset()
    required: bool = False
    parallel: bool = True

    @property
    def wanted(self) -> bool:
        """Whether anything may be called at all."""
        return bool(self.callable)

    def shown(self) -> list[dict[str, object]]:
        """The tools as a chat template expects them."""
        return [tool.shown() for tool in self.tools] if self.wanted else []


NO_TOOLS = ToolUse()


def tool_use(tools: Sequence[Tool], choice: str, named: Sequence[str] | None, *, parallel: bool) -> ToolUse:
    """*choice* is none, auto or required; *named* are those that may be called (None: all).  Raises InvalidRequestError."""
    known = [tool.name for tool in tools]
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequestError(f"two tools are called {twice}", hint="give each its own name", param="tools")
    unknown = next((name for name in named or () if name not in known), None)
    if unknown is not None:
        raise InvalidRequestError(
            f"tool_choice names {unknown!r}, tools has {', '.join(known) or 'none'}", param="tool_choice"
        )
    if choice == "required" and not (known if named is None else named):
        raise InvalidRequestError(
            "a tool must be called and none is there", hint="send tools, or tool_choice: auto", param="tool_choice"
        )
    offered = frozenset(() if choice == "none" else known if named is None else named)
    return ToolUse(tools=tuple(tools), callable=offered, required=choice == "required", parallel=parallel)


def tool_grammar(form: ToolFormat, use: ToolUse, answer: Grammar | None = None) -> Grammar:
    """The language of answers that may call tools; *answer* is what they look like otherwise (None: free text).

    Raises InvalidRequestError for an *answer* that cannot stand beside calls.
    """
    tools = [tool for tool in use.tools if tool.name in use.callable]
    rules = [
        f"call: {_call(form, parallel=use.parallel)}",
        f"one: {' | '.join(f't{at}' for at in range(len(tools)))}",
        *(f"t{at}: {_one(form, tool)}" for at, tool in enumerate(tools)),
    ]
    calls = _calls(form, parallel=use.parallel)
    if use.required:
        head = [f"start: {calls}"]
    elif answer is not None:
        head = [f"start: answer | {calls}", f"answer: %json {_beside_calls(form, answer)}"]
    else:
        head = _auto(form, parallel=use.parallel)
    return Grammar(kind=GrammarKind.LARK, text="\n".join([*head, *rules]))


def _calls(form: ToolFormat, *, parallel: bool) -> str:
    """Calls and nothing else.  A list holds several by itself, and a bare object is the whole answer."""
    several = parallel and form.layout in (Layout.OBJECT, Layout.NAMED)
    return f"call ({_text(form.between)} call)*" if several else "call"


def _auto(form: ToolFormat, *, parallel: bool) -> list[str]:
    """Text, in which calls may stand."""
    if form.layout is Layout.BARE:
        return ["start: text | call", f"text: {_NOT_JSON}"]
    several = parallel and form.layout is not Layout.LIST
    if form.begin in form.special:  # no text can hold the mark
        return [f"start: text ({'call text)*' if several else 'call)?'}", f"text: {_TEXT}"]
    # The text before a mark ends at the first one: whatever comes behind it must be a call.
    return [
        f"start: {'(head rest)* text' if several else 'text | head rest'}",
        f"text: {_TEXT}",
        f"head[lazy]: TEXT {_text(form.begin)}",
        f"TEXT: {_TEXT}",
        f"rest: {_behind(form, parallel=parallel)}",
    ]


def _call(form: ToolFormat, *, parallel: bool) -> str:
    if form.layout is Layout.BARE:
        return f"{_mark(form, form.begin)}? one" if form.begin in form.special else "one"
    return f"{_mark(form, form.begin)} {_behind(form, parallel=parallel)}"


def _behind(form: ToolFormat, *, parallel: bool) -> str:
    """What follows the first mark of a call."""
    match form.layout:
        case Layout.LIST:
            inside = '"[" one (", " one)* "]"' if parallel else '"[" one "]"'
        case Layout.OBJECT | Layout.NAMED | Layout.BARE:
            inside = "one"
    gap = _text(form.inside) if form.inside else ""
    return " ".join(part for part in (gap, inside, gap, _mark(form, form.end) if form.end else "") if part)


def _one(form: ToolFormat, tool: Tool) -> str:
    """One tool's name and arguments."""
    rest = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE, "lenient": not tool.strict}}
    if form.layout is Layout.NAMED:
        return f"{_text(tool.name)} {_mark(form, form.divider)} %json {_json({**tool.parameters, **rest})}"
    properties = {
        form.name_key: {"const": tool.name},
        form.arguments_key: moved(tool.parameters, f"#/properties/{form.arguments_key}"),
    }
    return "%json " + _json(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
            **rest,
        }
    )


def moved(schema: object, to: str) -> object:
    """*schema* as a part of another at the pointer *to*: references to its own root follow it there."""
    match schema:
        case {"$ref": str(ref), **rest} if ref.startswith("#"):
            return {"$ref": to + ref[1:], **{key: moved(value, to) for key, value in rest.items()}}
        case dict():
            return {key: value if key in _VALUES else moved(value, to) for key, value in schema.items()}
        case [*items]:
            return [moved(item, to) for item in items]
        case _:
            return schema


def _beside_calls(form: ToolFormat, answer: Grammar) -> str:
    if answer.kind != GrammarKind.JSON_SCHEMA or form.layout is Layout.BARE:
        raise InvalidRequestError(
            f"this model's calls ({form.name}) cannot stand beside an answer of this format",
            hint="send tools or response_format, or tool_choice: required",
            param="response_format",
        )
    schema = json.loads(answer.text)
    return _json({**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})


def _mark(form: ToolFormat, mark: str) -> str:
    return f"<[{form.special[mark]}]>" if mark in form.special else _text(mark)


def _text(text: str) -> str:
    return json.dumps(text)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
