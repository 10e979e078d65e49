"""Text to token ids and back, for a model that brings a `tokenizer.json`.

Encoding is the `tokenizers` library.  Decoding is ours: a token stands for fixed bytes, text is their UTF-8.  That makes
a streamed answer equal the whole one by construction, at constant cost per token; the library's decoders look at the
whole sequence.  The two differ only on invalid byte runs of byte-fallback vocabularies, where the library gives up on the
whole run and we, as llama.cpp, on the broken part alone.

Special tokens in text (`<|im_end|>` typed by a user) are parsed only when `parse_special` asks for it.  A rendered chat
template needs that; `shoal.model.literal` keeps those in users' messages apart.  Plain completions never parse.
"""

import codecs
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as Engine

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.gguf_file import read_gguf
from shoal.model.gguf_tokenizer import CONFIG_FILE, TOKENIZER_FILE, tokenizer_files

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SPACE = "\u2581"


class Spelling(Enum):
    """How a vocabulary writes bytes as text."""

    BYTE_LEVEL = auto()
    """Every byte is a printable character (GPT-2)."""
    SENTENCE_PIECE = auto()
    """Spaces are U+2581, single bytes `<0xNN>`."""
    WORD_PIECE = auto()
    """Words stand alone, their continuations begin with `##` (BERT)."""


@dataclass(slots=True)
class Detokenizer:
    """Turns the tokens of one answer into text as they come; owned by the reader of that answer."""

    pieces: tuple[bytes, ...]
    strip_space: bool
    shown: Mapping[int, bytes] = field(default_factory=dict)
    """Special tokens that have a text here."""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def push(self, token: int) -> str:
        """Text that is certain now; bytes of an incomplete character wait.  An id outside the vocabulary has no text."""
        piece = self.pieces[token] if 0 <= token < len(self.pieces) else b""
        return self._shown(self._decoder.decode(piece or self.shown.get(token, b"")))

    def flush(self) -> str:
        """What is left at the end; incomplete bytes become U+FFFD."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if not self.strip_space or not text:
            return text
        self.strip_space = False
        return text.removeprefix(" ")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A model's tokenizer; safe to share between threads.

    `pieces` are the bytes of each token, empty for special ones; `special` the special tokens by their text; `named` those
    with a role, e.g. `bos_token`.  `strip_space` says that a text by itself begins with a space that nobody wrote.
    """

    engine: Engine
    pieces: tuple[bytes, ...]
    special: Mapping[str, int]
    named: Mapping[str, str]
    strip_space: bool
    add_bos: bool | None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """Read `tokenizer.json` and, if there, `tokenizer_config.json` and `special_tokens_map.json`.

        Raises CorruptFileError, or UnsupportedModelError when there is no `tokenizer.json` or its decoder is unknown.
        """
        if TOKENIZER_FILE not in files:
            raise UnsupportedModelError(
                "the model brings no tokenizer.json", hint="convert its tokenizer with Transformers: save_pretrained"
            )
        described = json_object(files, TOKENIZER_FILE)
        config = json_object(files, CONFIG_FILE)
        try:
            engine = Engine.from_str(files[TOKENIZER_FILE].decode())
        except Exception as error:
            raise CorruptFileError(f"tokenizer.json is not valid: {error}", hint="fetch the file again") from error
        engine.no_truncation()  # lengths are the caller's business, and silently cut prompts are nobody's
        engine.no_padding()
        decoder = described.get("decoder") or {}
        special = {t["content"]: t["id"] for t in described.get("added_tokens") or () if t.get("special")}
        said = config.get("add_bos_token")
        return cls(
            engine=engine,
            pieces=_pieces(engine, _spelling(decoder), frozenset(special.values())),
            special=special,
            named=_named({**json_object(files, SPECIAL_TOKENS_FILE), **config}),
            strip_space=_strips_space(decoder),
            add_bos=said if isinstance(said, bool) else None,
        )

    @property
    def vocabulary(self) -> int:
        """Number of token ids, unused ones below the highest included."""
        return len(self.pieces)

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written *text*, special ones included."""
        found: int | None = self.engine.token_to_id(text)
        return found

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Token ids of *text*.

        `add_special` puts what the model expects around a text (BOS, `[CLS]` ... `[SEP]`); `parse_special` reads special
        tokens that stand in *text*.
        """
        with self._lock:
            self.engine.encode_special_tokens = not parse_special
            ids = list(self.engine.encode(text, add_special_tokens=add_special).ids)
        bos = self.special.get(self.named.get("bos_token", ""))
        if not add_special or bos is None or self.add_bos is None or self.add_bos == (ids[:1] == [bos]):
            return ids
        return [bos, *ids] if self.add_bos else ids[1:]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of *tokens* by themselves; special tokens have none, invalid bytes become U+FFFD."""
        detokenizer = self.detokenizer()
        return "".join([*(detokenizer.push(t) for t in tokens), detokenizer.flush()])

    def detokenizer(self, *, continues: bool = False, shown: Mapping[int, bytes] = MappingProxyType({})) -> Detokenizer:
        """A fresh one, for one answer; `continues` keeps a leading space, for text that is appended to its prompt.

        Special tokens in *shown* have a text.
        """
        return Detokenizer(self.pieces, self.strip_space and not continues, shown)

    def token_bytes(self, token: int) -> bytes:
        """What *token* stands for; empty for special tokens and unknown ids."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""


