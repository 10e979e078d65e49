"""The error tree: the class says whose move it is.

    ShoalError
    |-- InvalidRequestError       the caller must change the request, file or setting
    |   |-- UnknownModelError         no such model, reference or deployment
    |   |-- UnknownNodeError          no such machine in the fleet
    |   |-- UnsupportedModelError     architecture, operator or tensor type that we do not know
    |   |-- CorruptFileError          truncated or inconsistent model file
    |   |-- ContextLengthError        prompt and answer do not fit in the context
    |   |-- RequestTooLargeError      body or value above a limit
    |   |-- KeyReusedError            an idempotency key that belongs to another request
    |   |-- SettingsError             bad flag, environment variable or settings file
    |   |-- UnauthorizedError         missing or wrong API key
    |   `-- InfeasibleError           no placement satisfies the constraints
    |-- UnavailableError          try later or elsewhere (retry_after_s)
    |   |-- NodeUnreachableError      nothing answers at an address
    |   |-- ShardLostError            a worker died under a running request
    |   |-- OverloadedError           queue or slots are full
    |   |-- DeadlineExceededError     no answer within the time that was set
    |   |-- PortInUseError            an address that we want to listen on is taken
    |   `-- StorageFullError          disk or quota is full
    `-- UntrustedError            never retry, always record
        |-- DigestMismatchError       bytes are not what their digest says
        |-- MalformedFrameError       bytes on the fabric that no node of ours sends
        `-- UnsupportedVersionError   an order or file of a version that we do not speak

Only `serve` knows HTTP status codes, only `cli` knows exit codes: both read `code` and the class.
"""

from typing import ClassVar


class ShoalError(Exception):
    """What is wrong, in numbers, and what to do next.

    `message` states the fault; `hint` the next step (may be empty); `code` is stable, for programs.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InvalidRequestError(ShoalError):
    """The caller must change something; `param` names the field or flag at fault."""

    code = "invalid_request"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class UnknownModelError(InvalidRequestError):
    code = "model_not_found"


class UnknownNodeError(InvalidRequestError):
    code = "node_not_found"


class UnsupportedModelError(InvalidRequestError):
    code = "unsupported_model"


class CorruptFileError(InvalidRequestError):
    code = "corrupt_file"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class KeyReusedError(InvalidRequestError):
    code = "idempotency_key_reused"


class RequestTooLargeError(InvalidRequestError):
    code = "request_too_large"


class SettingsError(InvalidRequestError):
    code = "invalid_settings"


class UnauthorizedError(InvalidRequestError):
    code = "invalid_api_key"


class InfeasibleError(InvalidRequestError):
    code = "no_plan_fits"


class UnavailableError(ShoalError):
    """The request is fine; later or elsewhere it may succeed."""

    code = "unavailable"

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NodeUnreachableError(UnavailableError):
    code = "node_unreachable"


class ShardLostError(UnavailableError):
    code = "shard_lost"


class OverloadedError(UnavailableError):
    code = "overloaded"


class DeadlineExceededError(UnavailableError):
    code = "deadline_exceeded"


class PortInUseError(UnavailableError):
    code = "port_in_use"


class StorageFullError(UnavailableError):
    code = "storage_full"


class UntrustedError(ShoalError):
    """Bytes or orders that must not be acted on; retrying the same source is pointless."""

    code = "untrusted"


class DigestMismatchError(UntrustedError):
    code = "digest_mismatch"


class MalformedFrameError(UntrustedError):
    code = "malformed_frame"


class UnsupportedVersionError(UntrustedError):
    code = "unsupported_version"
