"""Plans on problems whose best answer is known, and what is said about them."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import DeadlineBudget, StepBudget
from shoal.plan.cost import Span, shard_joules
from shoal.plan.exact import enumerate_best, fits
from shoal.plan.placement import place
from shoal.plan.problem import (
    Answer,
    BlockSpec,
    Infeasible,
    Limits,
    Objective,
    Pin,
    Plan,
    Problem,
    RequestShape,
    Residency,
    SharedTensor,
)

Chain = Callable[..., Problem]
N0, N1, N2 = NodeId("n0"), NodeId("n1"), NodeId("n2")


def solve(problem: Problem) -> Answer:
    return place(problem, StepBudget(10**9))


def planned(answer: Answer) -> Plan:
    assert isinstance(answer, Plan), answer
    return answer


def refused(answer: Answer) -> Infeasible:
    assert isinstance(answer, Infeasible), answer
    return answer


def homes(plan: Plan) -> str:
    return "".join(stage.node[1] * (stage.stop - stage.start) for stage in plan.stages)


def test_memory_that_a_layer_wise_search_forgets_is_kept_to_the_end(chain: Chain) -> None:
    """Layers in order of cost lead a layer-wise shortest path onto the device that the tail needs; it dead-ends there."""
    problem = chain([2, 1, 2, 2], [7, 6, 9], [2, 4, 1], {(0, 1): 5, (0, 2): 2, (1, 2): 2})

    plan = planned(solve(problem))

    assert homes(plan) == "0211"
    assert plan.estimate.latency_s == pytest.approx(51 + 5)


def test_a_tied_tensor_takes_its_memory_once_where_its_blocks_meet(chain: Chain) -> None:
    """Embedding, layer and head of 10, 5 and 10, of which embedding and head share 8: together 17."""
    tied = (SharedTensor(size_bytes=8, blocks=(0, 2)),)

    assert homes(planned(solve(chain([10, 5, 10], [1, 1], [17, 9], {(0, 1): 1}, shared=tied)))) == "000"
    assert refused(solve(chain([10, 5, 10], [1, 1], [16, 9], {(0, 1): 1}, shared=tied))).missing_bytes == 1
    assert refused(solve(chain([10, 5, 10], [1, 1], [17, 9], {(0, 1): 1}))).missing_bytes > 0


def test_filling_the_source_first_beats_the_greedy_first_step(chain: Chain) -> None:
    """The greedy path leaves the slow source after one layer, then has to come back: 16 plus the way home against 11 plus it."""
    problem = chain([1, 1, 1, 1], [2, 1, 9], [2, 2, 4], {(0, 1): 5, (0, 2): 5, (1, 2): 3})

    plan = planned(solve(problem))

    assert homes(plan) == "0011"
    assert plan.estimate.latency_s == pytest.approx(11 + 5)


def test_a_device_behind_a_slow_link_is_left_out_and_the_reason_has_the_numbers(chain: Chain) -> None:
    problem = chain([1] * 4, [0.010, 0.002], [9, 9], {(0, 1): 0.040})

    plan = planned(solve(problem))

    assert homes(plan) == "0000"
    used, left_out = plan.reasons
    assert used.used
    assert not left_out.used
    assert left_out.text == (
        "left out: the best plan with it takes 96 ms per token against 40 ms (96 ms per request against 40 ms); "
        "there its links take 80 ms of a token and its blocks 6 ms"
    )


def test_the_same_device_is_used_once_the_link_is_quick_and_the_reason_says_what_it_saves(chain: Chain) -> None:
    plan = planned(solve(chain([1] * 4, [0.010, 0.002], [9, 9], {(0, 1): 0.001})))

    assert homes(plan) == "0111"
    assert "a block is pinned to it" in plan.reasons[0].text
    assert "the best plan without it takes 40 ms per token against 18 ms" in plan.reasons[1].text


def test_a_device_that_runs_another_model_too_is_named_with_what_that_holds(chain: Chain) -> None:
    """Its blocks were timed alone, so the prediction holds only while the other model is idle."""
    problem = chain([1, 1], [1, 9], [5000, 5000], {(0, 1): 1})
    busy, free = problem.devices
    shared = replace(problem, devices=(replace(busy, memory_promised_bytes=3000), free))

    text = {case: planned(solve(case)).reasons[0].text for case in (problem, shared)}

    assert "other deployments hold 3 KB here" in text[shared]
    assert "slower than predicted" in text[shared]
    assert "other deployments" not in text[problem]


def test_one_device_alone_is_always_weighed_and_refused_with_numbers(chain: Chain) -> None:
    plan = planned(solve(chain([10**6] * 4, [1e-8, 1e-8], [3_000_000, 9_000_000], {(0, 1): 0.001})))

    alone = {alternative.node: alternative for alternative in plan.alternatives}
    assert alone[N0].refused == "the whole model needs 4 MB, 3 MB are free"
    assert alone[N1].refused == "the first block stays on the source"
    assert alone[N1].estimate is not None


def test_more_streams_turn_a_latency_plan_into_one_that_balances_devices(chain: Chain) -> None:
    problem = chain([1] * 6, [0.010, 0.011], [9, 9], {(0, 1): 0.005})
    shape = RequestShape(tokens_in=1, tokens_out=50, context_tokens=0, slots=8, in_flight=8)
    busy = Problem(
        blocks=problem.blocks, devices=problem.devices, links=problem.links, shape=shape, source=N0,
        objective=Objective.THROUGHPUT,
    )  # fmt: skip

    plan = planned(solve(busy))

    assert homes(plan) == "000111"
    assert plan.estimate.tokens_per_s == pytest.approx(1 / 0.033, rel=0.01)
    assert plan.gap == pytest.approx(0, abs=1e-9)


def test_the_source_may_run_both_ends_so_that_answers_are_seen_there_alone(chain: Chain) -> None:
    problem = chain([1] * 4, [0.010, 0.001], [3, 2], {(0, 1): 0.001}, pin_last=True)

    plan = planned(solve(problem))

    assert homes(plan) == "0110"


def test_both_stages_of_the_source_share_its_memory(chain: Chain) -> None:
    """The source is the quick one and would take a third block if its two stages were weighed apart."""
    plan = planned(solve(chain([1] * 4, [0.001, 0.010], [2, 9], {(0, 1): 0.001}, pin_last=True)))

    assert homes(plan) == "0110"


def test_a_last_block_that_stays_on_the_source_ends_there_wherever_the_first_one_runs(chain: Chain) -> None:
    plan = planned(solve(chain([1] * 4, [0.010, 0.001], [9, 9], {(0, 1): 0.001}, pin_first=False, pin_last=True)))

    assert homes(plan) == "1110"


def test_pins_and_stage_counts_by_hand_are_kept(chain: Chain) -> None:
    links = {(0, 1): 0.001, (0, 2): 0.001, (1, 2): 0.001}

    pinned = planned(solve(chain([1] * 4, [1, 2, 3], [9, 9, 9], links, pins=(Pin(block=2, node=N2),))))
    three = planned(solve(chain([1] * 4, [1, 2, 3], [9, 9, 9], links, stages_exactly=3)))

    assert homes(pinned)[2] == "2"
    assert len(three.stages) == 3
    assert planned(solve(chain([1] * 4, [1, 2, 3], [9, 9, 9], links))).stages[0].stop == 4


def test_excluded_and_hopeless_devices_are_named(chain: Chain) -> None:
    links = {(0, 1): 0.001}
    plan = planned(solve(chain([5, 5], [1, 1, 1], [10, 10, 3], links, exclude=(N1,))))

    texts = {reason.node: reason.text for reason in plan.reasons}
    assert texts[N1] == "left out: excluded by request"
    assert texts[N2] == "left out: 3 B are free, its smallest possible shard needs 5 B"


def test_when_memory_lacks_the_answer_says_how_much_and_where(chain: Chain) -> None:
    answer = refused(solve(chain([5, 5, 5], [1, 1], [6, 7], {(0, 1): 0.001})))

    assert answer.missing_bytes == 3
    assert "n1 would need 10 B for blocks 1-2 and has 7 B" in answer.reason


def test_the_nearest_context_and_slots_that_fit_are_computed(chain: Chain) -> None:
    problem = chain([100, 100], [1.0], [1000], {})
    blocks = tuple(_with_cache(block) for block in problem.blocks)
    shape = RequestShape(tokens_in=8, tokens_out=8, context_tokens=208, slots=4)
    full = Problem(blocks=blocks, devices=problem.devices, links=(), shape=shape, source=N0)

    answer = refused(solve(full))

    assert answer.missing_bytes == 200 + 2 * 4 * 208 - 1000
    assert answer.hint == "it fits with a context of 80 tokens (now 208) or with 1 slot (now 4)"
    assert isinstance(solve(_reshaped(full, context_tokens=80)), Plan)
    assert isinstance(solve(_reshaped(full, context_tokens=80 + 64)), Infeasible)
    assert isinstance(solve(_reshaped(full, slots=1)), Plan)
    assert isinstance(solve(_reshaped(full, slots=2)), Infeasible)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stages_exactly": 5}, "3 nodes can run 3 stages at most, 5 are asked for"),
        ({"stages_exactly": 2, "exclude": (N1, N2)}, "1 node can run 1 stage at most, 2 are asked for"),
        ({"max_stages": 1, "pins": (Pin(block=3, node=N1),)}, "at most 1 stages"),
        ({"pins": (Pin(block=1, node=N1), Pin(block=2, node=N0))}, "pins contradict"),
        ({"exclude": (N0, N1, N2), "pin_first": False}, "every device is excluded"),
    ],
)
def test_demands_that_contradict_each_other_are_named(chain: Chain, changes: dict[str, object], reason: str) -> None:
    links = {(0, 1): 0.001, (0, 2): 0.001, (1, 2): 0.001}

    assert reason in refused(solve(chain([1] * 4, [1, 1, 1], [9, 9, 9], links, **changes))).reason


def test_a_fleet_in_two_halves_says_that_links_are_missing(chain: Chain) -> None:
    answer = refused(solve(chain([1] * 4, [1, 1], [9, 9], {}, pins=(Pin(block=3, node=N1),))))

    assert "pins" in answer.reason or "links" in answer.reason
    assert answer.missing_bytes == 0


def test_many_devices_get_a_plan_with_an_honest_gap(chain: Chain) -> None:
    count = 20
    links = {(i, j): 0.001 + 0.0001 * ((7 * i + 3 * j) % 11) for i in range(count) for j in range(i + 1, count)}
    problem = chain([1] * 40, [0.01 + 0.001 * (i % 4) for i in range(count)], [6] * count, links)

    plan = planned(solve(problem))

    assert len(plan.stages) >= 7
    assert 0 <= plan.gap < 0.2
    assert plan.lower_bound <= plan.estimate.latency_s


def test_a_spent_deadline_still_gives_an_answer(chain: Chain) -> None:
    problem = chain([1] * 4, [0.010, 0.002], [9, 9], {(0, 1): 0.001})

    plan = planned(place(problem, DeadlineBudget(lambda: 5.0, 0.0)))

    assert homes(plan) == "0111"


def _with_cache(block: BlockSpec) -> BlockSpec:
    return replace(block, kv_bytes_per_token=1)


def _reshaped(problem: Problem, **changes: int) -> Problem:
    return replace(problem, shape=replace(problem.shape, **changes))


def test_frames_go_through_a_third_device_where_that_is_faster(chain: Chain) -> None:
    """The source reaches the fast device over a slow link only; both have a good one to a device that holds nothing."""
    links = {(0, 1): 1.0, (0, 2): 0.01, (2, 1): 0.01}
    problem = chain((1, 1), (5.0, 0.1, 9.0), (1, 1, 0), links)

    direct, relayed = (place(replace(problem, relay=relay), StepBudget(10**6)) for relay in (False, True))

    assert isinstance(direct, Plan)
    assert isinstance(relayed, Plan)
    assert [s.node for s in direct.stages] == ["n0", "n1"]
    assert [(s.node, s.start, s.stop) for s in relayed.stages] == [("n0", 0, 1), ("n2", 1, 1), ("n1", 1, 2)]
    assert relayed.estimate.latency_s < direct.estimate.latency_s
    assert next(r.text for r in relayed.reasons if r.node == "n2").startswith("runs no block: it relays")


def test_activations_stay_in_their_region(chain: Chain) -> None:
    problem = chain((1, 1), (5.0, 0.1, 1.0), (1, 2, 2), {(0, 1): 0.1, (0, 2): 0.1})
    regions = ("eu", "us", "eu")
    placed = replace(
        problem,
        devices=tuple(replace(d, region=region) for d, region in zip(problem.devices, regions, strict=True)),
        residency=Residency(regions=("eu",)),
    )

    plan = place(placed, StepBudget(10**6))
    at_home = place(replace(placed, residency=Residency(regions=("us",))), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert [s.node for s in plan.stages] == ["n0", "n2"]
    assert "activations may not enter region us, only eu" in next(r.text for r in plan.reasons if r.node == "n1")
    assert isinstance(at_home, Infeasible)
    assert at_home.reason.startswith("block 0 belongs on n0, which may hold none")


def test_a_device_that_must_take_part_does(chain: Chain) -> None:
    problem = chain((1, 1), (1.0, 9.0), (2, 2), {(0, 1): 0.1})

    plan = place(replace(problem, require=(NodeId("n1"),)), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert [s.node for s in plan.stages] == ["n0", "n1"]


@pytest.mark.parametrize(("objective", "nodes"), [(Objective.ENERGY, ["n0", "n2"]), (Objective.PRICE, ["n0", "n1"])])
def test_the_least_joules_and_the_least_money_may_be_elsewhere(
    chain: Chain, objective: Objective, nodes: list[str]
) -> None:
    problem = chain((1, 1), (1.0, 1.0, 1.0), (1, 2, 2), {(0, 1): 0.1, (0, 2): 0.1})
    rates = ((1.0, 1.0), (9.0, 1.0), (1.0, 9.0))
    devices = tuple(
        replace(d, active_watts=watts, price_per_hour=money)
        for d, (watts, money) in zip(problem.devices, rates, strict=True)
    )

    plan = place(replace(problem, devices=devices, objective=objective), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert [s.node for s in plan.stages] == nodes
    assert plan.gap == 0


def test_a_battery_bounds_what_a_device_takes(chain: Chain) -> None:
    problem = chain((1, 1, 1), (2.0, 1.0), (3, 3), {(0, 1): 0.1})
    tired = replace(problem.devices[1], active_watts=1.0, joules_limit=1.5)

    plan = place(replace(problem, devices=(problem.devices[0], tired)), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert [(s.node, s.start, s.stop) for s in plan.stages] == [("n0", 0, 2), ("n1", 2, 3)]


def test_a_battery_that_is_just_empty_after_a_request_is_enough(chain: Chain) -> None:
    """Ten blocks of 0.1 s: added up one by one they take a little less than 1 s, as a difference of sums a little more or less."""
    times = (0.1, 0.07)
    problem = chain((1,) * 14, times, (4, 14), {(0, 1): 0.01})
    for blocks in range(1, 11):
        drawn = shard_joules(problem, replace(problem.devices[1], active_watts=3.0), Span(N1, 14 - blocks, 14))
        tired = replace(problem.devices[1], active_watts=3.0, joules_limit=drawn)
        roomy = replace(problem.devices[0], memory_budget_bytes=14 - blocks)

        plan = place(replace(problem, devices=(roomy, tired)), StepBudget(10**6))

        assert isinstance(plan, Plan), (blocks, plan)
        assert [(s.node, s.start, s.stop) for s in plan.stages] == [("n0", 0, 14 - blocks), ("n1", 14 - blocks, 14)]


@pytest.mark.parametrize("limits", [Limits(), Limits(latency_s=100.0, joules=50.0)], ids=["alone", "within limits"])
def test_the_first_and_the_last_shard_of_a_device_share_its_battery(chain: Chain, limits: Limits) -> None:
    """Each of the source's two blocks takes 1 J, both together more than the battery's 1.5 J."""
    problem = replace(
        chain((1, 1, 1), (1.0, 1.0), (9, 9), {(0, 1): 0.1}, pin_last=True), pins=(Pin(block=1, node=N1),), limits=limits
    )
    tired = [
        replace(
            problem, devices=(replace(problem.devices[0], active_watts=1.0, joules_limit=joules), problem.devices[1])
        )
        for joules in (1.5, 2.0)
    ]

    short, enough = (place(stated, StepBudget(10**6)) for stated in tired)

    assert isinstance(short, Infeasible)
    assert "batteries" in short.reason
    assert isinstance(enough, Plan)
    assert enumerate_best(tired[0]) is None


@pytest.mark.parametrize("late", [False, True], ids=["before its shard", "after it"])
def test_a_device_that_relays_beside_its_shard_holds_what_its_shard_left_room_for(chain: Chain, *, late: bool) -> None:
    problem = replace(chain((1, 1, 1), (1.0, 1.0, 1.0), (9, 7, 9), {(0, 1): 0.1, (1, 2): 0.1}), relay=True)
    devices = tuple(replace(device, fixed_bytes=3) for device in problem.devices)
    before = [Span(N0, 0, 1), Span(N1, 1, 1), Span(N2, 1, 2), Span(N1, 2, 3)]
    after = [Span(N0, 0, 1), Span(N1, 1, 2), Span(N1, 2, 2), Span(N2, 2, 3)]

    assert fits(replace(problem, devices=devices), after if late else before)
