"""From a parsed OpenAI request to requests of token ids: pure, once the prompt is encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from shoal.errors import ContextLengthError, InvalidRequestError
from shoal.ids import RequestId
from shoal.model.spec import ModelKind
from shoal.runtime.grammar import Grammar, check_grammar
from shoal.runtime.request import GenerateRequest, Priority, SamplingParams
from shoal.runtime.sampling import check_sampling
from shoal.serve.openai_requests import ChatRequest, CompletionRequest, ContentPart, Message, StreamOptions
from shoal.serve.openai_tools import AssistantCall
from shoal.serve.ports import Limits, ServedModel, TextCodec
from shoal.serve.tools import NO_TOOLS, ToolUse

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""
_MASK63, _MASK64 = 2**63 - 1, 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that one HTTP request asks of a model; the position of a request in `requests` is its choice's index.

    `continues` says that an answer carries on its prompt's text, so that a space between the two belongs to it.
    """

    id: str
    created: int
    model: ServedModel
    codec: TextCodec
    requests: tuple[GenerateRequest, ...]
    prompt_tokens: int
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continues: bool = False
    tools: ToolUse = NO_TOOLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What makes this request differ from an equal one: its id, the time for `created`, a seed for callers who gave none."""

    id: str
    created: int
    seed: int


def text_model(model: ServedModel) -> TextCodec:
    """The codec of a model that writes text; raises InvalidRequestError for other kinds."""
    if model.codec is None or model.spec.kind is not ModelKind.CAUSAL_LM:
        raise InvalidRequestError(
            f"model {model.name} does not write text (it is of kind {model.spec.kind.value})",
            hint="ask /v1/embeddings" if model.encoder else "GET /v1/models shows what each model is for",
            param="model",
        )
    return model.codec


def text_of(parts: str | Sequence[ContentPart]) -> str:
    """The text of a message."""
    return parts if isinstance(parts, str) else "\n".join(part.text for part in parts)


def chat_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages as chat templates expect them: text content, calls with arguments as values, no absent fields.

    Raises InvalidRequestError.
    """
    plain: list[dict[str, object]] = []
    for position, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            raise InvalidRequestError(
                "content is required",
                hint="only messages with tool_calls may lack it",
                param=f"messages[{position}].content",
            )
        content = text_of(message.content or "")
        role = "system" if message.role == "developer" else message.role
        extras: dict[str, object] = {
            "name": message.name,
            "tool_calls": [_past_call(call, position) for call in message.tool_calls or ()] or None,
            "tool_call_id": message.tool_call_id,
        }
        plain.append({"role": role, "content": content} | {k: v for k, v in extras.items() if v is not None})
    return plain


def _past_call(call: AssistantCall, position: int) -> dict[str, object]:
    """A call of an earlier turn.  Templates write its arguments as JSON themselves, so they want the value."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(
            f"the arguments of call {call.id} are not JSON: {error}",
            hint="send them as they came, or {}",
            param=f"messages[{position}].tool_calls",
        ) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def chat_job(
    body: ChatRequest,
    model: ServedModel,
    prompt: tuple[int, ...],
    stamp: Stamp,
    tools: ToolUse = NO_TOOLS,
    grammar: Grammar | None = None,
    predicted: tuple[int, ...] = (),
) -> Job:
    """The job of a chat request whose rendered conversation is *prompt*; raises InvalidRequestError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError(
            "top_logprobs needs logprobs: true", hint="send both, or neither", param="top_logprobs"
        )
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequestError("max_tokens and max_completion_tokens differ", hint="send one", param="max_tokens")
    max_tokens = body.max_completion_tokens or body.max_tokens
    sampling = sampling_of(body, stamp.seed, (body.top_logprobs or 0) if body.logprobs else None)
    job = _job(body, model, (prompt,), sampling, (max_tokens, "messages"), stamp)
    told = tuple(msgspec.structs.replace(r, predicted=predicted) for r in job.requests)
    return replace(job, tools=tools, requests=constrained(told, grammar))


def completion_job(
    body: CompletionRequest,
    model: ServedModel,
    prompts: tuple[tuple[int, ...], ...],
    stamp: Stamp,
    grammar: Grammar | None = None,
) -> Job:
    """The job of a completion request with its encoded *prompts*; raises InvalidRequestError."""
    sampling = sampling_of(body, stamp.seed, body.logprobs)
    job = _job(body, model, prompts, sampling, (body.max_tokens or COMPLETION_MAX_TOKENS, "prompt"), stamp)
    return replace(job, continues=True, requests=constrained(job.requests, grammar))


