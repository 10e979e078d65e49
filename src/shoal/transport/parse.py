"""Bytes of others become a value, or one error of ours: nothing else, whatever they are.

What comes over the fabric was written by another release, by a broken link or by somebody who means harm, and it is parsed on
threads that must not die of it.  The parser of msgpack raises more than its own errors: text that is none, and nesting deeper
than the stack.  So everything that a node is told is parsed here, and tensors in `frame` behind the same promise.  What bytes
may cost is bounded before (`MAX_FRAME_BYTES`, `MAX_HEADER_BYTES`): lengths that lie are found out before anything is allocated.
"""

from typing import TypeVar

import msgspec
from msgspec.msgpack import Decoder

from shoal.errors import MalformedFrameError, UntrustedError

T = TypeVar("T")

_SHOWN_CHARACTERS = 200


def parse(
    data: bytes | memoryview, decoder: Decoder[T], what: str, *, unknown: type[UntrustedError] | None = None
) -> T:
    """The value in *data*, which should be *what*.

    Raises MalformedFrameError, or *unknown* for msgpack that is in order and yet no value of that type: another release may
    have one there.
    """
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        kind = unknown or MalformedFrameError
        raise kind(_refusal(data, what, error), hint="is it from a node of another version?") from error
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:  # msgspec's own are ValueErrors
        raise MalformedFrameError(_refusal(data, what, error)) from error


def shown(text: str) -> str:
    """*text* of a stranger as it may stand in an error or a log: a name of 60 MB is not repeated there."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _refusal(data: bytes | memoryview, what: str, error: Exception) -> str:
    return f"{len(data)} bytes are no {what}: {shown(str(error) or type(error).__name__)}"
