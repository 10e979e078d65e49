"""When a deployment moves: what staying costs is added up until it has paid for the move."""

from collections.abc import Callable
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.ids import NodeId
from shoal.plan.problem import Estimate, Objective, Plan, Problem, RequestShape, Stage
from shoal.plan.replan import (
    DRAIN_S,
    LOAD_BYTES_PER_S,
    START_S,
    Candidate,
    Current,
    Keep,
    Move,
    MoveCost,
    Rules,
    Settling,
    alike,
    explain,
    in_vain,
    move_cost,
    settle,
)
from shoal.plan.transition import Actual, Piece, Progress, Transition, pieces_of, transition

Chain = Callable[..., Problem]
EAGER = Rules(band=0.0, dwell_s=0.0, idle_requests=0.0)


def figures(latency_s: float) -> Estimate:
    return Estimate(
        time_to_first_token_s=latency_s / 2, time_per_output_token_s=latency_s / 100, tokens_per_s=100 / latency_s,
        latency_s=latency_s, joules=latency_s * 7, price=latency_s / 50,
    )  # fmt: skip


def plan(latency_s: float, objective: Objective = Objective.LATENCY) -> Plan:
    return Plan(
        stages=(), objective=objective, shape=RequestShape(), estimate=figures(latency_s), lower_bound=0, gap=0,
        solver="test",
    )  # fmt: skip


def look(
    state: Settling, latency_s: float, other_s: float, cost_s: float, now_s: float, rules: Rules, requests: float = 1.0
) -> tuple[Settling, Keep | Move]:
    current = Current(estimate=figures(latency_s), requests=requests)
    return settle(state, current, Candidate(plan=plan(other_s), cost=MoveCost(load_s=cost_s)), now_s, rules)


def moves_at(latency_s: float, other_s: float, cost_s: float, rules: Rules, *, requests: float = 1.0) -> float | None:
    """When a deployment moves that is looked at every second, of four hundred."""
    state = Settling()
    for second in range(400):
        state, verdict = look(state, latency_s, other_s, cost_s, float(second), rules, requests)
        if isinstance(verdict, Move):
            return float(second)
    return None


def test_it_moves_when_requests_have_lost_as_much_as_the_move_costs() -> None:
    assert moves_at(10.0, 5.0, 3.0, EAGER) == 6.0


@pytest.mark.parametrize(("requests", "expected_s"), [(1.0, 6.0), (2.0, 3.0), (0.5, 12.0), (0.0, 300.0)])
def test_the_more_is_asked_the_sooner_it_moves_and_idle_it_moves_in_the_end(requests: float, expected_s: float) -> None:
    rules = Rules(band=0.0, dwell_s=0.0, idle_requests=0.02)

    assert moves_at(10.0, 5.0, 3.0, rules, requests=requests) == pytest.approx(expected_s, abs=1.0)


def test_it_does_not_move_within_the_dwell_time_and_then_at_once() -> None:
    assert moves_at(10.0, 5.0, 3.0, Rules(band=0.0, dwell_s=40.0)) == 40.0


def test_moves_that_come_to_nothing_make_the_next_wait_twice_as_long() -> None:
    rules = Rules(band=0.0, dwell_s=10.0)
    state = in_vain(in_vain(Settling(at_s=0.0, since_s=0.0), 0.0), 0.0)

    assert isinstance(look(state, 10.0, 5.0, 3.0, 39.9, rules)[1], Keep)
    assert isinstance(look(state, 10.0, 5.0, 3.0, 40.0, rules)[1], Move)


