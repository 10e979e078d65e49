"""How a model writes that it wants a tool called: each family learned its own form, and only that one comes out well.

The form is read off the model's chat template, which shows past calls in it.  A template that takes no tools, or writes calls in
a form that is not in the table, belongs to a model that is told in words (`shoal.model.tool_prompt`): Hermes' form, the most
widely learned.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec


class Layout(StrEnum):
    """What stands between the marks."""

    OBJECT = "object"
    """One JSON object with the tool's name and its arguments: `{"name": ..., "arguments": ...}`."""
    LIST = "list"
    """A JSON list of such objects."""
    NAMED = "named"
    """The tool's name, a further mark, and a JSON object of the arguments alone."""
    BARE = "bare"
    """One such object that is the whole answer; the mark before it is often left out."""


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`begin` and `end` stand around a call (`end` may be empty), `divider` between name and arguments of a NAMED one.

    `special` are those marks that the model writes as special tokens, which otherwise have no text.  `told` says that the
    template does not show tools, so that the model must be told of them in words.  `id_chars` is the length of a call's id
    where the template insists on one.
    """

    name: str
    layout: Layout
    begin: str
    end: str = ""
    inside: str = ""
    """Between the marks and what they enclose, on either side."""
    between: str = ""
    """Between two calls."""
    divider: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    special: dict[str, int] = {}
    told: bool = False
    id_chars: int = 0


HERMES = ToolFormat(
    name="hermes", layout=Layout.OBJECT, begin="<tool_call>", end="</tool_call>", inside="\n", between="\n"
)
LLAMA_3 = ToolFormat(name="llama3", layout=Layout.BARE, begin="<|python_tag|>", arguments_key="parameters")
MISTRAL = ToolFormat(name="mistral", layout=Layout.LIST, begin="[TOOL_CALLS]", id_chars=9)
MISTRAL_NAMED = ToolFormat(
    name="mistral-named", layout=Layout.NAMED, begin="[TOOL_CALLS]", divider="[ARGS]", id_chars=9
)
PHI_4 = ToolFormat(name="phi4", layout=Layout.LIST, begin="<|tool_call|>", end="<|/tool_call|>")
TOLD = msgspec.structs.replace(HERMES, name="told", told=True)

_SIGNS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_NAMED),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<|tool_call|>",), PHI_4),
    (("<tool_call>", '"arguments"'), HERMES),
    (('"parameters": ',), LLAMA_3),
)
"""What a template that shows calls in a format holds; the first that fits."""


def format_of(template: str, special: Mapping[str, int], *, takes_tools: bool) -> ToolFormat:
    """The format of a model with this chat *template* (its text), whose special tokens are *special*."""
    plain = template.replace('\\"', '"')
    fitting = (form for signs, form in _SIGNS if all(sign in plain for sign in signs))
    form = next(fitting, TOLD) if takes_tools else TOLD
    marks = {mark: special[mark] for mark in (form.begin, form.end, form.divider) if mark in special}
    return msgspec.structs.replace(form, special=marks)
