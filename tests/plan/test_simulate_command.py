"""`shoal simulate`: predicted against simulated, and plans that do not belong to the problem."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner

from shoal.cli.plan import solve_file
from shoal.cli.simulate import compare, simulate
from shoal.cli.simulate_table import Compared
from shoal.errors import InvalidRequestError
from shoal.plan.document import answer_json, parse_plan, parse_problem
from shoal.plan.problem import Infeasible, Plan, Problem

SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "problems" / "llama2_7b_three_nodes.json"
WIDE = {"COLUMNS": "200"}


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(simulate)
    return made


@pytest.fixture(scope="module")
def planned() -> tuple[Problem, Plan]:
    answer = solve_file(SAMPLE)
    assert isinstance(answer, Plan)
    return parse_problem(SAMPLE.read_bytes()), answer


def test_a_problem_is_planned_run_and_compared() -> None:
    result = CliRunner().invoke(app(), [str(SAMPLE), "--requests", "4"], env=WIDE)

    assert result.exit_code == 0
    for text in (
        "agx-orin [0, 6) -> ",
        "PREDICTED",
        "1 IN FLIGHT",
        "932 ms",
        "95.7 ms",
        "+0.0%",
        "rtx-3090 to agx-orin",
    ):
        assert text in result.output


def test_a_plan_from_a_file_is_run_as_json_with_jitter(planned: tuple[Problem, Plan], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(answer_json(planned[1]))

    result = CliRunner().invoke(
        app(), [str(SAMPLE), "--plan", str(path), "--requests", "4", "--jitter", "0.3", "--json"]
    )

    compared = msgspec.json.decode(result.output, type=Compared)
    assert compared.predicted == planned[1].estimate
    assert compared.alone.time_per_output_token_s != pytest.approx(compared.predicted.time_per_output_token_s)


def test_a_problem_without_a_plan_ends_as_planning_does(chain: Callable[..., Problem], tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    path.write_bytes(msgspec.json.encode(chain([5, 5], [1], [6], {})))

    text = CliRunner().invoke(app(), [str(path)], env=WIDE)
    as_json = CliRunner().invoke(app(), [str(path), "--json"])

    assert (text.exit_code, as_json.exit_code) == (2, 2)
    assert "No plan:" in text.output
    assert json.loads(as_json.output)["type"] == "infeasible"


def test_a_plan_for_another_question_or_model_is_refused(planned: tuple[Problem, Plan]) -> None:
    problem, plan = planned
    longer = replace(problem, shape=replace(problem.shape, tokens_out=17, slots=2))
    renamed = replace(problem, blocks=(replace(problem.blocks[0], name="patches"), *problem.blocks[1:]))
    fewer = replace(problem, blocks=problem.blocks[:20])

    for other, said in (
        (longer, "tokens_out 96 and 17, slots 1 and 2"),
        (renamed, "the plan calls block 0 embedding, the problem patches"),
        (fewer, r"blocks \[7, 34\), where \[7, \.\.\.\) of 20"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            compare(other, plan, 4, (0.0, 0))


def test_a_plan_of_older_figures_is_run_on_the_new_ones_and_the_reader_is_told(
    planned: tuple[Problem, Plan], tmp_path: Path
) -> None:
    problem, plan = planned
    slower = replace(problem, links=tuple(replace(link, bytes_per_s=link.bytes_per_s / 2) for link in problem.links))
    files = (tmp_path / "problem.json", tmp_path / "plan.json")
    files[0].write_bytes(msgspec.json.encode(slower))
    files[1].write_bytes(answer_json(plan))

    result = CliRunner().invoke(app(), [str(files[0]), "--plan", str(files[1]), "--requests", "4"], env=WIDE)

    assert "made for other figures: it says 95.7 ms per token" in result.output


def test_what_is_no_plan_is_no_plan() -> None:
    refusal = Infeasible(reason="too big", needed_bytes=2, available_bytes=1)

    with pytest.raises(InvalidRequestError, match="this is not a plan"):
        parse_plan(b"{}")
    with pytest.raises(InvalidRequestError, match="there is no plan: too big"):
        parse_plan(answer_json(refusal))
