"""Small files that lie beside a model's weights: what travels with it, and the facts they state."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import CorruptFileError

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
MAX_BYTES = 64 * 1024 * 1024
"""Above every real tokenizer file (the largest are near 35 MB)."""


def carried_files(folder: Path, names: tuple[str, ...] = CARRIED) -> dict[str, bytes]:
    """Those of *names* that *folder* has; raises CorruptFileError for one too big to be what it is called."""
    files = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CorruptFileError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} of any known tokenizer")
        files[name] = path.read_bytes()
    return files


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in *path*, empty when there is no such file; raises CorruptFileError."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CorruptFileError(f"{path} is not a JSON object: {error}", hint="fetch the file again") from error


def token_ids(value: Any) -> tuple[int, ...]:  # noqa: ANN401 - one id, a list of ids, or null: formats differ
    """Token ids that a configuration gives as a number, a list or null."""
    match value:
        case bool():
            return ()
        case int():
            return (value,)
        case [*ids]:
            return tuple(i for i in ids if isinstance(i, int))
        case _:
            return ()


def licence_of(folder: Path) -> str:
    """`license` of the model card's front matter (README.md), or "unknown"."""
    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else "unknown"


def adds_bos(files: Mapping[str, bytes], bos: int | None) -> bool:
    """Whether a prompt starts with the token *bos*: as tokenizer_config.json says, else as tokenizer.json's post-processor does."""
    said = _json(files, "tokenizer_config.json").get("add_bos_token")
    if isinstance(said, bool):
        return said
    processor = _json(files, "tokenizer.json").get("post_processor") or {}
    steps = processor.get("processors", [processor])
    return bos is not None and any(_begins_with(step, bos) for step in steps)


def _begins_with(processor: dict[str, Any], token: int) -> bool:
    """Whether a TemplateProcessing step puts *token* before a single text."""
    if processor.get("type") != "TemplateProcessing" or not processor.get("single"):
        return False
    first = processor["single"][0].get("SpecialToken", {}).get("id")
    return token in processor.get("special_tokens", {}).get(first, {}).get("ids", [])


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CorruptFileError(f"{name} is not JSON: {error}", hint="fetch the file again") from error
    return value if isinstance(value, dict) else {}
