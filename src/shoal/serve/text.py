"""`/v1/chat/completions` and `/v1/completions`: parse, encode, answer, render."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from anyio import to_thread
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from shoal.errors import InvalidRequestError
from shoal.fleet.faults import FaultBody
from shoal.serve.answer import Door, answer
from shoal.serve.assemble import Piece
from shoal.serve.constraints import chat_tools, checked
from shoal.serve.formats import answer_grammar
from shoal.serve.job import Job, Stamp, chat_job, chat_messages, check_choices, completion_job, text_model, text_of
from shoal.serve.live import DONE, EVENTS, JSON, Connection, LiveAnswer, Once
from shoal.serve.openai_answers import ChatCompletion, Completion
from shoal.serve.openai_requests import CHAT_RULES, COMPLETION_RULES, ChatRequest, CompletionRequest
from shoal.serve.ports import TextCodec
from shoal.serve.render import ChatRenderer, CompletionRenderer, Renderer, joined
from shoal.serve.strict import strict

_encode = msgspec.json.encode
Prompt = str | Sequence[int]


def text_routes(door: Door) -> list[HTTPRouteHandler]:
    """The handlers of the two text protocols."""

    @post(
        "/v1/chat/completions",
        status_code=200,
        dto=strict(ChatRequest, CHAT_RULES),
        responses=documented(ChatCompletion),
        summary="Continue a conversation",
        tags=["OpenAI"],
    )
    async def chat_completions(data: JSONBody[ChatRequest]) -> LiveAnswer:
        job = await prepared(door, data, new_stamp(door, "chatcmpl"))
        return live(door, job, ChatRenderer(job), once_of(door, data))

    @post(
        "/v1/completions",
        status_code=200,
        dto=strict(CompletionRequest, COMPLETION_RULES),
        responses=documented(Completion),
        summary="Continue a text",
        tags=["OpenAI"],
    )
    async def completions(data: JSONBody[CompletionRequest]) -> LiveAnswer:
        model = door.node.deployments.get(data.model)
        codec = text_model(model)
        prompts = split_prompts(data.prompt, "prompt")
        check_choices(len(prompts), data.n or 1, door.limits)
        grammar = await checked(answer_grammar(data.response_format))
        encoded = await to_thread.run_sync(encode_prompts, codec, prompts)
        job = completion_job(data, model, encoded, new_stamp(door, "cmpl"), grammar)
        return live(door, job, CompletionRenderer(job), once_of(door, data))

    return [chat_completions, completions]


async def prepared(door: Door, data: ChatRequest, stamp: Stamp) -> Job:
    """The job of a chat request: its conversation rendered, its tools and its format checked; raises what is wrong with it."""
    model = door.node.deployments.get(data.model)
    codec = text_model(model)
    check_choices(1, data.n or 1, door.limits)
    messages, tools = chat_messages(data.messages), chat_tools(data)
    grammar = await checked(answer_grammar(data.response_format), tools, codec.tool_format)
    prompt = await to_thread.run_sync(codec.encode_chat, messages, tools.shown())
    foretold = text_of(data.prediction.content) if data.prediction else ""
    predicted = await to_thread.run_sync(codec.encode_answer, foretold) if foretold else ()
    return chat_job(data, model, prompt, stamp, tools, grammar, predicted[: model.spec.context_tokens])


def split_prompts(given: str | list[str | int | list[int]], param: str) -> list[Prompt]:
    """One prompt or several: a text, token ids, or a list of either; raises InvalidRequestError for a mixture with numbers."""
    if isinstance(given, str):
        return [given]
    numbers = [x for x in given if isinstance(x, int)]
    if numbers and len(numbers) < len(given):
        raise InvalidRequestError(
            f"{param} mixes token ids with texts or lists",
            hint="send a text, a list of texts, a list of token ids, or a list of such lists",
            param=param,
        )
    if numbers:
        _check_ids(numbers, param)
        return [numbers]
    return [x for x in given if not isinstance(x, int)]


def encode_prompts(codec: TextCodec, prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each prompt; ids are taken as they are."""
    return tuple(codec.encode(p) if isinstance(p, str) else tuple(p) for p in prompts)


def new_stamp(door: Door, prefix: str) -> Stamp:
    """A fresh id, the time and a seed."""
    return Stamp(id=f"{prefix}-{door.node.draw():016x}", created=int(door.node.unix_s()), seed=door.node.draw())


def once_of(door: Door, data: msgspec.Struct) -> Once:
    """What makes two requests the same."""
    return Once(door.retries, hashlib.sha256(msgspec.json.encode(data)).digest())


def live(door: Door, job: Job, renderer: Renderer, once: Once) -> LiveAnswer:
    """The response that runs *job*; *once* where it is asked for again."""
    name = ((b"x-request-id", job.id.encode()),)
    if job.stream:
        return LiveAnswer(_streamed(door, job, renderer), EVENTS + name, once)
    return LiveAnswer(_whole(door, job, renderer), JSON + name, once)


def documented(kind: type[msgspec.Struct]) -> dict[int, ResponseSpec]:
    """What the OpenAPI page says about an endpoint's answers."""
    return {
        200: ResponseSpec(kind, description="The answer, or server-sent events of its chunks", generate_examples=False),
        400: ResponseSpec(FaultBody, description="What is wrong with the request", generate_examples=False),
        503: ResponseSpec(FaultBody, description="Try again after Retry-After seconds", generate_examples=False),
    }


def _streamed(door: Door, job: Job, renderer: Renderer) -> Callable[[Connection], Awaitable[None]]:
    async def work(connection: Connection) -> None:
        opened: set[int] = set()

        async def emit(index: int, piece: Piece) -> None:
            if index not in opened:
                opened.add(index)
                opening = renderer.opening(index)
                if opening is not None:
                    await connection.event(_encode(opening))
            await connection.event(_encode(renderer.news(index, piece)))

        async with door.admitted():
            usage = await answer(door, job, emit)
        if job.include_usage:
            await connection.event(_encode(renderer.usage(usage)))
        await connection.write(DONE, more=False)

    return work


def _whole(door: Door, job: Job, renderer: Renderer) -> Callable[[Connection], Awaitable[None]]:
    async def work(connection: Connection) -> None:
        pieces: list[list[Piece]] = [[] for _ in job.requests]

        async def emit(index: int, piece: Piece) -> None:
            pieces[index].append(piece)

        async with door.admitted():
            usage = await answer(door, job, emit)
        await connection.write(_encode(renderer.whole([joined(p) for p in pieces], usage)), more=False)

    return work


def _check_ids(ids: Sequence[int], param: str) -> None:
    if min(ids) < 0:
        raise InvalidRequestError(f"token id {min(ids)} is negative", param=param)
