"""Plans that are priced anew, beside the one that serves."""

from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.placement import place
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Plan, Problem, RequestShape
from shoal.plan.written import repriced

A, B, C = (NodeId(name) for name in "abc")
PROCESS = 7


def relayed_problem() -> Problem:
    """A holds one block of three and reaches B by way of C alone, which holds one, too."""
    return Problem(
        blocks=tuple(BlockSpec(name=str(i), weights_bytes=10) for i in range(3)),
        devices=tuple(
            DeviceSpec(
                node=node, memory_budget_bytes=10 + 2 * PROCESS, fixed_bytes=PROCESS, decode_s=(0.1,) * 3,
                prefill_s=(0.1,) * 3,
            )
            for node in (A, B, C)
        ),
        links=tuple(
            LinkSpec(source=source, target=target, latency_s=0.001, bytes_per_s=1e6)
            for source, target in ((A, C), (C, A), (C, B), (B, C))
        ),
        shape=RequestShape(tokens_in=1, tokens_out=10, context_tokens=11, slots=1),
        source=A,
        relay_if_needed=True,
    )  # fmt: skip


def test_a_plan_with_relays_keeps_the_memory_that_it_was_made_with() -> None:
    problem = relayed_problem()
    plan = place(problem, StepBudget(10**6))
    assert isinstance(plan, Plan)
    assert any(stage.is_relay for stage in plan.stages)
    slower = replace(problem, links=tuple(replace(link, latency_s=0.002) for link in problem.links))

    again = repriced(slower, plan)

    assert [s.memory_bytes for s in again.stages] == [s.memory_bytes for s in plan.stages]
    assert again.estimate.latency_s > plan.estimate.latency_s
    assert repriced(problem, plan) == plan
