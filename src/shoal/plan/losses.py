"""What to do when a device is lost, thought out before: a plan for each single loss, or why there is none.

A loss is the one event that leaves no time to think: the pipeline is down until another one stands.  Only devices of the plan
count, for the plan goes on without the others.  Two losses at once are not prepared for: that is as many plans as there are pairs.
"""

from msgspec.structs import replace

from shoal.errors import ShoalError
from shoal.ids import NodeId
from shoal.plan.budget import Budget
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Plan, Problem


def prepare(problem: Problem, plan: Plan, budget: Budget) -> dict[NodeId, Answer]:
    """For each device of *plan*, the answer to *problem* without it; devices that the budget did not reach are missing.

    What was not decided when the budget was spent is missing too: without proof, "there is no plan" would be no answer.
    """
    answers: dict[NodeId, Answer] = {}
    for node in dict.fromkeys(stage.node for stage in plan.stages):
        if node == problem.source:
            answers[node] = Infeasible(
                reason=f"prompts enter at {node}", needed_bytes=0, available_bytes=0, hint="bring that node back"
            )
            continue
        if budget.spent():
            break
        answer = _without(problem, node, budget)
        if isinstance(answer, Plan) or not budget.spent():
            answers[node] = answer
    return answers


def _without(problem: Problem, node: NodeId, budget: Budget) -> Answer:
    try:
        answer = place(replace(problem, exclude=(*problem.exclude, node)), budget)
    except ShoalError as error:  # demands that no longer make sense: a number of stages for which nodes are missing
        return Infeasible(reason=error.message, needed_bytes=0, available_bytes=0, hint=error.hint)
    if isinstance(answer, Infeasible):
        return answer
    # Its reasons would call that device excluded by request; when this plan is used, it is not there.
    return replace(answer, reasons=tuple(reason for reason in answer.reasons if reason.node != node))
