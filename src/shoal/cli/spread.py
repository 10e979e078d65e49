"""Options that several commands share, as one value.

A command line is flat, and typer reads it from a function's parameters; two commands with the same twenty options would list
them twice, and twice hand them on one by one.  Here they are the fields of a struct, and a command takes that struct as one
parameter whose default holds the options' defaults.  typer sees the fields in its place, in their order; so does whoever
calls the command as a function.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import get_type_hints

import msgspec


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let *command* be called with the fields of its parameters that are structs."""
    signature = inspect.signature(command)
    groups = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.default, msgspec.Struct)
    }

    @functools.wraps(command)
    def called(*positional: object, **given: object) -> None:
        whole = {name: _filled(group, given) for name, group in groups.items()}
        command(*positional, **given, **whole)

    flat = [one for parameter in signature.parameters.values() for one in _spread(parameter)]
    called.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    return called


def _filled(group: msgspec.Struct, given: dict[str, object]) -> msgspec.Struct:
    """*group* with what was given of it, which is taken out of *given*."""
    return msgspec.structs.replace(group, **{f: given.pop(f) for f in group.__struct_fields__ if f in given})


def _spread(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    group = parameter.default
    if not isinstance(group, msgspec.Struct):
        yield parameter
        return
    kinds = get_type_hints(type(group), include_extras=True)
    for field in group.__struct_fields__:
        default = getattr(group, field)
        yield inspect.Parameter(field, parameter.kind, default=default, annotation=kinds[field])
