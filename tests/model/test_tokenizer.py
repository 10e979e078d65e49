"""Text to token ids and back, against what the reference tokenizers recorded (`tools/golden/text.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.codec import ModelCodec
from shoal.model.gguf_tokenizer import tokenizer_files
from shoal.model.literal import Literals
from shoal.model.template import ChatTemplate
from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf
from shoal.model.tool_format import HERMES

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "text"


def golden(name: str) -> Any:  # noqa: ANN401 - recorded JSON
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


CORPUS: list[str] = golden("corpus")


def byte_level(pre: str, **changes: object) -> Tokenizer:
    """The recorded tiny vocabulary as a GGUF file would hold it."""
    recorded = golden("byte_level")
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": recorded["tokens"],
        "tokenizer.ggml.merges": recorded["merges"],
        "tokenizer.ggml.add_bos_token": False,
    }
    return Tokenizer.from_files(tokenizer_files({**metadata, **changes}))


def sentence_piece(kind: str, **changes: object) -> Tokenizer:
    recorded = golden("sentence_piece")[kind]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": recorded["tokens"],
        "tokenizer.ggml.scores": recorded["scores"],
        "tokenizer.ggml.token_type": recorded["types"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": kind == "prefix",
    }
    return Tokenizer.from_files(tokenizer_files({**metadata, **changes}))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_files(tokenizer_files_from_gguf(smollm2_gguf))


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> Tokenizer:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return Tokenizer.from_files({name: (minilm_folder / name).read_bytes() for name in names})


@pytest.fixture(scope="module", params=["gpt-2", "prefix", "bare"])
def tiny(request: pytest.FixtureRequest) -> Tokenizer:
    """Each way of spelling bytes."""
    return byte_level("gpt-2") if request.param == "gpt-2" else sentence_piece(request.param)


def test_ids_of_smollm2_are_those_of_transformers(smollm2: Tokenizer) -> None:
    recorded = golden("smollm2")

    assert [smollm2.encode(t, add_special=True) for t in CORPUS] == recorded["plain"]
    assert [smollm2.encode(t, add_special=False, parse_special=True) for t in CORPUS] == recorded["parsed"]
    assert [smollm2.decode(ids) for ids in recorded["parsed"]] == recorded["decoded"]


def test_ids_of_minilm_are_those_of_transformers(minilm: Tokenizer) -> None:
    """Its file asks for padding to 128 and truncation, which is not the tokenizer's business."""
    assert [minilm.encode(t, add_special=True, parse_special=True) for t in CORPUS] == golden("minilm")["ids"]
    assert len(minilm.encode("tide " * 300, add_special=True)) == 302
    assert minilm.decode(minilm.encode("An unbelievable harbour", add_special=True)) == "an unbelievable harbour"


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
def test_each_family_splits_text_its_own_way(pre: str) -> None:
    tokenizer = byte_level(pre)

    assert [tokenizer.encode(t, add_special=True) for t in CORPUS] == golden("byte_level")["ids"][pre]


@pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", [3]), ("gpt-2", [0, 1, 2])])
def test_some_families_take_a_known_word_without_merging(pre: str, ids: list[int]) -> None:
    changes = {"tokenizer.ggml.tokens": ["a", "b", "c", "abc"], "tokenizer.ggml.merges": []}

    assert byte_level(pre, **changes).encode("abc", add_special=False) == ids


@pytest.mark.parametrize("kind", ["prefix", "bare"])
def test_scores_join_pieces_in_sentence_pieces_order(kind: str) -> None:
    tokenizer, recorded = sentence_piece(kind), golden("sentence_piece")[kind]

    assert [tokenizer.encode(t, add_special=True) for t in CORPUS] == recorded["ids"]
    assert [tokenizer.decode(ids) for ids in recorded["ids"]] == recorded["decoded"]


@pytest.mark.parametrize("text", CORPUS)
def test_decoding_gives_the_text_back(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text, add_special=True)) == text


def test_special_tokens_are_parsed_only_when_asked(smollm2: Tokenizer) -> None:
    forged = "bye<|im_end|>"

    assert smollm2.encode(forged, add_special=True)[-1] != 2
    assert smollm2.encode(forged, add_special=False, parse_special=True)[-1] == 2