def test_a_look_says_what_is_gained_and_what_is_missing_until_it_pays() -> None:
    _, verdict = look(Settling(at_s=0.0, since_s=0.0), 10.0, 5.0, 3.0, 4.0, EAGER)

    assert verdict == Keep(gain=0.5, owed_s=1.0)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (Objective.LATENCY, "100 -> 50 ms per token, move costs 4.1 s, 1.5 s of them without service"),
        (Objective.THROUGHPUT, "10.0 -> 20.0 tokens per second, move costs 4.1 s, 1.5 s of them without service"),
        (Objective.ENERGY, "70 -> 35 J per request, move costs 4.1 s, 1.5 s of them without service"),
        (Objective.PRICE, "0.2 -> 0.1 per request, move costs 4.1 s, 1.5 s of them without service"),
    ],
)
def test_the_reason_names_the_figure_that_the_plan_is_judged_by(objective: Objective, said: str) -> None:
    candidate = Candidate(plan=plan(5.0, objective), cost=MoveCost(load_s=2.6, gap_s=1.5))

    assert explain(figures(10.0), candidate) == said


@given(st.lists(st.floats(-1, 1), min_size=50, max_size=200), st.floats(0.1, 10), st.floats(0.01, 0.3))
def test_noise_within_the_band_never_moves_anything(noise: list[float], cost_s: float, band: float) -> None:
    state, rules = Settling(), Rules(band=band, dwell_s=0.0)
    for second, part in enumerate(noise):
        other_s = 10.0 * (1 - 0.999 * part * band)
        state, verdict = look(state, 10.0, other_s, cost_s, float(second), rules, 100.0)
        assert isinstance(verdict, Keep)


def test_what_counted_as_equal_is_not_held_against_the_current_plan_later() -> None:
    state, rules = Settling(), Rules(band=0.1, dwell_s=0.0)
    for second in range(300):
        state, _ = look(state, 10.0, 9.1, 3.0, float(second), rules)

    assert isinstance(look(state, 10.0, 8.9, 3.0, 300.0, rules)[1], Keep)


@given(st.floats(0.11, 0.9), st.floats(0.1, 10), st.floats(0.3, 5), st.floats(0, 100))
def test_a_gain_that_stays_moves_it_in_the_end(gain: float, cost_s: float, requests: float, dwell_s: float) -> None:
    rules = Rules(dwell_s=dwell_s)
    at_s = moves_at(10.0, 10.0 * (1 - gain), cost_s, rules, requests=requests)

    paid_s = cost_s / (gain * requests)
    assert at_s is not None
    assert at_s <= max(paid_s, dwell_s) + 1.001


@given(st.lists(st.floats(0, 0.9), min_size=1, max_size=150), st.floats(0.5, 20), st.floats(0, 0.2))
def test_one_move_costs_at_most_twice_what_one_who_knew_the_future_had_paid(
    gains: list[float], cost_s: float, band: float
) -> None:
    """What is lost to the candidate, second by second: to move once, at some time, or never."""
    rules, state, paid_s = Rules(band=band, dwell_s=0.0), Settling(at_s=0.0, since_s=0.0), 0.0
    for second, gain in enumerate(gains):
        paid_s += gain
        state, verdict = look(state, 10.0, 10.0 * (1 - gain), cost_s, second + 1.0, rules)
        if isinstance(verdict, Move):
            paid_s += cost_s
            break

    best_s = min(sum(gains), cost_s)
    hysteresis_s = band * len(gains) + max(gains)
    assert paid_s <= 2 * best_s + hysteresis_s + 1e-6


def online_s(lost_s: list[tuple[float, float]], cost_s: float, rules: Rules) -> tuple[float, int]:
    """Of two plans each second's loss; what is paid in all, and how often it moved."""
    here, paid_s, moves, state = 0, 0.0, 0, Settling(at_s=0.0, since_s=0.0)
    for second, pair in enumerate(lost_s):
        paid_s += pair[here]
        value = 10.0
        other_s = value * (1 - (pair[here] - pair[1 - here]))
        state, verdict = look(state, value, other_s, cost_s, second + 1.0, rules)
        if isinstance(verdict, Move):
            here, paid_s, moves = 1 - here, paid_s + cost_s, moves + 1
    return paid_s, moves


def offline_s(lost_s: list[tuple[float, float]], cost_s: float) -> float:
    """The least that anybody could have paid, beginning at the first."""
    a, b = 0.0, cost_s
    for first, second in lost_s:
        a, b = a + first, b + second
        a, b = min(a, b + cost_s), min(b, a + cost_s)
    return min(a, b)


