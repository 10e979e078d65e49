"""Chat templates, against what Transformers rendered (`tools/golden/text.py`), and what they may not do."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CorruptFileError, InvalidRequestError
from shoal.model.codec import ModelCodec
from shoal.model.gguf_tokenizer import tokenizer_files
from shoal.model.template import ChatTemplate
from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "text"
DAY_S = 1_750_000_000.0  # 15 June 2025


def golden(name: str) -> Any:  # noqa: ANN401 - recorded JSON
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def files(*added: str) -> dict[str, bytes]:
    """A tokenizer with `<s>`, `</s>` and the *added* special tokens."""
    tokens = ["<s>", "</s>", *added, "a"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * (len(tokens) - 1) + [1],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return tokenizer_files(metadata)


def template_of(source: str, **other: bytes) -> ChatTemplate:
    given = {**files(), "chat_template.jinja": source.encode(), **other}
    return ChatTemplate.from_files(given, Tokenizer.from_files(given))


def says(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("case", golden("templates"), ids=lambda c: f"{c['name']}{', tools' if c['tools'] else ''}")
def test_a_template_renders_as_in_transformers(case: dict[str, Any]) -> None:
    rendered = template_of(case["template"]).render(case["messages"], now_s=DAY_S, tools=case["tools"])

    assert rendered == case["rendered"]


@pytest.mark.parametrize("name", list(golden("conversations")))
def test_a_conversation_with_smollm2_is_that_of_transformers(smollm2_gguf: Path, name: str) -> None:
    codec = ModelCodec.from_files(tokenizer_files_from_gguf(smollm2_gguf), unix_s=lambda: DAY_S)
    messages = golden("conversations")[name]

    ids = codec.encode_chat(messages, ())

    assert codec.template.render(messages, now_s=DAY_S) == golden("smollm2")["rendered"][name]
    assert ids[0] == 1
    assert ids.count(2) == golden("smollm2")["rendered"][name].count("<|im_end|>")


def test_the_date_is_the_one_that_is_given() -> None:
    assert template_of("{{ strftime_now('%d %b %Y') }}").render(says("hi"), now_s=DAY_S) == "15 Jun 2025"


def test_the_generation_prompt_can_be_left_out() -> None:
    template = template_of("x{% if add_generation_prompt %}>{% endif %}")

    assert template.render(says("hi"), now_s=DAY_S) == "x>"
    assert template.render(says("hi"), now_s=DAY_S, add_generation_prompt=False) == "x"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    assert template_of("{{ messages[0].content }}").render(says(parts), now_s=DAY_S) == "one two"


def test_a_variant_for_tools_is_used_when_there_are_tools() -> None:
    variants = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    given = files()
    config = json.loads(given["tokenizer_config.json"]) | {"chat_template": variants}
    given["tokenizer_config.json"] = json.dumps(config).encode()

    template = ChatTemplate.from_files(given, Tokenizer.from_files(given))

    assert template.render(says("hi"), now_s=DAY_S) == "plain"
    assert template.render(says("hi"), now_s=DAY_S, tools=[{"type": "function"}]) == "1 tools"


def test_a_model_without_template_gets_chatml_if_it_knows_its_markers() -> None:
    given = files("<|im_start|>", "<|im_end|>")

    template = ChatTemplate.from_files(given, Tokenizer.from_files(given))

    assert template.origin == "chatml"
    assert template.render(says("hi"), now_s=DAY_S) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_any_other_model_without_template_gets_a_transcript() -> None:
    given = files()

    template = ChatTemplate.from_files(given, Tokenizer.from_files(given))

    assert template.origin == "transcript"
    assert template.render(says("hi"), now_s=DAY_S) == "<s>User: hi\n\nAssistant:"


def test_a_template_that_refuses_says_why() -> None:
    template = template_of("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template.render(says("hi"), now_s=DAY_S)

    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[3].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{{ strftime_now(3) }}",
    ],
)
def test_what_a_template_may_not_or_cannot_do_is_an_error_of_the_request(source: str) -> None:
    template = template_of(source)

    with pytest.raises(InvalidRequestError):
        template.render(says("hi"), now_s=DAY_S)


def test_a_template_that_does_not_parse_is_refused_at_once() -> None:
    with pytest.raises(CorruptFileError, match="chat template"):
        template_of("{% for %}")