def tokenizer_files_from_gguf(path: Path) -> dict[str, bytes]:
    """The files that `Tokenizer` and `ChatTemplate` read, out of a GGUF file; raises as `read_gguf` and `tokenizer_files` do."""
    return tokenizer_files(read_gguf(path).metadata)


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a file, empty when there is no such file; raises CorruptFileError."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CorruptFileError(f"{name} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{name} is not a JSON object", hint="fetch the file again")
    return value


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens with a role; a file writes one as text or as an object with `content`."""
    found = {}
    for name in NAMED_TOKENS:
        match config.get(name):
            case str(text) | {"content": str(text)}:
                found[name] = text
            case _:
                pass
    return found


def _parts(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(decoder.get("decoders") or (decoder,))


def _spelling(decoder: Mapping[str, Any]) -> Spelling:
    kinds = {part.get("type") for part in _parts(decoder)}
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL
    if "WordPiece" in kinds:
        return Spelling.WORD_PIECE
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return Spelling.SENTENCE_PIECE
    raise UnsupportedModelError(f"tokenizer.json has the decoder {sorted(map(str, kinds))}, which we do not know")


def _strips_space(decoder: Mapping[str, Any]) -> bool:
    for part in _parts(decoder):
        match part:
            case {"type": "Strip", "start": int(start)} if start > 0:
                return True
            case {"type": "Metaspace"}:
                return (
                    part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True) is not False
                )
            case {"type": "WordPiece"}:
                return True
            case _:
                pass
    return False


def _pieces(engine: Engine, spelling: Spelling, special: frozenset[int]) -> tuple[bytes, ...]:
    vocabulary: dict[str, int] = engine.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    table = _byte_table()
    for text, token in vocabulary.items():
        if token not in special:
            pieces[token] = _bytes_of(text, spelling, table)
    return tuple(pieces)


def _bytes_of(text: str, spelling: Spelling, table: Mapping[int, int]) -> bytes:
    match spelling:
        case Spelling.BYTE_LEVEL:
            try:
                return text.translate(table).encode("latin-1")
            except UnicodeEncodeError:
                return text.encode()
        case Spelling.SENTENCE_PIECE:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes.fromhex(text[3:5])
            return text.replace(_SPACE, " ").encode()
        case Spelling.WORD_PIECE:
            return (text[2:] if text.startswith("##") else " " + text).encode()


def _byte_table() -> dict[int, int]:
    """`byte_alphabet` for `str.translate`; other characters end up beyond Latin-1.  A loop over a vocabulary takes 0.3 s."""
    others = dict.fromkeys(range(256), 0xFFFF)
    return others | {ord(character): byte for character, byte in byte_alphabet().items()}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}
