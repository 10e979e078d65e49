"""Problem files: strict at the door."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.errors import InvalidRequestError, UnsupportedVersionError
from shoal.plan.budget import StepBudget
from shoal.plan.document import answer_json, parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Plan, Problem

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "problems"
GRAPHS = {"branches_three_tiers"}
"""Of another kind: tests/plan/dag/test_graph_command.py."""


@pytest.fixture
def raw(chain: Callable[..., Problem]) -> dict[str, Any]:
    """A well-formed problem as plain JSON values."""
    problem = chain([1] * 3, [1, 2], [9, 9], {(0, 1): 0.1})
    return json.loads(msgspec.json.encode(problem))


@pytest.mark.parametrize(
    "path", sorted(path for path in EXAMPLES.glob("*.json") if path.stem not in GRAPHS), ids=lambda path: path.stem
)
def test_each_example_has_a_plan_that_reads_back(path: Path) -> None:
    answer = place(parse_problem(path.read_bytes()), StepBudget(10**9))

    assert isinstance(answer, Plan)
    assert msgspec.json.decode(answer_json(answer), type=Answer) == answer


def test_the_testbed_reaches_its_server_through_the_board_with_the_better_link() -> None:
    answer = place(parse_problem((EXAMPLES / "llama2_7b_three_nodes.json").read_bytes()), StepBudget(10**9))

    assert isinstance(answer, Plan)
    assert [stage.node for stage in answer.stages] == ["agx-orin", "orin-nx", "rtx-3090"]
    alone = next(a for a in answer.alternatives if a.node == "agx-orin")
    assert alone.estimate is not None
    assert answer.estimate.time_per_output_token_s < 0.7 * alone.estimate.time_per_output_token_s


def broken(raw: dict[str, Any], path: str, value: object) -> bytes:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place_at: Any = raw
    for part in parents:
        place_at = place_at[part]
    place_at[last] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "blue", "unknown field colour"),
        ("blocks.1.wieghts_bytes", 3, "unknown field blocks.1.wieghts_bytes"),
        ("shape.in_flight", 9, "9 micro-batches of 1 in flight need 9 slots"),
        ("shape.tokens_out", 0, "shape.tokens_out is 0"),
        ("shape.context_tokens", 1, "do not fit in a context of 1"),
        (
            "shape",
            {"tokens_in": 1, "tokens_out": 1, "context_tokens": 8, "cache_tokens": 4},
            "a cache of 4 tokens does not hold one context of 8",
        ),
        ("shape.cache_tokens", -1, "shape.cache_tokens is -1"),
        ("blocks.0.weights_bytes", -1, "a size of block 0 .block 0. is -1"),
        ("blocks.0.weights_bytes", "many", "Expected `int`, got `str`"),
        ("blocks", [], "no blocks"),
        ("devices", [], "no devices"),
        ("devices.0.decode_s.1", -0.5, "a time in decode_s of n0 is -0.5"),
        ("devices.0.decode_s.1", float("nan"), "not a problem"),
        ("devices.0.decode_s.1", None, "Expected `float`, got `null`"),
        ("devices.0.prefill_s", [1.0], "n0 has 1 times in prefill_s for 3 blocks"),
        ("devices.1.node", "n0", "device n0 is given 2 times"),
        ("links.0.bytes_per_s", 0, "bytes_per_s of the link from n0 to n1 is 0"),
        ("links.0.latency_s", -1, "latency_s of the link from n0 to n1 is -1"),
        ("links.0.target", "n0", "the link from n0 to n0 leads nowhere"),
        ("pins", [{"block": 7, "node": "n0"}], "block 7 is pinned, the model has blocks 0 to 2"),
        ("pins", [{"block": 0, "node": "n1"}], "block 0 stays on the source n0"),
        ("pins", [{"block": 1, "node": "n0"}, {"block": 1, "node": "n1"}], "block 1 is pinned to both"),
        ("pins", [{"block": 1, "node": "n9"}], "block 1 belongs on n9, which is no device here"),
        ("source", "n9", "block 0 belongs on n9, which is no device here"),
        ("exclude", ["n0"], "block 0 belongs on n0, which is excluded"),
        ("max_stages", -1, "max_stages is -1"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused_with_the_place(
    raw: dict[str, Any], path: str, value: object, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_problem(broken(raw, path, value))


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"7", b'{"blocks": 1}', b"\xff\xfe"])
def test_garbage_is_refused_with_a_hint(document: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"docs/reference/problem\.md"):
        parse_problem(document)


def test_a_problem_of_a_newer_version_is_refused_as_such(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedVersionError, match="version 3"):
        parse_problem(broken(raw, "version", 3))
