"""Errors as values: how the error tree crosses a wire and comes back as itself.

The class is named by its `code`.  A code that this release does not know (a newer gateway) comes back as the nearest class
that says whose move it is, taken from `type`, so that callers' retry rules still hold.
"""

import msgspec

from shoal.errors import InvalidRequestError, ShoalError, UnavailableError, UntrustedError


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """An error's fields in the OpenAI API's words, plus our hint and delay."""

    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    hint: str = ""
    retry_after_s: float | None = None


class FaultBody(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON body of every error answer."""

    error: Fault


INVALID, UNAVAILABLE, UNTRUSTED, INTERNAL = (
    "invalid_request_error",
    "unavailable_error",
    "untrusted_error",
    "server_error",
)


def describe(error: ShoalError) -> Fault:
    """*error* as a value that `restore` turns back."""
    kind, param, retry_after_s = INTERNAL, None, None
    match error:
        case InvalidRequestError():
            kind, param = INVALID, error.param
        case UnavailableError():
            kind, retry_after_s = UNAVAILABLE, error.retry_after_s
        case UntrustedError():
            kind = UNTRUSTED
        case _:
            pass
    return Fault(
        message=error.message, type=kind, param=param, code=error.code, hint=error.hint, retry_after_s=retry_after_s
    )


def restore(fault: Fault) -> ShoalError:
    """The error that *fault* describes."""
    cls = _by_code(fault.code) or _by_kind(fault.type)
    if issubclass(cls, InvalidRequestError):
        return cls(fault.message, hint=fault.hint, param=fault.param)
    if issubclass(cls, UnavailableError):
        return cls(
            fault.message, hint=fault.hint, retry_after_s=1.0 if fault.retry_after_s is None else fault.retry_after_s
        )
    return cls(fault.message, hint=fault.hint)


def _by_code(code: str | None) -> type[ShoalError] | None:
    pending: list[type[ShoalError]] = [ShoalError]
    while pending:
        cls = pending.pop()
        if cls.code == code:
            return cls
        pending.extend(cls.__subclasses__())
    return None


def _by_kind(kind: str) -> type[ShoalError]:
    return {INVALID: InvalidRequestError, UNAVAILABLE: UnavailableError, UNTRUSTED: UntrustedError}.get(
        kind, ShoalError
    )
