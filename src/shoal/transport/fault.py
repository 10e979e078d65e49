"""An error as bytes: what raised in `reply` on one node is raised again at the asker.

The class is found by its `code`, so that two nodes of different versions agree on whose move it is.  A code that this version
does not know becomes a plain ShoalError with the message kept.
"""

from collections.abc import Iterator

import msgspec
from msgspec.msgpack import Decoder

from shoal.errors import InvalidRequestError, ShoalError, UnavailableError
from shoal.transport.parse import parse


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag="fault"):
    """An error on the wire."""

    code: str
    message: str
    hint: str = ""
    param: str | None = None
    retry_after_s: float | None = None


_FAULT = Decoder(Fault)


def pack_error(error: Exception) -> bytes:
    """Bytes of *error*; of a class that is not ours only its name and text travel."""
    match error:
        case InvalidRequestError():
            fault = Fault(code=error.code, message=error.message, hint=error.hint, param=error.param)
        case UnavailableError():
            fault = Fault(code=error.code, message=error.message, hint=error.hint, retry_after_s=error.retry_after_s)
        case ShoalError():
            fault = Fault(code=error.code, message=error.message, hint=error.hint)
        case _:
            fault = Fault(code=ShoalError.code, message=f"{type(error).__name__}: {error}")
    return msgspec.msgpack.encode(fault)


def unpack_error(data: bytes) -> ShoalError:
    """The error to raise; raises MalformedFrameError when *data* is not one of ours."""
    fault = parse(data, _FAULT, "error reply")
    kind = next((cls for cls in _tree(ShoalError) if cls.code == fault.code), ShoalError)
    if issubclass(kind, InvalidRequestError):
        return kind(fault.message, hint=fault.hint, param=fault.param)
    if issubclass(kind, UnavailableError) and fault.retry_after_s is not None:
        return kind(fault.message, hint=fault.hint, retry_after_s=fault.retry_after_s)
    return kind(fault.message, hint=fault.hint)


def _tree(root: type[ShoalError]) -> Iterator[type[ShoalError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)
