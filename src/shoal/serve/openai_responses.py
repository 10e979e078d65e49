"""What clients of OpenAI's Responses API send and get, in its shapes."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from shoal.runtime.request import Priority
from shoal.serve.body import FieldRules
from shoal.serve.openai_requests import MAX_TOP_LOGPROBS, Count, Patience, Seed, Share, Temperature, Tier
from shoal.serve.openai_tools import ToolName

Status = Literal["in_progress", "completed", "incomplete"]


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message: `input_text` of the caller, `output_text` of the model."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    type: Literal["message"] = "message"


class InputCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of an earlier turn."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str


Item = InputMessage | InputCall | InputResult


class ResponseFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function that may be called."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ResponseChoice(msgspec.Struct, frozen=True, kw_only=True):
    """This function must be called."""

    type: Literal["function"]
    name: str


class TextFormatting(msgspec.Struct, frozen=True, kw_only=True):
    """What the text must look like; `name`, `schema` and `strict` belong to `json_schema`."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: ToolName | None = None
    schema: dict[str, object] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The form of the text."""

    format: TextFormatting | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Answer *input*; `previous_response_id` continues a conversation that this gateway still remembers."""

    model: str
    input: str | Annotated[list[dict[str, object]], Meta(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    text: TextConfig | None = None
    tools: list[ResponseFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: Tier | None = None
    seed: Seed | None = None
    """An extension, as are `priority` and `timeout_s`."""
    priority: Priority | None = None
    timeout_s: Patience | None = None


RESPONSES_RULES = FieldRules(
    harmless=frozenset(
        {
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "include",
            "reasoning",
            "text.verbosity",
        }
        | {"stream_options", "stream_options.include_obfuscation", "max_tool_calls"}
    ),
    refused={
        "background": ((False,), "answers are made while the caller waits"),
        "conversation": ((), "send previous_response_id, or the whole input"),
        "prompt": ((), "there are no stored prompts: send instructions and input"),
        "truncation": (("disabled",), "a prompt that is too long is refused: shorten it"),
    },
)


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """Text of the model."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[object] = []
    logprobs: list[object] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """The model's turn."""

    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A function that the caller is to run."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | OutputCall


class InputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens read."""

    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens written."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens in, tokens out."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, whole or under way."""

    id: str
    created_at: int
    model: str
    status: Status
    output: list[OutputItem]
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    tools: list[ResponseFunction]
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice
    parallel_tool_calls: bool
    text: TextConfig
    metadata: dict[str, str]
    store: bool
    usage: ResponseUsage | None = None
    incomplete_details: IncompleteDetails | None = None
    error: None = None
    object: Literal["response"] = "response"
    background: bool = False
    truncation: Literal["disabled"] = "disabled"


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of a stream; which fields it has follows from its type."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[object] | UnsetType = UNSET
