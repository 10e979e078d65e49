"""A model's text handling in one value: what the gateway asks for when it turns requests into token ids and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoal.model.literal import Literals
from shoal.model.template import ChatTemplate
from shoal.model.tokenizer import Detokenizer, Tokenizer
from shoal.model.tool_format import ToolFormat, format_of
from shoal.model.tool_prompt import told


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCodec:
    """Tokenizer and template of one model; `unix_s` is the clock that templates read."""

    tokenizer: Tokenizer
    template: ChatTemplate
    literals: Literals
    unix_s: Callable[[], float]
    tool_format: ToolFormat
    """How the model writes calls."""

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], unix_s: Callable[[], float]) -> "ModelCodec":
        """Read a model's own files; raises CorruptFileError or UnsupportedModelError."""
        tokenizer = Tokenizer.from_files(files)
        template = ChatTemplate.from_files(files, tokenizer)
        source = template.tool_source
        return cls(
            tokenizer=tokenizer,
            template=template,
            literals=Literals(tokenizer),
            unix_s=unix_s,
            tool_format=format_of(source, tokenizer.special, takes_tools=bool(source)),
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of plain text, with the special tokens that the model expects around it; special tokens in it stay text."""
        return tuple(self.tokenizer.encode(text, add_special=True))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of a text as the model would write it: nothing before it, nothing special in it."""
        return tuple(self.tokenizer.encode(text, add_special=False))

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
    ) -> tuple[int, ...]:
        """Ids of the rendered conversation with its generation prompt; raises InvalidRequestError.

        The template's special tokens are read, those that stand in messages and tools stay text (`shoal.model.literal`).
        """
        form = self.tool_format
        given = [told(messages, tools, form), []] if form.told else [list(messages), list(tools)]
        marked = self.literals.marked(given)
        text = self.template.render(marked[0], now_s=self.unix_s(), tools=marked[1])
        if marked == given:
            return tuple(self.tokenizer.encode(text, add_special=False, parse_special=True))
        return tuple(self.literals.encode(text))

    def detokenizer(self, *, continues: bool = False, marks: bool = False) -> Detokenizer:
        """A fresh one, for one answer; `continues` keeps a leading space, for text that is appended to its prompt.

        `marks` shows the special tokens that stand around calls of tools.
        """
        shown = {token: text.encode() for text, token in self.tool_format.special.items()} if marks else {}
        return self.tokenizer.detokenizer(continues=continues, shown=shown)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for by itself."""
        return self.tokenizer.token_bytes(token)
