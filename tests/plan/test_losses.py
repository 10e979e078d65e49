"""Plans that are made before a device is lost."""

from collections.abc import Callable

import msgspec
import pytest

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.losses import prepare
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Pin, Plan, Problem

Fleet = Callable[..., Problem]
Chain = Callable[..., Problem]
PLENTY = 10**9


def planned(problem: Problem) -> Plan:
    plan = place(problem, StepBudget(PLENTY))
    assert isinstance(plan, Plan)
    return plan


def spans(plan: Plan) -> list[tuple[NodeId, int, int]]:
    return [(stage.node, stage.start, stage.stop) for stage in plan.stages]


@pytest.mark.parametrize("seed", range(12))
def test_each_prepared_plan_is_what_would_be_planned_once_the_device_is_gone(fleet: Fleet, seed: int) -> None:
    problem = fleet(seed, 5, 10, "mesh", 2.5)
    plan = planned(problem)

    prepared = prepare(problem, plan, StepBudget(PLENTY))

    assert prepared.keys() == {stage.node for stage in plan.stages}
    for lost in prepared.keys() - {problem.source}:
        rest = msgspec.structs.replace(
            problem,
            devices=tuple(d for d in problem.devices if d.node != lost),
            links=tuple(link for link in problem.links if lost not in {link.source, link.target}),
        )
        anew, ready = place(rest, StepBudget(PLENTY)), prepared[lost]
        if isinstance(anew, Plan):
            assert isinstance(ready, Plan)
            assert ready.estimate.latency_s == pytest.approx(anew.estimate.latency_s)
            assert lost not in {stage.node for stage in ready.stages}
            assert lost not in {reason.node for reason in ready.reasons}
        else:
            assert isinstance(ready, Infeasible)


def test_nothing_can_be_prepared_for_the_source_and_for_what_is_pinned_to_a_device(chain: Chain) -> None:
    problem = chain([1, 1, 1], [2, 1, 1], [3, 3, 3], {(0, 1): 0.1, (0, 2): 0.1, (1, 2): 0.1})
    problem = msgspec.structs.replace(problem, pins=(Pin(block=2, node=NodeId("n1")),))

    prepared = prepare(problem, planned(problem), StepBudget(PLENTY))

    assert {n: type(answer) for n, answer in prepared.items()} == {"n0": Infeasible, "n1": Infeasible}
    assert "n1" in prepared[NodeId("n1")].reason


def test_demands_for_more_devices_than_are_left_are_told_as_they_are(chain: Chain) -> None:
    problem = chain([1, 1], [2, 1], [3, 3], {(0, 1): 0.1}, stages_exactly=2)

    answer = prepare(problem, planned(problem), StepBudget(PLENTY))[NodeId("n1")]

    assert isinstance(answer, Infeasible)
    assert "2" in answer.reason


def test_what_the_budget_does_not_reach_is_missing_and_not_called_impossible(fleet: Fleet) -> None:
    problem = fleet(3, 5, 10, "mesh", 1.5)
    plan = planned(problem)

    prepared = prepare(problem, plan, StepBudget(0))

    assert prepared.keys() <= {problem.source}
