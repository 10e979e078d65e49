"""What is said of devices beside a plan is true of them."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.explain import alternatives
from shoal.plan.placement import place
from shoal.plan.problem import Limits, Plan, Problem

Chain = Callable[..., Problem]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"joules_limit": 2.5}, "a request draws 3 J, its battery gives 2.5 J"),
        ({"joules_limit": 3.0}, ""),
    ],
)
def test_a_device_alone_is_possible_only_with_its_battery(chain: Chain, change: dict[str, float], said: str) -> None:
    problem = chain((1, 1, 1), (1.0, 1.0), (9, 9), {(0, 1): 0.1})
    tired = replace(problem.devices[0], active_watts=1.0, **change)

    alone = alternatives(replace(problem, devices=(tired, problem.devices[1])))[0]

    assert alone.refused == said


def test_a_device_alone_is_not_possible_beyond_limits_or_without_one_that_must_take_part(chain: Chain) -> None:
    problem = chain((1, 1, 1), (1.0, 1.0), (9, 9), {(0, 1): 0.1})

    late = alternatives(replace(problem, limits=Limits(latency_s=2.0)))[0]
    lonely = alternatives(replace(problem, require=(NodeId("n1"),)))[0]

    assert late.refused == "it breaks the limit on latency"
    assert lonely.refused == "n1 must take part"


def test_a_device_whose_battery_allows_no_block_is_told_from_one_without_pins(chain: Chain) -> None:
    problem = chain((1, 1, 1), (1.0, 1.0), (9, 9), {(0, 1): 0.1})
    empty = replace(problem.devices[1], active_watts=2.0, joules_limit=0.5)

    plan = place(replace(problem, devices=(problem.devices[0], empty)), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert plan.reasons[1].text == "left out: its battery gives 0.5 J for a request, its smallest shard draws 2 J"