def constrained(requests: tuple[GenerateRequest, ...], grammar: Grammar | None) -> tuple[GenerateRequest, ...]:
    """*requests* whose answers follow *grammar*; raises InvalidRequestError for what contradicts it."""
    if grammar is None:
        return requests
    for request in requests:
        check_grammar(grammar, ignore_eos=request.ignore_eos)
    return tuple(msgspec.structs.replace(request, grammar=grammar) for request in requests)


def check_choices(prompts: int, n: int, limits: Limits) -> None:
    """Raise InvalidRequestError when one request asks for too many answers."""
    if prompts * n > limits.choices:
        raise InvalidRequestError(
            f"{prompts} prompts x n = {n} are {prompts * n} answers, {limits.choices} are allowed",
            hint="send several requests",
            param="n" if n > 1 else "prompt",
        )


def sampling_of(body: ChatRequest | CompletionRequest, seed: int, logprobs: int | None) -> SamplingParams:
    """Sampling as asked; what is absent takes OpenAI's default (temperature 1, not greedy)."""
    return SamplingParams(
        temperature=_or(body.temperature, 1.0),
        top_k=body.top_k or 0,
        top_p=_or(body.top_p, 1.0),
        min_p=body.min_p or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_bias(body.logit_bias or {}),
        seed=(seed if body.seed is None else body.seed) & _MASK63,
        logprobs=logprobs,
    )


def derived_seed(seed: int, index: int) -> int:
    """The seed of choice *index*: the caller's own for choice 0, else mixed as in SplitMix64's output function."""
    if index == 0:
        return seed
    x = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (x ^ (x >> 31)) & _MASK63


def answer_tokens(prompt_tokens: int, max_tokens: int | None, context_tokens: int, param: str) -> int:
    """How long the answer may be; raises ContextLengthError when it does not fit behind the prompt."""
    room = context_tokens - prompt_tokens
    if room < 1 or (max_tokens or 1) > room:
        asked = f" and {max_tokens} for the answer" if max_tokens else ""
        fault = "max_tokens" if room >= 1 else param
        raise ContextLengthError(
            f"the context holds {context_tokens} tokens, the request needs {prompt_tokens} for the prompt{asked}",
            hint=f"ask for at most {room} tokens" if room >= 1 else f"shorten the prompt by {1 - room} tokens or more",
            param=fault,
        )
    return max_tokens or room


def _job(
    body: ChatRequest | CompletionRequest,
    model: ServedModel,
    prompts: tuple[tuple[int, ...], ...],
    sampling: SamplingParams,
    length: tuple[int | None, str],
    stamp: Stamp,
) -> Job:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options needs stream: true", hint="send both, or neither", param="stream_options"
        )
    _check_prompts(prompts, model, length[1])
    check_sampling(sampling, model.spec.vocabulary)
    n = body.n or 1
    requests = [
        GenerateRequest(
            request=RequestId(f"{stamp.id}-{at * n + copy}"),
            deployment=model.name,
            prompt=prompt,
            max_tokens=answer_tokens(len(prompt), length[0], model.spec.context_tokens, length[1]),
            sampling=msgspec.structs.replace(sampling, seed=derived_seed(sampling.seed, copy)),
            stop_token_ids=model.spec.eos_token_ids,
            ignore_eos=bool(body.ignore_eos),
            priority=body.priority or (Priority.BATCH if body.service_tier == "flex" else Priority.INTERACTIVE),
            deadline_s=body.timeout_s,
            reproducible=body.seed is not None,
        )
        for at, prompt in enumerate(prompts)
        for copy in range(n)
    ]
    return Job(
        id=stamp.id,
        created=stamp.created,
        model=model,
        codec=text_model(model),
        requests=tuple(requests),
        prompt_tokens=sum(map(len, prompts)),
        stops=_stops(body.stop),
        stream=bool(body.stream),
        include_usage=_include_usage(body.stream_options),
    )


def _check_prompts(prompts: Sequence[Sequence[int]], model: ServedModel, param: str) -> None:
    vocabulary = model.spec.vocabulary
    for prompt in prompts:
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens", hint="send at least one character", param=param)
        if vocabulary and max(prompt) >= vocabulary:
            raise InvalidRequestError(f"token id {max(prompt)} is outside [0, {vocabulary})", param=param)


def _include_usage(options: StreamOptions | None) -> bool:
    return options is not None and bool(options.include_usage)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _bias(bias: dict[str, float]) -> dict[int, float]:
    wrong = [name for name in bias if not (name.isascii() and name.isdigit() and len(name) <= 10)]
    if wrong:
        raise InvalidRequestError(f"logit_bias has {wrong[0]!r} where a token id belongs", param="logit_bias")
    return {int(name): value for name, value in bias.items()}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
