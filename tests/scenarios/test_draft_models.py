"""A draft model beside the first stage of two real nodes: the answer is the plain one, some of it was guessed, and it is kept."""

from typing import Any

import pytest

from shoal.errors import InvalidRequestError
from shoal.plan.problem import Pin, RequestShape
from shoal.runtime.speculate.speculator import OFF, Speculation

Fleet = Any  # of conftest
SHAPE = RequestShape(tokens_in=8, tokens_out=16, context_tokens=512, slots=2)
ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 0}


@pytest.mark.slow
def test_a_model_that_guesses_for_itself_is_right_and_changes_no_text(fleet: Fleet) -> None:
    first, second = fleet.site("b")
    pins = (Pin(block=0, node=first.id), Pin(block=fleet.stock.blocks("tiny") - 1, node=second.id))
    said = {"shape": SHAPE, "stages": 2, "pins": pins}
    with fleet.asking() as shoal:
        shoal.deploy("tiny", name="plain", speculation=OFF, **said)
        shoal.deploy("tiny", name="drafted", speculation=Speculation(most=4, adaptive=False), draft="tiny", **said)
        with pytest.raises(InvalidRequestError, match="nothing"):
            shoal.deploy("tiny", name="odd", draft="nothing", **said)
    plain, drafted = (fleet.wait_ready(name).plan for name in ("plain", "drafted"))

    texts = {}
    for name in ("plain", "drafted"):
        answer = fleet.openai().chat.completions.create(model=name, **ASKED)
        texts[name] = answer.choices[0].message.content
    details = answer.usage.completion_tokens_details

    assert texts["plain"] == texts["drafted"]
    assert details.accepted_prediction_tokens > 0
    assert drafted.stages[0].memory_bytes > plain.stages[0].memory_bytes
    assert drafted.stages[1].memory_bytes == plain.stages[1].memory_bytes
