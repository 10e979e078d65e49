"""Tools for models whose chat template shows none: described in the system message, calls and results written as text.

The wording follows the prompt that the Hermes models were trained with (NousResearch, "Hermes-Function-Calling"), because that
form is the one that most models have seen.  Results come back as the user's turn: a template without tools knows no other role.
"""

import json
from collections.abc import Mapping, Sequence

from shoal.model.tool_format import ToolFormat

Message = Mapping[str, object]


def told(messages: Sequence[Message], tools: Sequence[Mapping[str, object]], form: ToolFormat) -> list[Message]:
    """*messages* as a model reads them that is told of *tools* in words; nothing changes where there are none to tell of."""
    written = [_written(m, form) for m in messages]
    if not tools:
        return written
    words = _words(tools, form)
    if written and written[0].get("role") == "system":
        return [{**written[0], "content": f"{written[0]['content']}\n\n{words}"}, *written[1:]]
    return [{"role": "system", "content": words}, *written]


def _words(tools: Sequence[Mapping[str, object]], form: ToolFormat) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = f'{{"{form.name_key}": <name>, "{form.arguments_key}": <arguments as a JSON object>}}'
    return (
        "You may call functions to help with the user's request. These functions are available, one a line:\n"
        f"<tools>\n{listed}\n</tools>\n"
        f"To call one, answer with its name and arguments between {form.begin} and {form.end}, like this:\n"
        f"{form.begin}{form.inside}{example}{form.inside}{form.end}"
    )


def _written(message: Message, form: ToolFormat) -> Message:
    """Calls and results as text."""
    match message:
        case {"role": "tool"}:
            return {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
        case {"tool_calls": [*calls]}:
            texts = [str(message.get("content") or ""), *(_call(call, form) for call in calls)]
            return {"role": message["role"], "content": form.between.join(t for t in texts if t)}
        case _:
            return message


def _call(call: object, form: ToolFormat) -> str:
    match call:
        case {"function": {"name": name, "arguments": arguments}}:
            value = json.dumps({form.name_key: name, form.arguments_key: arguments}, ensure_ascii=False)
            return f"{form.begin}{form.inside}{value}{form.inside}{form.end}"
        case _:
            return str(call)
