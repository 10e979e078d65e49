"""Errors to HTTP: the only place that knows status codes."""

import logging
import math
import traceback
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException

from shoal.errors import (
    DeadlineExceededError,
    InfeasibleError,
    InvalidRequestError,
    KeyReusedError,
    OverloadedError,
    RequestTooLargeError,
    ShoalError,
    UnauthorizedError,
    UnavailableError,
    UnknownModelError,
    UnknownNodeError,
    UntrustedError,
)
from shoal.fleet.faults import Fault, FaultBody, describe

_STATUS: tuple[tuple[type[ShoalError], HTTPStatus], ...] = (
    (UnauthorizedError, HTTPStatus.UNAUTHORIZED),
    (UnknownModelError, HTTPStatus.NOT_FOUND),
    (UnknownNodeError, HTTPStatus.NOT_FOUND),
    (RequestTooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (InfeasibleError, HTTPStatus.CONFLICT),
    (KeyReusedError, HTTPStatus.UNPROCESSABLE_ENTITY),
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


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a refusal may have to name of the request; empty where it is not known."""

    method: str = ""
    path: str = ""
    body_bytes: str = ""
    limit_bytes: int = 0


def fault_of(error: Exception, asked: Asked = Asked()) -> tuple[HTTPStatus, Fault]:  # noqa: B008 - frozen
    """What the caller is told; of errors that are not ours, nothing but that there was one."""
    match error:
        case ShoalError():
            status, fault = status_of(error), describe(error)
        case HTTPException():
            status, fault = _framework(error, asked)
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            fault = Fault(message="internal error", code="internal_error", hint="the gateway's log has the place")
    kind = _OPENAI_TYPES.get(status, fault.type)
    return status, msgspec.structs.replace(fault, type=kind, hint=fault.hint or _next_step(status, fault))


def _next_step(status: HTTPStatus, fault: Fault) -> str:
    """What to do where the error itself does not say it: every body has a next step."""
    if fault.retry_after_s is not None:
        return f"try again in {math.ceil(fault.retry_after_s)} s"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "the gateway's log may say more"
    return f"see /schema for what {fault.param} may be" if fault.param else "see /schema for what may be asked"


def responder(limit_bytes: int) -> Callable[[Request[Any, Any, Any], Exception], Response[bytes]]:
    """The exception handler of an application that takes bodies of at most *limit_bytes*."""

    def respond(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        size = request.headers.get("content-length", "")
        asked = Asked(method=str(request.method), path=request.url.path, body_bytes=size, limit_bytes=limit_bytes)
        return answer(error, asked)

    return respond


def answer(error: Exception, asked: Asked) -> Response[bytes]:
    """An OpenAI-shaped answer."""
    status, fault = fault_of(error, asked)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        record(error, f"{asked.method} {asked.path}")
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


def _framework(error: HTTPException, asked: Asked) -> tuple[HTTPStatus, Fault]:
    """What the web framework itself refuses: unknown paths, methods, oversized bodies, bad query values."""
    status = HTTPStatus(error.status_code)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        size = f", this one has {int(asked.body_bytes):,}" if asked.body_bytes.isdecimal() else ""
        said = f"this gateway takes bodies of at most {asked.limit_bytes:,} bytes{size}"
        return status, describe(RequestTooLargeError(said, hint="send less at once, in several requests"))
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        said, hint = f"{asked.path} does not take {asked.method}", "see /schema for the methods of every path"
        return status, Fault(message=said, type="invalid_request_error", code="method_not_allowed", hint=hint)
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
