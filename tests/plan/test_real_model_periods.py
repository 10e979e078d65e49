"""The blocks of the real model repeat once trials have timed them: one time for each kind of block."""

from pathlib import Path

import pytest

from shoal.ids import NodeId
from shoal.model.frontier import Block, blocks
from shoal.model.gguf import import_gguf
from shoal.plan.budget import StepBudget
from shoal.plan.build import problem
from shoal.plan.circuit import CIRCUIT
from shoal.plan.cpsat import installed
from shoal.plan.periodic import periodic
from shoal.plan.placement import place
from shoal.plan.problem import Plan, Problem, RequestShape
from shoal.plan.tables import build_tables, cost_passes
from shoal.profile.fleet import BlockTrial, DeviceProfile, FleetProfile, LinkProfile

SHAPE = RequestShape(tokens_in=64, tokens_out=32, context_tokens=512)
MIB = 2**20
LAYERS = 30


@pytest.fixture(scope="module")
def chain(smollm2_gguf: Path) -> tuple[Block, ...]:
    return blocks(import_gguf(smollm2_gguf, name="smollm2").graph)


def measured(chain: tuple[Block, ...], devices: int) -> Problem:
    """Trials of each kind on each device, no two alike, and links that differ each way."""
    nodes = [NodeId(f"n{index:02}") for index in range(devices)]
    profile = FleetProfile(
        profile_epoch=1,
        devices=tuple(_device(node, index, chain) for index, node in enumerate(nodes)),
        links=tuple(
            LinkProfile(
                source=a, target=b, rtt_p50_s=0.0004 + 0.0011 * ((7 * i + 5 * j) % 13), rtt_p99_s=0.1,
                bytes_per_s=1e6 * (1 + (3 * i + 11 * j) % 17),
            )
            for i, a in enumerate(nodes)
            for j, b in enumerate(nodes)
            if i != j
        ),
    )  # fmt: skip
    return problem(chain, profile, SHAPE, nodes[0])


def _device(node: NodeId, index: int, chain: tuple[Block, ...]) -> DeviceProfile:
    slow = 1 + (5 * index) % 7 + 0.013 * index
    work = {block.kind: block.weights_bytes / 4e9 for block in chain}
    return DeviceProfile(
        node=node, fingerprint=str(index), cores=2, threads=2, memory_total_bytes=10**9,
        memory_budget_bytes=(170 + 7 * (index % 5) + 60 * (index == 0)) * MIB, step_overhead_s=0.0004,
        trials=tuple(
            BlockTrial(kind=kind, rows=rows, batch=1, context=context, spread_s=0.0,
                       time_s=slow * (1e-4 + work_s * (1 + 0.3 * rows) + 1e-8 * rows * context) * (1 + 0.001 * place_))
            for kind, work_s in work.items()
            for place_, (rows, context) in enumerate([(1, 0), (1, 500), (16, 0), (64, 0)])
        ),
    )  # fmt: skip


def test_a_measured_problem_of_the_real_model_has_thirty_identical_layers_of_two_blocks(
    chain: tuple[Block, ...],
) -> None:
    """A layer may be cut between attention and feed-forward."""
    form = periodic(list(cost_passes(build_tables(measured(chain, 4)))))

    assert form is not None
    assert form.exact
    assert (form.rhythm.period, form.rhythm.units) == (2, LAYERS)


@pytest.mark.skipif(not installed(), reason="OR-tools is not installed")
def test_twenty_measured_devices_are_proven_by_the_circuit(chain: tuple[Block, ...]) -> None:
    plan = place(measured(chain, 20), StepBudget(10**9))

    assert isinstance(plan, Plan)
    assert (plan.solver, plan.gap) == (CIRCUIT, 0.0)
    assert len(plan.stages) > 1
