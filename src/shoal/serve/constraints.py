"""What a request asks of the form of its answer, checked: the tools that it offers and the grammar that follows from all of it."""

from anyio import to_thread

from shoal.model.tool_format import HERMES, ToolFormat
from shoal.runtime.backend.guided import validate
from shoal.runtime.grammar import Grammar
from shoal.serve.openai_requests import ChatRequest
from shoal.serve.openai_tools import AllowedChoice, FunctionTool, NamedTool, ToolChoice
from shoal.serve.tools import NO_PARAMETERS, NO_TOOLS, Tool, ToolUse, tool_grammar, tool_use


def chat_tools(body: ChatRequest) -> ToolUse:
    """The tools of a chat request; raises InvalidRequestError."""
    choice, named = chosen(body.tool_choice)
    tools = [_tool(tool) for tool in body.tools or ()]
    return tool_use(tools, choice, named, parallel=body.parallel_tool_calls is not False)


def chosen(choice: ToolChoice | None) -> tuple[str, list[str] | None]:
    """none, auto or required, and the names that may be called (None: all)."""
    match choice:
        case NamedTool(function=function):
            return "required", [function.name]
        case AllowedChoice(allowed_tools=allowed):
            return allowed.mode, [tool.function.name for tool in allowed.tools]
        case None:
            return "auto", None
        case _:
            return choice, None


async def checked(
    answer: Grammar | None, tools: ToolUse = NO_TOOLS, form: ToolFormat = HERMES, param: str = "response_format"
) -> Grammar | None:
    """The grammar of an answer that may call *tools*; raises InvalidRequestError for what nothing can follow."""
    if answer is not None:
        await to_thread.run_sync(validate, answer, param)
    if not tools.wanted:
        return answer
    grammar = tool_grammar(form, tools, answer)
    await to_thread.run_sync(validate, grammar, "tools")
    return grammar


def _tool(tool: FunctionTool) -> Tool:
    given = tool.function
    parameters = NO_PARAMETERS if given.parameters is None else given.parameters
    return Tool(name=given.name, description=given.description, parameters=parameters, strict=bool(given.strict))
