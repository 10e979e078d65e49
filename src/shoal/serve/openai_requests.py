"""What OpenAI's clients may send, field by field, and which of OpenAI's fields we treat how.

Ranges are OpenAI's where it has them.  `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are extensions that the open
servers share, `priority` and `timeout_s` are ours (send them as `extra_body` with OpenAI's client).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shoal.runtime.request import Priority
from shoal.serve.body import FieldRules
from shoal.serve.openai_tools import AssistantCall, ResponseFormat, ToolChoice, Tools

MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Repetition = Annotated[float, Meta(ge=0.01, le=100.0)]
Bias = dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
Tier = Literal["auto", "default", "flex", "priority", "scale"]
Patience = Annotated[float, Meta(gt=0.0, le=86_400.0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Meta(min_length=1)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is told; only together with `stream`."""

    include_usage: bool | None = None


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer will mostly be: a text that is being edited, for example."""

    type: Literal["content"]
    content: str | list[ContentPart]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn.  `developer` is read as `system`; several text parts are joined by line breaks."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[AssistantCall] | None = None
    tool_call_id: str | None = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Continue a conversation.  Without `max_tokens` the answer may fill the context."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    """Makes the answer faster where it is right, and changes nothing of it."""
    ignore_eos: bool | None = None
    service_tier: Tier | None = None
    """`flex` is batch work; all others are alike here."""
    priority: Priority | None = None
    """Whether somebody waits for the answer: before `service_tier`."""
    timeout_s: Patience | None = None
    """The answer is of no use after so long: refused at once where that can be foreseen, ended when the time has passed."""


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Continue a text, several texts, or token ids.  Without `max_tokens` the answer has 16 tokens, as in OpenAI's API."""

    model: str
    prompt: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    """Here an extension."""
    ignore_eos: bool | None = None
    service_tier: Tier | None = None
    """`flex` is batch work; all others are alike here."""
    priority: Priority | None = None
    """Whether somebody waits for the answer: before `service_tier`."""
    timeout_s: Patience | None = None
    """The answer is of no use after so long: refused at once where that can be foreseen, ended when the time has passed."""


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts (or token ids) to vectors."""

    model: str
    input: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None


_HARMLESS = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key",
                       "prompt_cache_retention", "prompt_cache_options", "stream_options.include_obfuscation"})  # fmt: skip

CHAT_RULES = FieldRules(
    harmless=_HARMLESS
    | {"reasoning_effort", "verbosity"}
    | {f"messages.{f}" for f in ("refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content")}
    | {"messages.content.cache_control", "messages.content.prompt_cache_breakpoint"},
    refused={
        "audio": ((), "models here give text"),
        "modalities": ((["text"],), "models here give text"),
        "functions": (([],), "send tools instead"),
        "function_call": (("none", "auto"), "send tool_choice instead"),
        "web_search_options": ((), "there is no web search"),
        "moderation": ((), "there is no moderation"),
    },
)
COMPLETION_RULES = FieldRules(
    harmless=_HARMLESS,
    refused={
        "best_of": ((1,), "ask for n answers and choose among them"),
        "echo": ((False,), "log-probabilities of a prompt are not computed; put the prompt before the answer yourself"),
        "suffix": (("",), "models here continue a text, they do not fill gaps"),
    },
)
EMBEDDINGS_RULES = FieldRules(
    harmless=_HARMLESS | {"service_tier"},
    refused={"dimensions": ((), "a model's vectors have one length; cut them yourself if it allows that")},
)
