"""The prompt of every benchmark: English prose that comes with the interpreter, cut to a number of tokens."""

import pydoc_data.topics
from pathlib import Path

from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf

PROMPT_TOKENS = 142
NEW_TOKENS = 128


def prompt_ids(gguf: Path, count: int, *, skip: int = 0) -> list[int]:
    """*count* token ids of prose, after the first *skip*."""
    tokenizer = Tokenizer.from_files(tokenizer_files_from_gguf(gguf))
    topics = pydoc_data.topics.topics
    prose = topics[max(topics, key=lambda name: len(topics[name]))]
    return tokenizer.encode(prose[: 16 * (count + skip)], add_special=False)[skip : skip + count]


def prompt_text(gguf: Path, count: int) -> str:
    """Prose of about *count* tokens."""
    return Tokenizer.from_files(tokenizer_files_from_gguf(gguf)).decode(prompt_ids(gguf, count))
