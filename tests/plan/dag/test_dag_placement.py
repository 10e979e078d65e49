"""What a cut through a graph does that a cut between blocks cannot, and what is said of it."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.dag.chain import articulations
from shoal.plan.dag.cost import facts
from shoal.plan.dag.placement import place_graph
from shoal.plan.dag.problem import GraphAnswer, GraphPlan, GraphProblem, OpPin, SharedWeights
from shoal.plan.problem import Infeasible

Line = Callable[..., GraphProblem]
ENOUGH = 10**9


def solved(problem: GraphProblem, steps: int = ENOUGH) -> GraphPlan:
    answer = place_graph(problem, StepBudget(steps))
    assert isinstance(answer, GraphPlan), answer
    return answer


def ops_of(answer: GraphAnswer) -> list[tuple[int, ...]]:
    assert isinstance(answer, GraphPlan), answer
    return [part.ops for part in answer.parts]


def test_a_cut_through_a_block_beats_every_cut_between_blocks(branches: GraphProblem) -> None:
    """Before the block 90 bytes cross, behind it 60, through both branches' necks 4."""
    plan = solved(branches)

    assert ops_of(plan) == [(0, 1, 3), (2, 4, 5, 6)]
    assert plan.parts[0].sends == ("t2", "t4")
    assert plan.solver == "min-cut"
    assert plan.latency_s == 30 + 4 + 4
    between = {1: 10 + 90 + 6, 6: 60 + 60 + 1, 7: 70}  # operators on the board -> seconds
    assert articulations(facts(branches)) == (1, 6)
    assert plan.chain_latency_s == min(between.values()) == 70
    assert plan.gap == 0.0


def test_where_the_cut_lies_follows_the_devices(branches: GraphProblem) -> None:
    quick = replace(branches, tiers=(replace(branches.tiers[0], op_s=(1.0,) * 7), branches.tiers[1]))
    assert ops_of(solved(quick)) == [(0, 1, 2, 3, 4, 5, 6)]

    costly_end = replace(quick, tiers=(replace(quick.tiers[0], op_s=(1.0, 1, 1, 1, 1, 1, 80)), quick.tiers[1]))
    assert ops_of(solved(costly_end)) == [(0, 1, 3), (2, 4, 5, 6)]


def test_a_cut_between_blocks_is_chosen_where_none_is_better(line: Line) -> None:
    chain = line([(50, None, [0]), (3, 0, [1]), (40, 1, [2])], [10.0, 1.0])

    plan = solved(chain)

    assert (plan.solver, ops_of(plan), plan.latency_s) == ("chain", [(0,), (1, 2)], 10 + 3 + 2)
    assert plan.chain_latency_s == plan.latency_s
    assert plan.lower_bound == plan.latency_s


def test_a_tensor_with_several_readers_is_sent_once(line: Line) -> None:
    problem = line([(1, None, [0]), (10, 0, [1, 2, 3])], [20.0, 1.0])

    plan = solved(problem)

    assert ops_of(plan) == [(0,), (1, 2, 3)]
    assert plan.latency_s == 20 + 10 + 3


def test_work_never_returns_to_an_earlier_tier(line: Line) -> None:
    """The server is quick at operator 1 only; sending its small result back is not an option."""
    problem = line([(1, None, [0]), (1, 0, [1]), (1, 1, [2])], [50.0, 1.0])
    clumsy = replace(problem, tiers=(problem.tiers[0], replace(problem.tiers[1], op_s=(1000.0, 1.0, 1000.0))))

    plan = solved(clumsy)

    assert ops_of(plan) == [(0, 1, 2)]


def test_a_tier_may_pass_frames_on_and_run_nothing(line: Line) -> None:
    problem = line([(1, None, [0]), (4, 0, [1])], [100.0, 90.0, 1.0])

    plan = solved(problem)

    assert ops_of(plan) == [(0,), (), (1,)]
    assert plan.latency_s == 100 + 4 + 4 + 1
    assert "passes frames on" in plan.reasons[1].text


def test_answers_come_back_at_their_own_cost(line: Line) -> None:
    problem = line([(1, None, [0]), (4, 0, [1]), (7, 1, [])], [10.0, 1.0])
    answered = replace(problem, tensors=(*problem.tensors[:2], replace(problem.tensors[2], returned=True)))

    assert ops_of(solved(problem)) == [(0,), (1,)]
    assert ops_of(solved(answered)) == [(0, 1)]
    cheap = replace(answered, tensors=(*answered.tensors[:2], replace(answered.tensors[2], size_bytes=2)))
    plan = solved(cheap)
    assert (plan.latency_s, plan.parts[1].return_s) == (10 + 4 + 1 + 2, 2)


def test_inputs_leave_the_source_only_where_that_is_allowed(line: Line) -> None:
    problem = line([(1, None, [0]), (50, 0, [1])], [10.0, 1.0])

    assert ops_of(solved(problem)) == [(0, 1)]
    assert ops_of(solved(replace(problem, pin_inputs=False))) == [(), (0, 1)]
    kept = solved(problem).alternatives[1]
    assert (kept.latency_s, kept.refused) == (1 + 2, "operator 0 (op 0) stays on board")


