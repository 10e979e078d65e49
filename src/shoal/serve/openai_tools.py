"""What OpenAI's clients may ask of an answer's form: JSON, a schema, calls of tools.

`{"type": "grammar"}` as a response format is an extension, in the shape that OpenAI gives the grammars of custom tools.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
MAX_TOOLS = 128


class FunctionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call; without `parameters` it takes none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


Tools = Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)]


class FunctionName(msgspec.Struct, frozen=True, kw_only=True):
    """Which function."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    """This one must be called."""

    function: FunctionName


class AllowedTool(msgspec.Struct, frozen=True, kw_only=True):
    """One of those that may be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True, kw_only=True):
    """Some of `tools`; `required`: at least one of them is called."""

    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class AllowedChoice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    """Only these may be called."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Free text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A schema with a name.  It is followed to the letter whatever `strict` says."""

    name: ToolName
    description: str | None = None
    schema: dict[str, object] | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that a schema describes."""

    json_schema: JsonSchema


class GrammarFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="grammar"):
    """Text of a language: a regular expression, or a context-free grammar in Lark's notation."""

    syntax: Literal["regex", "lark"]
    definition: Annotated[str, Meta(min_length=1)]


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | GrammarFormat


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What an assistant called; `arguments` is JSON as text."""

    name: str
    arguments: str


class AssistantCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of an earlier turn."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
