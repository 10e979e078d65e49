"""Errors that crossed the fabric become errors again."""

from collections.abc import Iterator

from shoal.errors import ShoalError, UnavailableError


def failure_of(code: str, text: str, retry_after_s: float | None = None) -> ShoalError:
    """The error of `shoal.errors` with this code; a plain ShoalError when no release of ours knows it."""
    message, _, hint = text.partition("\nhint: ")
    kind = next((kind for kind in _kinds(ShoalError) if kind.code == code), ShoalError)
    message = message or f"the pipeline failed ({code})"
    if issubclass(kind, UnavailableError) and retry_after_s is not None:
        return kind(message, hint=hint, retry_after_s=retry_after_s)
    return kind(message, hint=hint)


def _kinds(kind: type[ShoalError]) -> Iterator[type[ShoalError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)
