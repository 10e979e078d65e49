"""`shoal plan --problem FILE` with a graph of operators: what it accepts, prints and refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from shoal.cli.files import read_problem
from shoal.cli.plan import plan
from shoal.errors import InvalidRequestError, UnsupportedVersionError
from shoal.plan.dag.problem import GraphAnswer, GraphPlan, GraphProblem, OpPin
from shoal.plan.document import parse_either
from shoal.plan.problem import Problem

SAMPLE = Path(__file__).resolve().parents[3] / "examples" / "problems" / "branches_three_tiers.json"
CHAIN = SAMPLE.parent / "llama2_7b_three_nodes.json"
Line = Callable[..., GraphProblem]


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(plan)
    return made


@pytest.fixture
def raw() -> dict[str, Any]:
    return json.loads(SAMPLE.read_bytes())


def changed(raw: dict[str, Any], path: str, value: object) -> bytes:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = raw
    for part in parents:
        at = at[part]
    at[last] = value
    return json.dumps(raw).encode()


def test_a_graph_shows_which_operators_go_to_which_tier() -> None:
    result = CliRunner().invoke(app(), ["--problem", str(SAMPLE)], env={"COLUMNS": "200"})

    assert result.exit_code == 0
    for text in (
        "stem, reduce_a, reduce_b, pool_c, reduce_c",
        "none: passes frames on",
        "narrow_a, narrow_b, narrow_c (100 KB)",
        "predicted  137 ms per request",
        "the best cut between blocks takes 259 ms: this one, through a block, 47.0% less",
        "least latency of all cuts proven optimal (lower bound 137 ms, min-cut)",
        "not possible: operator 0 (stem) stays on camera",
        "camera: runs 5 of 15 operators",
    ):
        assert text in result.output


def test_json_is_the_answer_as_a_value() -> None:
    result = CliRunner().invoke(app(), ["--problem", str(SAMPLE), "--json"])

    answer = msgspec.json.decode(result.output, type=GraphAnswer)
    assert isinstance(answer, GraphPlan)
    assert json.loads(result.output)["type"] == "graph-plan"


def test_a_graph_that_does_not_fit_says_what_is_missing_and_fails(line: Line, tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    problem = line([(1, None, [0]), (1, 0, [1])], [2.0, 1.0], weights=[9_000_000] * 2, memory=[10_000_000, 1])
    path.write_bytes(msgspec.json.encode(problem))

    text = CliRunner().invoke(app(), ["--problem", str(path)], env={"COLUMNS": "200"})
    as_json = CliRunner().invoke(app(), ["--problem", str(path), "--json"])

    assert (text.exit_code, as_json.exit_code) == (2, 2)
    assert "missing: 8 MB (needed 18 MB, there 10 MB)" in text.output
    assert json.loads(as_json.output)["type"] == "infeasible"


@pytest.mark.parametrize(
    "flags", [["--pareto"], ["--max-latency", "2"], ["--regions", "eu"], ["--picture", "a.svg"], ["--slots", "3"]]
)
def test_flags_without_a_meaning_for_graphs_are_refused(flags: list[str]) -> None:
    result = CliRunner().invoke(app(), ["--problem", str(SAMPLE), *flags])

    assert isinstance(result.exception, InvalidRequestError)
    assert "planned for the latency of one request" in result.exception.message


def test_a_graph_written_and_read_again_is_the_same(line: Line) -> None:
    problem = line([(3, None, [0]), (5, 0, [1])], [2.0, 1.0], pins=(OpPin(op=0, node="board"),))

    assert parse_either(msgspec.json.encode(problem)) == problem


def test_a_chain_is_read_as_before() -> None:
    assert isinstance(parse_either(CHAIN.read_bytes()), Problem)


def test_where_a_chain_is_wanted_a_graph_is_named_as_what_it_is() -> None:
    with pytest.raises(InvalidRequestError, match="of kind 'graph', wanted is a chain of blocks"):
        read_problem(SAMPLE)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kind", "tree", "kind is 'tree'; there is 'graph'"),
        ("kind", None, "kind is None; there is 'graph'"),
        ("version", 0, "version is 0"),
        ("colour", "blue", "unknown field colour"),
        ("tensors.2.sizes_bytes", 3, "unknown field tensors.2.sizes_bytes"),
        ("tiers.1.op_s", [0.1], "gateway has 1 times for 15 operators"),
        ("tiers.1.op_s.3", -1, "a time of gateway is -1"),
        ("tiers.1.op_s.3", None, "Expected `float`, got `null`"),
        ("tiers.1.memory_budget_bytes", -1, "a figure of gateway is -1"),
        ("tiers.1.node", "camera", "tier camera is given 2 times"),
        ("tiers", [], "no tiers"),
        ("ops", [], "no operators"),
        ("ops.2.weights_bytes", -5, r"a size of operator 2 \(expand_a\) is -5"),
        ("ops.2.weights_bytes", 10**19, "must be at most 1e"),
        ("tensors.2.size_bytes", -5, "the size of tensor narrow_a is -5"),
        ("tensors.2.producer", 15, "tensor narrow_a names operator 15, there are 0 to 14"),
        ("tensors.2.consumers", [-1], "tensor narrow_a names operator -1"),
        ("tensors.2.consumers", [2, 2], "reader of tensor narrow_a: 2 is given 2 times"),
        ("tensors.2.name", "image", "tensor image is given 2 times"),
        ("tensors.2.producer", 9, r"in a circle: 2 \(expand_a\) <- 9 \(concat\) <- 2 \(expand_a\)"),
        ("tensors.2.producer", 2, r"in a circle: 2 \(expand_a\) <- 2 \(expand_a\)"),
        ("links.0.bytes_per_s", 0, "bytes_per_s of the link from camera to gateway is 0"),
        ("links.0.latency_s", -1, "latency_s of the link from camera to gateway is -1"),
        ("links.0.target", "moon", "names moon, which is no tier here"),
        ("links.0.target", "server", "does not join neighbours: the line is camera - gateway - server"),
        ("links.1", {"source": "camera", "target": "gateway", "latency_s": 0, "bytes_per_s": 1}, "is given 2 times"),
        ("pins", [{"op": 99, "node": "camera"}], "a pin names operator 99"),
        ("pins", [{"op": 3, "node": "moon"}], "operator 3 is pinned to moon, which is no tier here"),
        ("pins", [{"op": 0, "node": "server"}], r"operator 0 \(stem\) belongs on both server and camera"),
        (
            "pins",
            [{"op": 9, "node": "server"}, {"op": 14, "node": "gateway"}],
            r"operator 14 \(classify\) belongs on gateway, yet it needs what operator 9 \(concat\) makes on server",
        ),
        ("shared", [{"size_bytes": 5, "ops": [3, 99]}], "shared weights name operator 99"),
        ("shared", [{"size_bytes": 10**9, "ops": [3, 4]}], "operator 3 has 3000 bytes of weights, 1000000000 of them"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(
    raw: dict[str, Any], path: str, value: object, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_either(changed(raw, path, value))


def test_a_newer_version_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedVersionError, match="version 2, we read up to 1"):
        parse_either(changed(raw, "version", 2))


def test_numbers_that_are_none_are_refused() -> None:
    text = SAMPLE.read_text().replace('"latency_s": 0.003', '"latency_s": NaN', 1)

    with pytest.raises(InvalidRequestError, match="this is not a problem"):
        parse_either(text.encode())


def test_too_many_operators_are_refused_at_once(line: Line) -> None:
    problem = line([(1, None, range(1)), *((1, i, [i + 1]) for i in range(60_000))], [1.0, 1.0])

    with pytest.raises(InvalidRequestError, match="are too many"):
        parse_either(msgspec.json.encode(problem))
