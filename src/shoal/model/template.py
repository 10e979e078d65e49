"""Rendering a conversation with the model's own chat template, the way Transformers does.

Templates are programs out of downloaded files: they run in jinja2's immutable sandbox (no attributes with underscores, no
changes to arguments, ranges up to 100,000).  A model without a template gets ChatML if its vocabulary has ChatML's markers,
else a plain transcript; which one it is stands in `ChatTemplate.origin`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.errors import CorruptFileError, InvalidRequestError
from shoal.model.gguf_tokenizer import CONFIG_FILE, TEMPLATE_FILE
from shoal.model.tokenizer import Tokenizer, json_object

LEGACY_TEMPLATE_FILE = "chat_template.json"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template; `tool_use` is the variant that a model brings for conversations with tools, or None.

    `origin` says where it comes from: the name of a file, "chatml" or "transcript".  `tool_source` is the text of the variant
    that shows tools, empty where none does.
    """

    plain: Template
    tool_use: Template | None
    named: Mapping[str, str]
    origin: str
    tool_source: str = ""

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], tokenizer: Tokenizer) -> "ChatTemplate":
        """Find and compile the model's template; raises CorruptFileError when it is none."""
        sources, origin = _sources(files, tokenizer)
        compiled = {name: _compile(source) for name, source in sources.items()}
        plain = compiled.get("default") or next(iter(compiled.values()))
        named = {"bos_token": "", "eos_token": "", **tokenizer.named}
        shown = sources.get("tool_use") or sources.get("default") or next(iter(sources.values()))
        return cls(
            plain=plain,
            tool_use=compiled.get("tool_use"),
            named=named,
            origin=origin,
            tool_source=shown if _reads(shown, "tools") else "",
        )

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        now_s: float,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """Text of the conversation; `now_s` (Unix time, shown as UTC) is what templates print as today's date.

        Content given as text parts is joined first.  Raises InvalidRequestError when the template refuses the conversation.
        """

        def strftime_now(form: str) -> str:
            return datetime.fromtimestamp(now_s, UTC).strftime(form)

        chosen = self.tool_use if tools and self.tool_use else self.plain
        try:
            return chosen.render(
                messages=[_with_text(m) for m in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=strftime_now,
                **self.named,
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses: {error.message}", param="messages"
            ) from error
        except _PYTHON_ERRORS as error:
            raise InvalidRequestError(
                f"the model's chat template cannot read this conversation: {error}",
                hint="check roles and contents: most templates want text, and user and assistant in turn",
                param="messages",
            ) from error


def _sources(files: Mapping[str, bytes], tokenizer: Tokenizer) -> tuple[dict[str, str], str]:
    if TEMPLATE_FILE in files:
        return {"default": files[TEMPLATE_FILE].decode(errors="replace")}, TEMPLATE_FILE
    for name in (LEGACY_TEMPLATE_FILE, CONFIG_FILE):
        match json_object(files, name).get("chat_template"):
            case str(source):
                return {"default": source}, name
            case [_, *_] as variants:
                return {str(v["name"]): str(v["template"]) for v in variants}, name
            case _:
                pass
    if tokenizer.token_id("<|im_start|>") is not None:
        return {"default": CHATML}, "chatml"
    return {"default": TRANSCRIPT}, "transcript"


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CorruptFileError(
            f"the chat template is not valid: {error.message}", hint="fetch the model again"
        ) from error


def _reads(source: str, name: str) -> bool:
    """Whether a template looks at the variable *name*."""
    tree = ImmutableSandboxedEnvironment(extensions=[GenerationTag, loopcontrols]).parse(source)
    return name in meta.find_undeclared_variables(tree)


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON without jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _with_text(message: Mapping[str, object]) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list):
        return dict(message)
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    return {**message, "content": "".join(map(str, texts)) if len(texts) == len(parts) else parts}


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
