"""Between the items of the Responses API and the messages of a chat, in both directions: pure."""

from collections.abc import Sequence

import msgspec

from shoal.errors import InvalidRequestError
from shoal.serve.openai_requests import ChatRequest, Message
from shoal.serve.openai_responses import (
    InputCall,
    InputMessage,
    InputResult,
    Item,
    OutputCall,
    OutputItem,
    ResponseChoice,
    ResponsesRequest,
    TextFormatting,
)
from shoal.serve.openai_tools import (
    AssistantCall,
    CalledFunction,
    FunctionName,
    FunctionSpec,
    FunctionTool,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
)

_KINDS: dict[str, type[Item]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputResult,
}


def input_messages(given: str | Sequence[dict[str, object]]) -> tuple[Message, ...]:
    """The caller's items as messages; raises InvalidRequestError for one of a kind that models here know nothing of."""
    if isinstance(given, str):
        return (Message(role="user", content=given),)
    return joined([_message(_item(raw, at)) for at, raw in enumerate(given)])


def output_messages(output: Sequence[OutputItem]) -> tuple[Message, ...]:
    """The model's turn as a message."""
    texts = [part.text for item in output if not isinstance(item, OutputCall) for part in item.content]
    calls = [_called(item.call_id, item.name, item.arguments) for item in output if isinstance(item, OutputCall)]
    return (Message(role="assistant", content="\n".join(texts), tool_calls=calls or None),)


def joined(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Calls that follow each other, or their turn's text, are one turn, as chat templates expect them."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        if last is not None and last.role == "assistant" and message.tool_calls and message.content is None:
            turns[-1] = msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or ()), *message.tool_calls])
        else:
            turns.append(message)
    return tuple(turns)


def as_chat(body: ResponsesRequest, messages: Sequence[Message]) -> ChatRequest:
    """The chat request that asks for the same; *messages* hold the conversation without instructions."""
    told = [Message(role="system", content=body.instructions)] if body.instructions else []
    choice = body.tool_choice
    tools = [
        FunctionTool(
            type="function",
            function=FunctionSpec(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            ),
        )
        for tool in body.tools or ()
    ]
    return ChatRequest(
        model=body.model,
        messages=[*told, *messages],
        stream=body.stream,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        logprobs=body.top_logprobs is not None or None,
        top_logprobs=body.top_logprobs,
        response_format=_format(body.text.format if body.text else None),
        tools=tools or None,
        tool_choice=NamedTool(function=FunctionName(name=choice.name))
        if isinstance(choice, ResponseChoice)
        else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        service_tier=body.service_tier,
        priority=body.priority,
        timeout_s=body.timeout_s,
    )


def _item(raw: dict[str, object], at: int) -> Item:
    kind = str(raw.get("type", "message"))
    known = _KINDS.get(kind)
    if known is None:
        raise InvalidRequestError(
            f"input items of type {kind!r} are not understood",
            hint=f"send {', '.join(_KINDS)}",
            param=f"input[{at}].type",
        )
    try:
        return msgspec.convert(raw, known)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"input[{at}]: {error}", param=f"input[{at}]") from None


def _message(item: Item) -> Message:
    match item:
        case InputMessage(role=role, content=content):
            text = content if isinstance(content, str) else "\n".join(part.text for part in content)
            return Message(role=role, content=text)
        case InputCall(call_id=call, name=name, arguments=arguments):
            return Message(role="assistant", tool_calls=[_called(call, name, arguments)])
        case InputResult(call_id=call, output=output):
            return Message(role="tool", content=output, tool_call_id=call)


def _called(call: str, name: str, arguments: str) -> AssistantCall:
    return AssistantCall(id=call, function=CalledFunction(name=name, arguments=arguments))


def _format(wanted: TextFormatting | None) -> ResponseFormat | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return JsonObjectFormat()
    if wanted.name is None or wanted.schema is None:
        raise InvalidRequestError("a json_schema needs a name and a schema", hint="send both", param="text.format")
    return JsonSchemaFormat(json_schema=JsonSchema(name=wanted.name, schema=wanted.schema, strict=wanted.strict))
