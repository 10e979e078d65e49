"""Record the shape of every value that nodes exchange, so that later versions can be held to it: `tests/golden/wire.json`.

Run with the package of the version that is to be recorded: `PYTHONPATH=src python tools/golden/wire.py FILE`.
"""

import enum
import importlib
import inspect
import json
import sys
from pathlib import Path

import msgspec

MODULES = (
    "shoal.fleet.deployment",
    "shoal.fleet.faults",
    "shoal.fleet.order",
    "shoal.fleet.report",
    "shoal.fleet.spec",
    "shoal.fleet.view",
    "shoal.fleet.views",
    "shoal.node.calls",
    "shoal.node.messages",
    "shoal.plan.problem",
    "shoal.profile.fleet",
    "shoal.runtime.frames",
    "shoal.runtime.ports",
    "shoal.runtime.request",
    "shoal.runtime.speculate.speculator",
)


WORDS = (*MODULES, "shoal.fleet.reconcile", "shoal.runtime.settings", "shoal.transport.codec")
"""Modules whose enumerations travel."""


def words() -> dict[str, list[object]]:
    """The values of each enumeration, by name of module and class."""
    found = {}
    for name in WORDS:
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and issubclass(cls, enum.Enum) and cls.__module__ == name:
                found[f"{name}.{cls.__name__}"] = [member.value for member in cls]
    return found


def shapes() -> dict[str, object]:
    """By name of module and class."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, msgspec.Struct) and cls.__module__ == name:
                found[f"{name}.{cls.__name__}"] = shape(cls)
    return found


def shape(cls: type[msgspec.Struct]) -> dict[str, object]:
    """How a value of *cls* is written: its tag, as a list or a map, and its fields in order."""
    config = cls.__struct_config__
    fields = [
        {"name": f.encode_name, "required": f.required, "type": _type(f.type)} for f in msgspec.structs.fields(cls)
    ]
    return {"tag": config.tag, "array": config.array_like, "omits": config.omit_defaults, "fields": fields}


def _type(annotation: object) -> str:
    """As it is written in the source, so that the same type is the same text in every version of Python."""
    return str(annotation).replace("typing.", "").replace("<class '", "").replace("'>", "")


if __name__ == "__main__":
    recorded = {"structs": shapes(), "words": words()}
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
