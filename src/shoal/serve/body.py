"""Request bodies, strictly: bytes to a struct, or an error that names the field.

OpenAI's clients send fields that we need not act on (`user`, `metadata`, ...), and ask for things that we cannot do
(`audio`, `functions`, ...).  Dropping the second kind in silence would give wrong answers that look right, refusing the first
would break working programs; so every field is either known, listed as harmless, or refused by name.
"""

import difflib
import json
import re
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from shoal.errors import InvalidRequestError

T = TypeVar("T", bound=msgspec.Struct)


class FieldRules(msgspec.Struct, frozen=True, kw_only=True):
    """How a protocol treats fields that its struct does not have.

    `harmless` may say anything (dotted paths; list positions are left out: `messages.name`).
    `refused` maps a field to (values that ask for nothing, why anything else is refused).
    """

    harmless: frozenset[str] = frozenset()
    refused: dict[str, tuple[tuple[object, ...], str]] = {}


def parse_body(body: bytes, kind: type[T], rules: FieldRules = FieldRules()) -> T:  # noqa: B008 - frozen
    """Decode *body*; raises InvalidRequestError with the field's path in `param`."""
    raw = _decode(body)
    if not isinstance(raw, dict):
        raise InvalidRequestError("the body must be a JSON object", hint='send {"model": ..., ...}')
    for name, (idle, why) in rules.refused.items():
        if raw.get(name) is not None and raw[name] not in idle:
            raise InvalidRequestError(f"{name} is not supported: {why}", hint=f"leave {name} out", param=name)
    given = {k: v for k, v in raw.items() if k not in rules.refused}
    try:
        parsed = msgspec.convert(given, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _named(error, given, kind) from None
    except RecursionError:
        raise _too_deep() from None
    for path in unknown_fields(given, msgspec.to_builtins(parsed)):
        if re.sub(r"\[\d+\]", "", path) not in rules.harmless:
            raise _unknown(path, kind)
    return parsed


def unknown_fields(sent: object, kept: object, at: str = "") -> Iterator[str]:
    """Paths of object members in *sent* that decoding and encoding again did not keep."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        for name, value in sent.items():
            path = f"{at}.{name}" if at else str(name)
            if name not in kept:
                yield path
            else:
                yield from unknown_fields(value, kept[name], path)
    elif isinstance(sent, list) and isinstance(kept, list | tuple):
        for position, (left, right) in enumerate(zip(sent, kept, strict=False)):
            yield from unknown_fields(left, right, f"{at}[{position}]")


def _decode(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8: {error.reason}", hint="encode it as UTF-8") from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}", hint=_json_hint(body)) from None


def _json_hint(body: bytes) -> str:
    if re.search(rb"\b(?:NaN|Infinity)\b", body):
        return "NaN and Infinity are not JSON; leave the field out, or send a number"
    if re.search(rb"\d[eE]\+?\d{3}", body):
        return "numbers end at about 1.8e308"
    return "check its quotes, commas and brackets, and that all of it was sent as JSON"


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(
        "the body is nested too deeply", hint="no field of this API needs more than a few levels"
    )


def _named(error: msgspec.ValidationError, given: object, kind: type[msgspec.Struct]) -> InvalidRequestError:
    """The message of msgspec with the field first and the offending value last."""
    text = str(error)
    what, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if missing := re.search(r"missing required field `(\w+)`", what):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequestError(f"{name} is required", hint=f"add {name}; /schema shows every field", param=name)
    if extra := re.search(r"contains unknown field `(\w+)`", what):
        return _unknown(f"{path}.{extra[1]}" if path else extra[1], kind)
    value = _at(given, path)
    if "got `" in what:
        shown = f" ({json.dumps(value)})" if isinstance(value, int | float) else ""
    else:
        shown = f", got {value!r}" if isinstance(value, int | float) else ""
    return InvalidRequestError(
        f"{path or 'body'}: {what[:1].lower()}{what[1:]}{shown}",
        hint=f"see /schema for what {path or 'the body'} may be",
        param=path or None,
    )


def _at(value: object, path: str) -> object:
    for step in re.findall(r"[^.\[\]]+", path):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit():
            value = value[int(step)]
        else:
            return None
    return value


def _unknown(path: str, kind: type[msgspec.Struct]) -> InvalidRequestError:
    close = difflib.get_close_matches(path, kind.__struct_fields__, n=1)
    hint = f"did you mean {close[0]}?" if close else "leave it out, or see /schema for what is known"
    return InvalidRequestError(f"unknown field {path}", hint=hint, param=path)
