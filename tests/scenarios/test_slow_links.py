"""Two real nodes with a slow link between them: activations are written smaller where that was left to the plan, and it answers."""

from typing import Any

import pytest

from shoal.plan.problem import Pin, RequestShape
from shoal.transport.codec import Codec

Fleet = Any  # of conftest
SLOW = "2ms,0.2mbit"
SHAPE = RequestShape(tokens_in=8, tokens_out=16, context_tokens=512, slots=2)
ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "temperature": 0}


@pytest.mark.slow
def test_what_is_left_to_the_plan_is_written_smaller_over_a_slow_link_and_all_else_stays_exact(fleet: Fleet) -> None:
    first = fleet.up("a")
    first.wait_up()
    second = fleet.join("b", "--link", f"{first.id}={SLOW}")
    second.wait_up()
    first.end()
    first.flags = (*first.flags, "--link", f"{second.id}={SLOW}")
    first.start()
    first.wait_up()
    fleet.wait_alive("a", "b")
    pins = (Pin(block=0, node=first.id), Pin(block=fleet.stock.blocks("tiny") - 1, node=second.id))
    with fleet.asking() as shoal:
        said = {"shape": SHAPE, "stages": 2, "pins": pins}
        shoal.deploy("tiny", name="auto", activations=Codec.INT8, activations_per_cut=True, **said)
        shoal.deploy("tiny", name="plain", **said)

    auto, plain = (fleet.wait_ready(name).plan for name in ("auto", "plain"))

    (cut,) = auto.written
    assert auto.stages[0].writes is cut.codec
    assert cut.codec in {Codec.FP16, Codec.INT8_PEAKS}
    assert "of a request's" in cut.text
    assert auto.estimate.latency_s < plain.estimate.latency_s
    assert plain.written == ()
    for name in ("auto", "plain"):
        answer = fleet.openai().chat.completions.create(model=name, **ASKED)
        assert answer.usage.completion_tokens == 16
