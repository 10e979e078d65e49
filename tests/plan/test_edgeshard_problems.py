"""EdgeShard's testbed as files: what the program writes, and problems that can be solved."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from shoal.plan.budget import StepBudget
from shoal.plan.document import parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import Plan
from shoal.plan.simulate import simulate
from shoal.plan.simulated import Load

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("7b", "13b", "70b")


@pytest.fixture(scope="module")
def testbed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("testbed", ROOT / "bench" / "edgeshard" / "testbed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_file_is_what_its_program_writes(index: int, testbed: ModuleType) -> None:
    model = testbed.MODELS[index]
    written = testbed.path(model).read_text()

    assert written == testbed.document(testbed.problem_of(model)), "run python -m bench.edgeshard.testbed"
    assert parse_problem(written.encode()) == testbed.problem_of(model)


@pytest.mark.parametrize(("name", "printed_ms"), [("7b", 75.88), ("13b", 173.43), ("70b", 3086.43)])
def test_a_plan_is_found_that_simulates_to_no_more_than_the_paper_prints(name: str, printed_ms: float) -> None:
    problem = parse_problem((ROOT / "examples" / "problems" / f"edgeshard_{name}.json").read_bytes())

    answer = place(problem, StepBudget(10**6))

    assert isinstance(answer, Plan)
    token_s = simulate(problem, answer.stages, Load(streams=1, requests=1)).time_per_output_token_s
    assert token_s is not None
    assert 0.8 * printed_ms < token_s * 1000 <= printed_ms


def test_the_source_reaches_the_cloud_slowly_and_all_others_at_about_50_mbit_s(testbed: ModuleType) -> None:
    problem = testbed.problem_of(testbed.MODELS[0])
    pair = {testbed.SOURCE, testbed.CLOUD}
    rates = {(link.source, link.target): link.bytes_per_s * 8e-6 for link in problem.links}

    assert len(rates) == 15 * 14
    assert {rate for ends, rate in rates.items() if set(ends) == pair} == {1.0}
    others = [rate for ends, rate in rates.items() if set(ends) != pair]
    assert 40 <= min(others) < 42 < 58 < max(others) <= 60
    assert all(rates[a, b] == rates[b, a] for a, b in rates)
