"""Instances that planners are compared on: the same everywhere, well formed, and as tight as they say."""

import msgspec
import pytest
from bench.planner.instances import HELD_OUT, NETWORKS, TUNING, Family, digest, instance, small_families, varied
from bench.planner.suite import Batch, full, quick
from msgspec.structs import replace

from shoal.plan.check import check
from shoal.plan.document import parse_problem
from shoal.plan.problem import Objective, Problem


def family(**changes: object) -> Family:
    return Family(**{"layers": "uneven", "network": "mesh", "devices": 5, "blocks": 32, **changes})  # type: ignore[arg-type]


def test_an_instance_is_the_same_on_every_machine() -> None:
    """Fingerprints of one of each network: figures that were published stay those of these problems."""
    found = {network: digest(instance(family(network=network), 3)) for network in NETWORKS}

    assert found == {
        "star": "902aa79689b813e6",
        "clusters": "655a6716c001a674",
        "mesh": "48cac3ce0d86c631",
        "trace": "441b2b3fe4c24440",
    }


def test_seed_and_family_decide_an_instance() -> None:
    assert instance(family(), 3) == instance(family(), 3)
    assert instance(family(), 3) != instance(family(), 4)
    assert instance(family(network="star"), 3).blocks != instance(family(), 3).blocks


def test_the_objective_changes_nothing_else() -> None:
    latency, tokens = (
        instance(family(objective=objective), 3) for objective in (Objective.LATENCY, Objective.THROUGHPUT)
    )

    assert replace(tokens, objective=Objective.LATENCY) == latency


@pytest.mark.parametrize("batch", [b for b in full() if b.family.devices <= 50], ids=lambda batch: batch.name)
def test_every_family_makes_problems_that_are_well_formed_and_read_back(batch: Batch) -> None:
    seed, of = next(batch.instances())
    problem = instance(of, seed)

    check(problem)
    assert parse_problem(msgspec.json.encode(problem)) == problem


def memory_over_model(problem: Problem) -> float:
    positions = problem.shape.context_tokens * problem.shape.slots
    need = sum(block.weights_bytes + block.kv_bytes_per_token * positions for block in problem.blocks)
    return sum(device.memory_budget_bytes for device in problem.devices) / need


@pytest.mark.parametrize("tightness", [1.2, 2.5, 5.0])
def test_the_fleet_holds_the_model_as_often_as_the_tightness_says(tightness: float) -> None:
    for in_flight in (1, 32):
        problem = instance(family(tightness=tightness, context=4096, in_flight=in_flight, devices=12), 1)

        assert memory_over_model(problem) == pytest.approx(tightness, rel=0.1)


def test_a_cap_on_blocks_makes_large_fleets_use_long_chains() -> None:
    problem = instance(family(layers="uniform", devices=100, blocks=80, tightness=3.0, most_blocks=4), 1)

    largest = max(device.memory_budget_bytes for device in problem.devices)
    assert largest <= 4.001 * (problem.blocks[0].weights_bytes + 4096 * 512)
    assert memory_over_model(problem) == pytest.approx(3.0, rel=0.01)


def test_thirty_seeds_go_through_every_combination_once() -> None:
    combined = {(v.tightness, v.context, v.in_flight) for seed in range(30) for v in [varied(family(), seed)]}

    assert len(combined) == 30


def test_uneven_blocks_spread_by_half_and_even_ones_are_alike() -> None:
    sizes = {block.weights_bytes for block in instance(family(layers="uniform"), 2).blocks}
    uneven = [block.weights_bytes / 405e6 for block in instance(family(), 2).blocks]

    assert len(sizes) == 1
    assert 0.5 <= min(uneven) < 0.75 < 1.25 < max(uneven) <= 1.5


def test_wireless_devices_of_a_site_share_a_channel_and_the_cloud_is_far() -> None:
    problem = instance(family(network="trace", devices=8), 2)

    media = {link.medium for link in problem.links}
    assert media - {""}
    to_cloud = [link for link in problem.links if link.target == problem.devices[-1].node]
    assert all(link.bytes_per_s <= 50e6 / 8 for link in to_cloud)


def test_published_seeds_are_none_that_solvers_are_tuned_on() -> None:
    seeds = {seed for batch in [*full(), *quick()] for seed, _ in batch.instances()}

    assert min(seeds) == HELD_OUT
    assert max(seeds) < TUNING


def test_cells_of_the_benchmark_have_names_of_their_own_and_quick_ones_are_among_them() -> None:
    names = [batch.name for batch in full()]

    assert len(set(names)) == len(names)
    assert {batch.name for batch in quick()} <= set(names)
    assert len(list(small_families())) == 32
