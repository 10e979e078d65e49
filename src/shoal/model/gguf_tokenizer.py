"""A GGUF file's tokenizer as the files of a Hugging Face folder, so that one code path reads both.

Two families: `gpt2` (byte-level BPE; `tokenizer.ggml.pre` names how text is split first) and `llama` (SentencePiece: scores
instead of merges, byte fallback).  The splits are those that llama.cpp and the models' own tokenizer.json define; a name that is
not in the table is refused, for a wrong split gives plausible ids and worse answers.
"""

import json
from collections.abc import Mapping
from typing import Any

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.gguf_config import CONTROL, special_tokens
from shoal.model.gguf_file import Value

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_UNKNOWN, _USER_DEFINED, _UNUSED, _BYTE = 2, 4, 5, 6
_SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS: Mapping[str, Any] = {"type": "Digits", "individual_digits": True}
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", r"\p{N}+", r"[0-9][0-9][0-9]")
_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
    "smollm": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"),
    "qwen2": ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"),
    "tekken": ("tekken",),
    "default": ("default",),
}
_WHOLE_WORDS_FIRST = frozenset({"llama3", "tekken"})
"""Families whose models take a word that is in the vocabulary as it is, without merging."""


def tokenizer_files(metadata: Mapping[str, Value]) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and, if the file has one, `chat_template.jinja`.

    Raises UnsupportedModelError for another kind of tokenizer or an unknown split, CorruptFileError when a list is missing.
    """
    tokens, types = _texts(metadata, "tokens"), _types(metadata)
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            described = _byte_level(metadata, tokens)
        case "llama":
            described = _sentence_piece(metadata, tokens, types)
        case other:
            raise UnsupportedModelError(
                f"tokenizers of kind {other!r} are not supported in GGUF files (only gpt2 and llama)",
                hint="import the model from its safetensors folder",
            )
    config = _config(metadata, tokens)
    described |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, t, types[i]) for i, t in enumerate(tokens) if types[i] in (_UNKNOWN, CONTROL, _USER_DEFINED)
        ],
        "post_processor": _around(metadata, tokens),
    }
    files = {
        TOKENIZER_FILE: json.dumps(described, ensure_ascii=False).encode(),
        CONFIG_FILE: json.dumps(config, ensure_ascii=False).encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    return files | ({TEMPLATE_FILE: template.encode()} if isinstance(template, str) else {})


def _byte_level(metadata: Mapping[str, Value], tokens: list[str]) -> dict[str, Any]:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    family = next((f for f, names in _FAMILIES.items() if name in names), None)
    if family is None:
        raise UnsupportedModelError(
            f"the pre-tokenizer {name!r} is not known", hint="import the model from its safetensors folder"
        )
    merges = [m.split(" ", 1) for m in _texts(metadata, "merges")]
    return {
        "normalizer": {"type": "NFC"} if family == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _splits(family)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, merges) | {"ignore_merges": family in _WHOLE_WORDS_FIRST},
    }


def _splits(family: str) -> list[Mapping[str, Any]]:
    """Pre-tokenizers in order; the last one maps bytes to characters, for some families after GPT-2's own split."""
    match family:
        case "gpt2":
            return [_mapped(use_regex=True)]
        case "smollm":
            return [_DIGITS, _mapped(use_regex=True)]
        case "default":
            gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
            return [*(_split(r) for r in (_DEFAULT_SPLITS[0], gpt2, *_DEFAULT_SPLITS[1:])), _mapped(use_regex=False)]
        case "llama3":
            return [_split(_LLAMA3), _mapped(use_regex=False)]
        case "qwen2":
            return [_split(_QWEN2), _mapped(use_regex=False)]
        case _:
            return [_split(_TEKKEN), _mapped(use_regex=False)]


def _split(regex: str) -> Mapping[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _mapped(*, use_regex: bool) -> Mapping[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sentence_piece(metadata: Mapping[str, Value], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CorruptFileError(
            "tokenizer.ggml.scores is missing or not as long as the vocabulary", hint="download it again"
        )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    merges = _merges(tokens, types, [float(s) for s in scores if isinstance(s, int | float)])
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), replace],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])],
        },
        "model": _bpe(tokens, merges)
        | {"byte_fallback": _BYTE in types, "fuse_unk": True, "unk_token": _at(tokens, unknown)},
    }


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Merges that join in SentencePiece's order: the pair whose whole has the highest score first."""
    whole = {t: scores[i] for i, t in enumerate(tokens) if types[i] not in (_UNKNOWN, CONTROL, _UNUSED, _BYTE)}
    pairs = [
        (-score, len(token[:cut]), len(token[cut:]), token, cut)
        for token, score in whole.items()
        for cut in range(1, len(token))
        if token[:cut] in whole and token[cut:] in whole
    ]
    return [[token[:cut], token[cut:]] for _, _, _, token, cut in sorted(pairs)]


def _bpe(tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {t: i for i, t in reversed(list(enumerate(tokens)))},
        "merges": merges,
    }


def _added(token: int, text: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, "special": kind != _USER_DEFINED, **flags}


def _around(metadata: Mapping[str, Value], tokens: list[str]) -> dict[str, Any] | None:
    """What stands around a text: BOS and EOS where the file asks for them."""
    known = special_tokens(metadata)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    ends = isinstance(eos, int) and metadata.get("tokenizer.ggml.add_eos_token") is True
    before = [_at(tokens, known.bos)] if known.add_bos and known.bos is not None else []
    after = [_at(tokens, eos)] if ends else []
    if not before and not after:
        return None

    def template(*sequences: str) -> list[dict[str, Any]]:
        specials = [[{"SpecialToken": {"id": t, "type_id": 0}} for t in side] for side in (before, after)]
        return [p for s in sequences for p in (*specials[0], {"Sequence": {"id": s, "type_id": 0}}, *specials[1])]

    used = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in (*before, *after)}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": used}


def _config(metadata: Mapping[str, Value], tokens: list[str]) -> dict[str, Any]:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in roles.items()}
    named = {name: _at(tokens, i) for name, i in ids.items() if isinstance(i, int)}
    return {**named, "add_bos_token": special_tokens(metadata).add_bos and "bos_token" in named}


def _at(tokens: list[str], token: Value | None) -> str:
    if not isinstance(token, int) or not 0 <= token < len(tokens):
        raise CorruptFileError(
            f"token id {token!r} is outside the vocabulary of {len(tokens)}", hint="download it again"
        )
    return tokens[token]


def _texts(metadata: Mapping[str, Value], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list):
        raise CorruptFileError(f"the file has no tokenizer.ggml.{key}", hint="download it again")
    return [v for v in values if isinstance(v, str)]


def _types(metadata: Mapping[str, Value]) -> list[int]:
    tokens = _texts(metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list):
        return [1] * len(tokens)
    if len(types) != len(tokens):
        raise CorruptFileError(f"{len(types)} token types for {len(tokens)} tokens", hint="download it again")
    return [t if isinstance(t, int) else 1 for t in types]
