"""`shoal plan --problem FILE` with the options by which a fleet is asked: they count, or they are refused."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from shoal.cli.files import read_problem
from shoal.cli.plan_file import with_flags
from shoal.cli.plan_flags import DEMANDS, AskFlags
from shoal.errors import InvalidRequestError, SettingsError
from shoal.ids import NodeId
from shoal.plan.problem import Choose, Objective, Pin, Problem

SAMPLES = Path(__file__).resolve().parents[2] / "examples" / "problems"


@pytest.fixture
def stated() -> Problem:
    return read_problem(SAMPLES / "edgeshard_7b.json")


def test_what_was_not_said_is_as_the_file_says(stated: Problem) -> None:
    judged = replace(stated, objective=Objective.ENERGY, stages_exactly=3, pins=(Pin(block=2, node=NodeId("agx-2")),))

    assert with_flags(judged, AskFlags(), DEMANDS) == judged


def test_what_was_said_replaces_what_the_file_says(stated: Problem) -> None:
    pinned = replace(stated, pins=(Pin(block=2, node=NodeId("agx-2")), Pin(block=3, node=NodeId("agx-2"))))
    ask = AskFlags(objective=Objective.THROUGHPUT, stages=2, slots=8, batch=2, in_flight=4, pins=["2=agx-1", "9=rtx"])

    asked = with_flags(pinned, ask, DEMANDS)

    assert (asked.objective, asked.stages_exactly) == (Objective.THROUGHPUT, 2)
    assert (asked.shape.slots, asked.shape.batch, asked.shape.in_flight) == (8, 2, 4)
    assert asked.shape.context_tokens == stated.shape.context_tokens
    assert {pin.block: pin.node for pin in asked.pins} == {3: "agx-2", 2: "agx-1", 9: "rtx-3090"}


def test_what_was_said_is_not_to_be_chosen(stated: Problem) -> None:
    free = replace(stated, choose=Choose(batch=(1, 2, 4), in_flight=8, slots=8))

    assert with_flags(free, AskFlags(batch=2), DEMANDS).choose == Choose(in_flight=8, slots=8)
    assert with_flags(free, AskFlags(in_flight=2), DEMANDS).choose == Choose(batch=(1, 2, 4), slots=8)


def test_another_context_than_that_of_the_files_times_is_refused(stated: Problem) -> None:
    with pytest.raises(InvalidRequestError, match="times are those at a context of 128, not of 2048"):
        with_flags(stated, AskFlags(context=2048), DEMANDS)

    assert with_flags(stated, AskFlags(context=128), DEMANDS) == stated


def test_a_pin_to_a_device_that_the_file_lacks_lists_those_that_it_has(stated: Problem) -> None:
    with pytest.raises(SettingsError, match="agx-1, agx-2"):
        with_flags(stated, AskFlags(pins=["0=kitchen"]), DEMANDS)
