"""`shoal plan --replicas`, `--cloud`, and what flags leave open to a plan for throughput."""

import json
from pathlib import Path

import msgspec
import pytest
import typer
from msgspec.structs import replace
from tests.plan.test_plan_command import SAMPLE, shown
from tests.plan.test_replicas import alike
from typer.testing import CliRunner

from shoal.cli.plan import parse_replicas, plan
from shoal.cli.plan_flags import BATCHES, MOST_SLOTS, AskFlags
from shoal.cli.plan_table import render_plan
from shoal.cli.replicas_table import render_replicas
from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.cloud import cloud_alternative
from shoal.plan.document import parse_cloud, parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import (
    Choose,
    Cloud,
    Limits,
    Objective,
    Plan,
    Problem,
    RequestShape,
    Residency,
)
from shoal.plan.replicas import Replicas, replicate

CLOUD = Cloud(
    name="cloud.example",
    time_to_first_token_s=0.8,
    time_per_output_token_s=0.022,
    round_trip_s=0.1,
    price_per_request=0.001,
    price_per_1k_tokens_in=0.01,
    price_per_1k_tokens_out=0.03,
    region="us",
)


def run(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"}, catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "problem.json"
    written.write_bytes(msgspec.json.encode(alike(4)))
    return written


def placed(problem: Problem) -> Plan:
    answer = place(problem, StepBudget(10**9))
    assert isinstance(answer, Plan)
    return answer


def test_replicas_are_a_table_of_pipelines_with_weights_and_a_certificate(path: Path) -> None:
    code, output = run("--problem", str(path), "--replicas", "auto")

    assert code == 0
    assert output.count("50.0%") == 2
    for text in ("together", "the best single pipeline gives 2.4", "certificate", "n1: serves pipeline"):
        assert text in output


def test_replicas_as_json_are_the_value_itself(path: Path) -> None:
    code, output = run("--problem", str(path), "--replicas", "1", "--json")

    assert code == 0
    assert json.loads(output)["type"] == "replicas"
    assert len(msgspec.json.decode(output, type=Replicas).pipelines) == 1


def test_a_fleet_too_small_for_one_pipeline_ends_like_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    path.write_bytes(msgspec.json.encode(alike(1)))

    assert run("--problem", str(path), "--replicas", "auto")[0] == 2


def test_names_of_nodes_are_shown_in_place_of_their_ids() -> None:
    answer = replicate(alike(2), 0, StepBudget(10**9))
    assert isinstance(answer, Replicas)

    text = shown(render_replicas(answer, {NodeId("n0"): "attic", NodeId("a"): "desk"}))

    assert "attic: serves pipeline 1" in text
    assert "in flight through desk" in text or "in flight through attic" in text


@pytest.mark.parametrize("text", ["0", "-1", "many", "17", "", "²"])
def test_a_number_of_pipelines_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no number of pipelines"):
        parse_replicas(text)


def test_fronts_weigh_single_pipelines() -> None:
    with pytest.raises(InvalidRequestError, match="weighs single pipelines"):
        run("--problem", str(SAMPLE), "--replicas", "2", "--pareto")


def test_for_throughput_what_nobody_says_is_chosen() -> None:
    ask = AskFlags(objective=Objective.THROUGHPUT)

    assert ask.choose() == Choose(batch=BATCHES, in_flight=MOST_SLOTS, slots=MOST_SLOTS)
    assert AskFlags(objective=Objective.THROUGHPUT, slots=4).choose() == Choose(batch=BATCHES, in_flight=MOST_SLOTS)
    assert AskFlags(objective=Objective.THROUGHPUT, batch=2, in_flight=3).choose() == Choose()
    assert AskFlags(objective=Objective.THROUGHPUT, batch=2).choose().batch == (2,)


def test_for_latency_nothing_is_chosen_and_what_is_said_holds() -> None:
    assert AskFlags().choose() == Choose()
    assert (AskFlags().shape().slots, AskFlags(batch=2, in_flight=3).shape().slots) == (2, 6)
    assert AskFlags(slots=1).shape() == RequestShape(slots=1)


def test_the_table_says_what_was_chosen_and_what_else_there_was() -> None:
    problem = alike(2, choose=Choose(batch=(1, 2), in_flight=4, slots=8))

    text = shown(render_plan(placed(problem)))

    assert "chosen of sequences x in flight: " in text
    assert "sequences each" in text or "x 3 gives" in text


def test_a_cloud_costs_what_its_tokens_and_the_request_cost_and_waits_for_one_round_trip() -> None:
    shape = RequestShape(tokens_in=100, tokens_out=101, context_tokens=0)

    found = cloud_alternative(alike(2, shape=shape, cloud=CLOUD))

    assert found is not None
    assert found.estimate.time_to_first_token_s == pytest.approx(0.9)
    assert found.estimate.latency_s == pytest.approx(0.9 + 100 * 0.022)
    assert found.estimate.price == pytest.approx(0.001 + 0.1 * 0.01 + 0.101 * 0.03)
    assert found.refused == ""


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"residency": Residency(regions=("eu",))}, "residency: activations may not enter region us, only eu"),
        (
            {"residency": Residency(trusts=("ours",))},
            "residency: activations may not enter a device that names no trust",
        ),
        ({"pin_last": True}, "every answer, stays on the source"),
        ({"limits": Limits(time_to_first_token_s=0.5)}, "beyond the limit of time_to_first_token_s"),
    ],
)
def test_a_cloud_that_rules_keep_out_is_shown_with_the_reason(changes: dict[str, object], refused: str) -> None:
    found = cloud_alternative(alike(2, cloud=CLOUD, **changes))

    assert found is not None
    assert refused in found.refused


def test_a_plan_carries_the_cloud_beside_it_and_says_so() -> None:
    problem = replace(parse_problem(SAMPLE.read_bytes()), cloud=CLOUD)

    answer = placed(problem)

    assert answer.cloud == cloud_alternative(problem)
    assert "cloud cloud.example  900 ms to first token, then 22 ms per token;" in shown(render_plan(answer))
    assert placed(replace(problem, cloud=None)).cloud is None


def test_an_endpoint_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cloud.json"
    path.write_bytes(msgspec.json.encode(CLOUD))

    code, output = run("--problem", str(SAMPLE), "--cloud", str(path), "--regions", "")

    assert code == 0
    assert "declared, not measured); allowed" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_to_first_token_s": -1}, "cloud.time_to_first_token_s is -1"),
        ({"speed": 1}, "unknown field cloud.speed"),
        ({"name": 3}, "this is not a cloud endpoint"),
    ],
)
def test_an_endpoint_with_a_mistake_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_cloud(json.dumps({**msgspec.to_builtins(CLOUD), **changes}).encode())
