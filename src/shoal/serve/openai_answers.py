"""What OpenAI's clients get, in OpenAI's shapes."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Finish = Literal["stop", "length", "tool_calls"]


class CompletionDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that were guessed before they were computed: `accepted` ones are part of the answer, `rejected` ones are not."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class PromptDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the prompt that need not be computed: an earlier request began alike."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens in, tokens out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: CompletionDetails = CompletionDetails()


class TopToken(msgspec.Struct, frozen=True, kw_only=True):
    """A likely token; `bytes` because it may be half a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the answer and what else was likely there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopToken]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens whose text this answer or chunk shows."""

    content: list[ChatToken]
    refusal: None = None


class AnswerFunction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is called; `arguments` is JSON as text, in a stream a part of it."""

    name: str | UnsetType = UNSET
    arguments: str


class AnswerCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the caller is to run."""

    id: str
    function: AnswerFunction
    type: Literal["function"] = "function"


class CallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """News of a call; `id`, `type` and the name come first and once."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: AnswerFunction


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's turn; `content` is null where it only calls tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[AnswerCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer at once."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    system_fingerprint: str


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """News of one answer."""

    index: int
    delta: ChatDelta
    finish_reason: Finish | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; `usage` is there only when it was asked for, and filled in the last one."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    system_fingerprint: str


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in the older shape: parallel lists; offsets count characters from the answer's start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, or news of it in a stream."""

    index: int
    text: str
    finish_reason: Finish | None
    logprobs: TextLogprobs | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer at once, or one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A served model; the fields after `owned_by` are ours."""

    id: str
    created: int
    owned_by: str = "shoal"
    object: Literal["model"] = "model"
    kind: str
    architecture: str
    licence: str
    context_tokens: int
    embeddings: bool


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every served model."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"
