"""A node of the version before stays in the fleet: what it says is understood, and what is said to it as well.

`tests/golden/wire.json` has the shape of every value that travelled then (`tools/golden/wire.py`).  Readers ignore fields that they
do not know and need those that they do, so a field may be added with a default, and none may go that the others ask for.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "wire.json").read_text())
WIDER = {
    # Name of struct and field: why another type is understood by both.
    ("shoal.plan.problem.Plan", "stages"): "one without a stage was never made",
}
NEW_WORDS = {
    # A node of the version before drops a message with a word that it does not know: when that may be said.
    "shoal.fleet.reconcile.Phase": {
        "asleep",
        "drowsy",
    },  # of models that are loaded on demand, which it cannot be asked for
    "shoal.fleet.views.DeploymentState": {"asleep"},  # to people and programs, not to nodes
    "shoal.transport.codec.Codec": {"int8+peaks"},  # of deployments that ask for it
}


def shape_now(name: str) -> dict[str, Any]:
    module, _, cls = name.rpartition(".")
    found = getattr(importlib.import_module(module), cls, None)
    assert found is not None, f"{name} is gone, and the version before says it"
    config = found.__struct_config__
    fields = [
        {"name": f.encode_name, "required": f.required, "type": type_of(f.type)} for f in msgspec.structs.fields(found)
    ]
    return {"tag": config.tag, "array": config.array_like, "omits": config.omit_defaults, "fields": fields}


def type_of(annotation: object) -> str:
    return str(annotation).replace("typing.", "").replace("<class '", "").replace("'>", "")


@pytest.mark.parametrize("name", sorted(RECORDED["words"]))
def test_no_word_is_gone_and_new_ones_are_said_only_where_they_are_asked_for(name: str) -> None:
    module, _, cls = name.rpartition(".")
    now = {member.value for member in getattr(importlib.import_module(module), cls)}

    assert set(RECORDED["words"][name]) <= now
    assert now - set(RECORDED["words"][name]) <= NEW_WORDS.get(name, set())


@pytest.mark.parametrize("name", sorted(RECORDED["structs"]))
def test_both_versions_understand_what_the_other_says(name: str) -> None:
    before, now = RECORDED["structs"][name], shape_now(name)
    fields = {f["name"]: f for f in now["fields"]}

    assert (before["tag"], before["array"], before["omits"]) == (now["tag"], now["array"], now["omits"])
    known = [f["name"] for f in before["fields"]]
    if before["array"]:
        assert [f["name"] for f in now["fields"]][: len(known)] == known, "a list is read by position"
    for field in before["fields"]:
        ours = fields.get(field["name"])
        assert ours is not None or not field["required"], f"the version before needs {field['name']}"
        if ours is not None:
            assert ours["type"] == field["type"] or (name, field["name"]) in WIDER
            assert ours["required"] <= field["required"], f"the version before may leave {field['name']} out"
    assert not [f["name"] for f in now["fields"] if f["required"] and f["name"] not in known], "it does not say these"