def test_memory_moves_the_cut_and_the_plan_says_how_it_was_proven(line: Line) -> None:
    tensors = [(1, None, [0]), (5, 0, [1]), (30, 1, [2]), (40, 2, [3])]
    free = line(tensors, [100.0, 1.0], weights=[1, 4, 4, 4])
    assert ops_of(solved(free)) == [(0,), (1, 2, 3)]

    short = line(tensors, [100.0, 1.0], weights=[1, 4, 4, 4], memory=[100, 9])

    plan = solved(short)
    assert ops_of(plan) == [(0, 1), (2, 3)]
    assert plan.latency_s == 200 + 30 + 2
    assert plan.gap == 0.0


def test_weights_that_several_operators_use_are_held_once(line: Line) -> None:
    problem = line([(1, None, [0]), (1, 0, [1]), (1, 1, [2])], [100.0, 1.0], weights=[0, 8, 8], memory=[100, 9])

    assert ops_of(solved(problem)) == [(0, 1), (2,)]
    tied = replace(problem, shared=(SharedWeights(size_bytes=8, ops=(1, 2)),))
    assert ops_of(solved(tied)) == [(0,), (1, 2)]


def test_a_model_that_fits_nowhere_says_what_is_missing(line: Line) -> None:
    problem = line([(1, None, [0]), (1, 0, [1]), (1, 1, [2])], [2.0, 1.0], weights=[5, 5, 5], memory=[6, 6])

    answer = place_graph(problem, StepBudget(ENOUGH))

    assert isinstance(answer, Infeasible)
    assert "does not fit" in answer.reason
    assert (answer.missing_bytes, answer.needed_bytes, answer.available_bytes) == (4, 15, 11)


def test_an_operator_that_is_too_large_for_all_tiers_is_named(line: Line) -> None:
    problem = line([(1, None, [0]), (1, 0, [1])], [2.0, 1.0], weights=[1, 50], memory=[20, 30])

    answer = place_graph(problem, StepBudget(ENOUGH))

    assert isinstance(answer, Infeasible)
    assert "operator 1 (op 1) can be nowhere: it needs 50 B" in answer.reason
    assert answer.missing_bytes == 20


def test_a_pin_beyond_a_missing_link_has_no_placement(line: Line) -> None:
    problem = line([(1, None, [0]), (1, 0, [1])], [2.0, 1.0], pins=(OpPin(op=1, node=NodeId("gateway")),))

    answer = place_graph(replace(problem, links=()), StepBudget(ENOUGH))

    assert isinstance(answer, Infeasible)
    assert "a link that is missing" in answer.reason


def test_without_a_link_the_source_does_all(line: Line) -> None:
    plan = solved(replace(line([(1, None, [0]), (1, 0, [1])], [50.0, 1.0]), links=()))

    assert ops_of(plan) == [(0, 1)]
    assert plan.alternatives[1].refused == "no link leads there and back"
    assert plan.reasons[1].text.startswith("left out: no operator may be there")


@pytest.fixture
def knapsack(line: Line) -> GraphProblem:
    """Weights that no sum of makes the limit exactly: one price cannot tell which operators go."""
    count = 12
    stars = [(1, None, [0]), *((3 + i % 3, 0 if i == 1 else None, [i]) for i in range(1, count))]
    weights = [0, *(5 + 3 * (i % 4) for i in range(1, count))]
    return line(stars, [10.0, 1.0], weights=weights, memory=[60, 61], pin_inputs=False)


def test_a_spent_budget_gives_a_plan_with_its_gap(knapsack: GraphProblem) -> None:
    best, early = solved(knapsack), solved(knapsack, steps=20)

    assert (best.gap, best.solver) == (0.0, "min-cut-branch-and-bound")
    assert early.lower_bound <= best.latency_s <= early.latency_s
    assert early.gap > 0


def test_whenever_the_budget_is_spent_the_bound_is_true(knapsack: GraphProblem) -> None:
    best = solved(knapsack)
    for steps in range(3, 400, 7):
        answer = solved(knapsack, steps)

        assert answer.lower_bound <= best.latency_s * (1 + 1e-9) <= answer.latency_s * (1 + 2e-9), steps


def test_a_source_without_room_for_its_own_worker_cannot_take_part(line: Line) -> None:
    problem = line([(1, None, [0])], [9.0, 1.0], weights=[1], memory=[4, 9], pin_inputs=False)
    crowded = replace(problem, tiers=(replace(problem.tiers[0], fixed_bytes=5), problem.tiers[1]))

    assert ops_of(solved(problem)) == [(), (0,)]
    assert isinstance(place_graph(crowded, StepBudget(ENOUGH)), Infeasible)


@pytest.mark.parametrize("tiers", [2, 3])
def test_a_graph_of_a_thousand_operators_is_cut_in_few_steps(line: Line, tiers: int) -> None:
    tensors = [(1, None, [0]), *((7 + i * 37 % 100, i, [j for j in (i + 1, i + 3) if j < 1000]) for i in range(999))]
    problem = line(tensors, [9.0, 3.0, 1.0][:tiers])

    plan = solved(problem, steps=50)

    assert plan.gap == 0.0
    assert sum(len(part.ops) for part in plan.parts) == 1000
