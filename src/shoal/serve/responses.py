"""`/v1/responses`: a conversation's next turn, as items; the same path as a chat, in another dress."""

from collections.abc import Awaitable, Callable, Iterable

import msgspec
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody

from shoal.serve.answer import Door, answer
from shoal.serve.assemble import Piece
from shoal.serve.job import Job
from shoal.serve.live import EVENTS, JSON, Connection, LiveAnswer
from shoal.serve.openai_responses import (
    RESPONSES_RULES,
    Response,
    ResponseEvent,
    ResponsesRequest,
    TextConfig,
    TextFormatting,
)
from shoal.serve.response_items import as_chat, input_messages, output_messages
from shoal.serve.response_writer import ResponseWriter
from shoal.serve.strict import strict
from shoal.serve.text import documented, new_stamp, once_of, prepared
from shoal.serve.turns import Turns

_PLAIN = TextConfig(format=TextFormatting(type="text"))


def response_routes(door: Door) -> list[HTTPRouteHandler]:
    """The handler, with the conversations that it remembers."""
    turns = Turns()

    @post(
        "/v1/responses",
        status_code=200,
        dto=strict(ResponsesRequest, RESPONSES_RULES),
        responses=documented(Response),
        summary="Answer a conversation's next turn",
        tags=["OpenAI"],
    )
    async def responses(data: JSONBody[ResponsesRequest]) -> LiveAnswer:
        before = turns.find(data.previous_response_id) if data.previous_response_id else ()
        messages = (*before, *input_messages(data.input))
        job = await prepared(door, as_chat(data, messages), new_stamp(door, "resp"))
        writer = ResponseWriter(_blank(data, job), lambda prefix: f"{prefix}_{door.node.draw():016x}")

        def keep() -> None:
            if data.store is not False:
                turns.keep(job.id, (*messages, *output_messages(writer.done)))

        name = ((b"x-request-id", job.id.encode()),)
        if data.stream:
            return LiveAnswer(_streamed(door, job, writer, keep), EVENTS + name, once_of(door, data))
        return LiveAnswer(_whole(door, job, writer, keep), JSON + name, once_of(door, data))

    return [responses]


def _blank(data: ResponsesRequest, job: Job) -> Response:
    sampling = job.requests[0].sampling
    return Response(
        id=job.id,
        created_at=job.created,
        model=job.model.name,
        status="in_progress",
        output=[],
        instructions=data.instructions,
        previous_response_id=data.previous_response_id,
        max_output_tokens=data.max_output_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        tools=data.tools or [],
        tool_choice=data.tool_choice or "auto",
        parallel_tool_calls=data.parallel_tool_calls is not False,
        text=data.text or _PLAIN,
        metadata=data.metadata or {},
        store=data.store is not False,
    )


def _streamed(
    door: Door, job: Job, writer: ResponseWriter, keep: Callable[[], None]
) -> Callable[[Connection], Awaitable[None]]:
    async def work(connection: Connection) -> None:
        async def send(events: Iterable[ResponseEvent]) -> None:
            for event in events:
                await connection.write(_framed(event), more=True)

        async with door.admitted():
            began = False

            async def emit(_index: int, piece: Piece) -> None:
                nonlocal began
                if not began:  # an error before the first news keeps its status code
                    began = True
                    await send(writer.begin())
                await send(writer.news(piece))

            usage = await answer(door, job, emit)
        keep()
        await send(writer.end(usage))
        await connection.write(b"", more=False)

    return work


def _whole(
    door: Door, job: Job, writer: ResponseWriter, keep: Callable[[], None]
) -> Callable[[Connection], Awaitable[None]]:
    async def work(connection: Connection) -> None:
        async def emit(_index: int, piece: Piece) -> None:
            for _ in writer.news(piece):
                pass

        async with door.admitted():
            usage = await answer(door, job, emit)
        keep()
        await connection.write(msgspec.json.encode(writer.whole(usage)), more=False)

    return work


def _framed(event: ResponseEvent) -> bytes:
    return b"event: " + event.type.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
