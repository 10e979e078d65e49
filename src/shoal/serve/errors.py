"""Errors to HTTP: the only place that knows status codes."""

import logging
import math
import traceback
from http import HTTPStatus

import msgspec
from litestar import MediaType, Request, Response
from litestar.datastructures import State
from litestar.exceptions import HTTPException

from shoal.errors import (
    DeadlineExceededError,
    InfeasibleError,
    InvalidRequestError,
    OverloadedError,
    RequestTooLargeError,
    ShoalError,
    UnauthorizedError,
    UnavailableError,
    UnknownModelError,
    UntrustedError,
)
from shoal.fleet.faults import Fault, FaultBody, describe

_STATUS: tuple[tuple[type[ShoalError], HTTPStatus], ...] = (
    (UnauthorizedError, HTTPStatus.UNAUTHORIZED),
    (UnknownModelError, HTTPStatus.NOT_FOUND),
    (RequestTooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (InfeasibleError, HTTPStatus.CONFLICT),
    (InvalidRequestError, HTTPStatus.BAD_REQUEST),
    (OverloadedError, HTTPStatus.TOO_MANY_REQUESTS),
    (DeadlineExceededError, HTTPStatus.GATEWAY_TIMEOUT),
    (UnavailableError, HTTPStatus.SERVICE_UNAVAILABLE),
    (UntrustedError, HTTPStatus.BAD_GATEWAY),
    (ShoalError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
"""First match wins: narrow classes stand before the wide ones."""

_OPENAI_TYPES = {401: "authentication_error", 413: "invalid_request_error", 429: "rate_limit_error"}

_log = logging.getLogger("shoal.serve")


def status_of(error: ShoalError) -> HTTPStatus:
    """The status code that fits the class."""
    return next(status for cls, status in _STATUS if isinstance(error, cls))


def fault_of(error: Exception) -> tuple[HTTPStatus, Fault]:
    """What the caller is told; of errors that are not ours, nothing but that there was one."""
    match error:
        case ShoalError():
            status, fault = status_of(error), describe(error)
        case HTTPException():
            status, fault = _framework(error)
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            fault = Fault(message="internal error", code="internal_error", hint="the gateway's log has the place")
    return status, msgspec.structs.replace(fault, type=_OPENAI_TYPES.get(status, fault.type))


def respond(request: Request[object, object, State], error: Exception) -> Response[bytes]:
    """An OpenAI-shaped answer; the exception handler of the whole application."""
    status, fault = fault_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        record(error, f"{request.method} {request.url.path}")
    headers = {}
    if fault.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(fault.retry_after_s)))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(encode_fault(fault), status_code=status, headers=headers, media_type=MediaType.JSON)


def encode_fault(fault: Fault) -> bytes:
    """The body of an error answer, or the data of an error event."""
    return msgspec.json.encode(FaultBody(error=fault))


def record(error: BaseException, where: str) -> None:
    """Log class and place of an error that is our fault.

    Not its text: an exception raised under a request may quote the prompt (ADR 12).
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s failed with %s at\n%s", where, type(error).__name__, frames)


def _framework(error: HTTPException) -> tuple[HTTPStatus, Fault]:
    """What the web framework itself refuses: unknown paths, methods, oversized bodies, bad query values."""
    status = HTTPStatus(error.status_code)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return status, describe(
            RequestTooLargeError("the body is larger than this gateway accepts", hint="send less at once")
        )
    if status == HTTPStatus.NOT_FOUND:
        return status, Fault(message="no such path", type="invalid_request_error", code="not_found", hint="see /schema")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return status, Fault(message="internal error", code="internal_error", hint="the gateway's log has the place")
    message, param = _first_complaint(error)
    code = "invalid_request" if status == HTTPStatus.BAD_REQUEST else status.phrase.lower().replace(" ", "_")
    return status, Fault(message=message, type="invalid_request_error", param=param, code=code)


def _first_complaint(error: HTTPException) -> tuple[str, str | None]:
    """What the framework says of the first value that it refuses, and that value's name."""
    match error.extra:
        case [{"message": str(message), "key": str(key)}, *_]:
            return (f"{key}: {message}", key) if key != "data" else ("the body is empty or no JSON object", None)
        case _:
            return error.detail, None