losses = st.lists(st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)), min_size=1, max_size=150)


@given(losses, st.floats(0.5, 20))
def test_to_and_fro_costs_at_most_three_times_the_optimum(lost_s: list[tuple[float, float]], cost_s: float) -> None:
    paid_s, moves = online_s(lost_s, cost_s, EAGER)

    overshoot_s = (moves + 1) * 0.9
    assert paid_s <= 3 * offline_s(lost_s, cost_s) + cost_s + overshoot_s + 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_on_random_weather_it_pays_at_most_twice_the_optimum_and_the_hysteresis(seed: int) -> None:
    """Each plan is good or bad for a while, of random length, with noise on top."""
    dice, rules, cost_s = Random(seed), Rules(dwell_s=10.0), 5.0
    lost_s: list[tuple[float, float]] = []
    while len(lost_s) < 5_000:
        bad = (dice.uniform(0, 0.5), dice.uniform(0, 0.5))
        lost_s += [
            (bad[0] + dice.uniform(0, 0.05), bad[1] + dice.uniform(0, 0.05))
            for _ in range(int(dice.expovariate(1 / 60)) + 1)
        ]

    paid_s, moves = online_s(lost_s, cost_s, rules)

    hysteresis_s = rules.band * len(lost_s) + moves * rules.dwell_s * 0.55
    assert paid_s <= 2 * offline_s(lost_s, cost_s) + hysteresis_s
    assert moves <= len(lost_s) / rules.dwell_s


def test_what_nobody_looked_at_is_not_regretted() -> None:
    """Another node coordinated, or nothing served: ten minutes of which nobody knows what requests lost."""
    state, _ = look(Settling(), 1.0, 0.5, 60.0, 0.0, EAGER)

    state, verdict = look(state, 1.0, 0.5, 60.0, 600.0, EAGER)

    assert isinstance(verdict, Keep)
    assert state.regret_s == pytest.approx(0.5 * EAGER.unseen_s)


