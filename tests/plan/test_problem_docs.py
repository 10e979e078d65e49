"""The reference page of the planner's values is generated; it must not fall behind them."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def generated() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("problem_docs", ROOT / "tools" / "docs" / "problem.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize("name", ["problem.md", "problem.schema.json"])
def test_the_page_is_what_the_values_say(name: str) -> None:
    assert (ROOT / "docs" / "reference" / name).read_text() == generated()[name], "run python tools/docs/problem.py"


def test_every_field_of_a_problem_has_a_row() -> None:
    page = generated()["problem.md"]

    for field in ("`pin_first`", "`tokens_in`", "`latency_s`", "`weights_factor`", "`lower_bound`", "`needed_bytes`"):
        assert f"| {field} |" in page