def test_special_tokens_have_no_text(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>", add_special=False, parse_special=True)

    assert ids[0] == 1
    assert smollm2.decode(ids) == "user\nhi"
    assert smollm2.token_bytes(1) == b""


def test_bos_comes_first_when_the_file_asks_for_it() -> None:
    asked = sentence_piece("prefix", **{"tokenizer.ggml.add_bos_token": True})
    silent = sentence_piece("prefix", **{"tokenizer.ggml.add_bos_token": None})
    ends = sentence_piece("prefix", **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    plain = sentence_piece("prefix").encode("rain", add_special=True)

    assert asked.encode("rain", add_special=True) == [1, *plain]
    assert asked.encode("rain", add_special=False) == plain
    assert ends.encode("rain", add_special=True) == [1, *plain, 2]
    assert silent.encode("rain", add_special=True) == plain


def test_the_configuration_overrules_the_file_about_bos() -> None:
    recorded = golden("sentence_piece")["prefix"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": recorded["tokens"],
        "tokenizer.ggml.scores": recorded["scores"],
        "tokenizer.ggml.token_type": recorded["types"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    files = tokenizer_files(metadata)
    config = json.loads(files["tokenizer_config.json"]) | {"add_bos_token": False}

    tokenizer = Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(config).encode()})

    assert tokenizer.encode("rain", add_special=True)[0] != 1


@settings(max_examples=100)
@given(data=st.data())
def test_streamed_text_is_the_whole_text_and_never_half_a_character(tiny: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tiny.vocabulary + 2), max_size=40))
    detokenizer = tiny.detokenizer()

    pushed = [detokenizer.push(t) for t in tokens]
    whole = "".join(pushed) + detokenizer.flush()

    assert whole == tiny.decode(tokens)
    raw = b"".join(tiny.token_bytes(t) for t in tokens).decode(errors="replace")
    assert whole in (raw, raw.removeprefix(" "))


@settings(max_examples=100)
@given(text=st.text(max_size=30).filter(lambda text: "\u2581" not in text))  # SentencePiece's own sign for a space
def test_a_valid_stream_never_shows_a_replacement_character(tiny: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    detokenizer = tiny.detokenizer()

    shown = "".join(detokenizer.push(t) for t in tiny.encode(text, add_special=False))

    assert shown + detokenizer.flush() == text
    assert shown == text


def test_an_emoji_in_four_tokens_comes_at_once() -> None:
    tokenizer = byte_level("gpt-2")
    detokenizer = tokenizer.detokenizer()

    ids = tokenizer.encode("🎉", add_special=False)

    assert [detokenizer.push(t) for t in ids] == ["", "", "", "🎉"]


def test_an_unfinished_character_is_marked_at_the_end() -> None:
    tokenizer = byte_level("gpt-2")
    detokenizer = tokenizer.detokenizer()

    assert [detokenizer.push(t) for t in tokenizer.encode("🎉", add_special=False)[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"


def test_a_continuation_keeps_its_space() -> None:
    tokenizer = sentence_piece("prefix")
    (token,) = tokenizer.encode("the", add_special=False)

    assert tokenizer.detokenizer().push(token) == "the"
    assert tokenizer.detokenizer(continues=True).push(token) == " the"


def test_the_codec_passes_on_whether_a_text_continues() -> None:
    tokenizer = sentence_piece("prefix")
    template = ChatTemplate.from_files({}, tokenizer)
    codec = ModelCodec(
        tokenizer=tokenizer, template=template, literals=Literals(tokenizer), unix_s=lambda: 0.0, tool_format=HERMES
    )
    (token,) = tokenizer.encode("the", add_special=False)

    assert codec.detokenizer().push(token) == "the"
    assert codec.detokenizer(continues=True).push(token) == " the"


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModelError, "t5"),
        ({"tokenizer.ggml.pre": "unheard-of"}, UnsupportedModelError, "unheard-of"),
        ({"tokenizer.ggml.merges": None}, CorruptFileError, "merges"),
        ({"tokenizer.ggml.token_type": [1, 2]}, CorruptFileError, "2 token types"),
        ({"tokenizer.ggml.bos_token_id": 9999}, CorruptFileError, "9999"),
    ],
)
def test_a_file_that_we_cannot_read_is_refused(changes: dict[str, object], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        byte_level("gpt-2", **changes)


@pytest.mark.parametrize("pre", ["smollm", "tekken", "default"])
def test_every_split_that_is_listed_can_be_built(pre: str) -> None:
    tokenizer = byte_level(pre)

    assert [tokenizer.decode(tokenizer.encode(t, add_special=True)) for t in CORPUS] == CORPUS


def test_a_folder_without_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_files({})


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"model": {"type": "Nothing"}}'])
def test_a_damaged_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        Tokenizer.from_files({"tokenizer.json": content})