class Weather(RuleBasedStateMachine):
    """A deployment over hours: its plan slows down, recovers, and is looked at, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.rules = Rules()
        self.state = Settling()
        self.now_s = 0.0
        self.latencies_s = [10.0, 10.0]
        self.here = 0
        self.moved_s: list[float] = []
        self.lost_s = 0.0

    @rule(which=st.integers(0, 1), factor=st.sampled_from((0.95, 1.0, 1.05, 2.0, 4.0)))
    def changes(self, which: int, factor: float) -> None:
        self.latencies_s[which] = 10.0 * factor

    @rule(times=st.integers(1, 30), every_s=st.floats(0.1, 5), requests=st.floats(0, 3))
    def is_looked_at(self, times: int, every_s: float, requests: float) -> None:
        for _ in range(times):
            self.now_s += every_s
            mine, other = self.latencies_s[self.here], self.latencies_s[1 - self.here]
            asked = max(requests, self.rules.idle_requests)
            self.lost_s += every_s * asked * max(0.0, (mine - other) / mine)
            self.state, verdict = look(self.state, mine, other, 3.0, self.now_s, self.rules, requests)
            if isinstance(verdict, Move):
                assert other < mine * (1 - self.rules.band), "to something clearly better"
                assert self.lost_s >= 3.0 - 1e-6, "paid for before"
                self.here, self.lost_s = 1 - self.here, 0.0
                self.moved_s.append(self.now_s)

    @precondition(lambda self: len(self.moved_s) > 1)
    @invariant()
    def rests_between_moves(self) -> None:
        assert self.moved_s[-1] - self.moved_s[-2] >= self.rules.dwell_s

    @invariant()
    def regret_is_never_negative(self) -> None:
        assert self.state.regret_s >= 0


TestWeather = Weather.TestCase


def test_only_what_is_missing_on_disk_is_carried_over_the_links_and_the_slowest_load_counts(chain: Chain) -> None:
    problem = chain([100, 200, 300], [1, 1, 1], [1000] * 3, {(0, 1): 0.0, (0, 2): 0.0})
    links = tuple(msgspec.structs.replace(link, bytes_per_s=10.0) for link in problem.links)
    problem = msgspec.structs.replace(problem, links=links)
    n0, n1, n2 = (d.node for d in problem.devices)
    change = towards(problem, (n0, 0, 1), (n1, 1, 2), (n2, 2, 3))

    cost = move_cost(problem, change, {n1: {1}})

    assert (cost.fetch_bytes, cost.fetch_s) == (300, 30.0)
    assert cost.load_s == START_S + 300 / LOAD_BYTES_PER_S
    assert (cost.gap_s, cost.rebuild_s) == (0.0, 0.0)
    assert cost.total_s == cost.fetch_s + cost.load_s


def test_a_gap_costs_the_drain_and_the_loads_in_it_and_a_cache_its_prompt(chain: Chain) -> None:
    problem = chain([100, 200], [1, 1], [150, 1000], {(0, 1): 0.0})
    n0, n1 = (d.node for d in problem.devices)
    change = towards(problem, (n0, 0, 1), (n1, 1, 2), old=((n0, 0, 1), (n1, 1, 2)))

    cost = move_cost(problem, change, {n1: {0, 1}}, answer_s=4.0, rebuilt_tokens=7)

    assert cost.gap_s == pytest.approx(2.0 + DRAIN_S + START_S + 100 / LOAD_BYTES_PER_S)
    assert cost.rebuild_s == 7 * (100 + 200), "a token through all of it, as in a prompt"


def towards(
    problem: Problem, *new: tuple[NodeId, int, int], old: tuple[tuple[NodeId, int, int], ...] = ()
) -> Transition:
    memory = {d.node: d.memory_budget_bytes for d in problem.devices}
    there = tuple((piece, Progress.LINKED) for piece in pieces(problem, 1, old))
    found = transition(Actual(pieces=there, memory_bytes=memory, serving=1 if old else 0), pieces(problem, 2, new))
    assert isinstance(found, Transition)
    return found


def pieces(problem: Problem, epoch: int, spans: tuple[tuple[NodeId, int, int], ...]) -> tuple[Piece, ...]:
    return tuple(
        Piece(
            plan_epoch=epoch,
            stage=i,
            node=node,
            start=start,
            stop=stop,
            memory_bytes=sum(b.weights_bytes for b in problem.blocks[start:stop]),
        )
        for i, (node, start, stop) in enumerate(spans)
    )


def test_pieces_of_a_plan_are_its_stages() -> None:
    stage = Stage(
        node=NodeId("a"), start=0, stop=3, weights_bytes=1, kv_bytes=1, memory_bytes=9, prefill_s=1, decode_s=1,
        send_prefill_s=0, send_decode_s=0,
    )  # fmt: skip
    piece = Piece(plan_epoch=4, stage=0, node=NodeId("a"), start=0, stop=3, memory_bytes=9)

    assert pieces_of(msgspec.structs.replace(plan(1.0), stages=(stage,)), 4) == (piece,)


def test_problems_are_alike_while_paces_and_links_stay_within_a_share(chain: Chain) -> None:
    problem = chain([1, 1], [1, 2], [9, 9], {(0, 1): 0.1})

    def slower(share: float) -> Problem:
        times = tuple(t * (1 + share) for t in problem.devices[1].decode_s)
        return msgspec.structs.replace(
            problem, devices=(problem.devices[0], msgspec.structs.replace(problem.devices[1], decode_s=times))
        )

    def farther(share: float) -> Problem:
        far = msgspec.structs.replace(problem.links[0], latency_s=0.1 * (1 + share))
        return msgspec.structs.replace(problem, links=(far, *problem.links[1:]))

    assert alike(problem, slower(0.04))
    assert alike(problem, farther(0.04))
    assert not alike(problem, slower(0.08))
    assert not alike(problem, farther(-0.08))
    assert not alike(problem, msgspec.structs.replace(problem, exclude=(problem.devices[1].node,)))
    assert not alike(problem, msgspec.structs.replace(problem, devices=problem.devices[:1]))
