"""The API's page is generated; it must not fall behind the routes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from litestar import Litestar
from litestar.testing import TestClient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_docs", ROOT / "tools" / "docs" / "api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_routes_say(tool: ModuleType) -> None:
    assert (ROOT / "docs" / "reference" / "api.md").read_text() == tool.page(), "run python tools/docs/api.py"


def test_every_call_and_field_has_a_row(tool: ModuleType) -> None:
    page = tool.page()

    for call in (
        "POST /v1/chat/completions",
        "GET /v1/models/{name}",
        "GET /metrics",
        "DELETE /shoal/v1/deployments/{name}",
    ):
        assert f"| `{call}` |" in page
    for field in (
        "`temperature`",
        "`logit_bias`",
        "`rtt_p50_s`",
        "`time_to_first_token_s`",
        "`sequence`",
        "`finish_reason`",
    ):
        assert f"| {field} |" in page


def test_the_page_in_the_browser_needs_nothing_from_elsewhere(client: TestClient[Litestar]) -> None:
    page = client.get("/schema")

    assert page.status_code == 200
    assert "/v1/chat/completions" in page.text
    assert "src=" not in page.text
    assert "http" not in page.text.replace("HTTP", "")


def test_the_document_for_tools_names_the_same_calls(client: TestClient[Litestar], tool: ModuleType) -> None:
    served = client.get("/schema/openapi.json").json()

    assert served["paths"].keys() == tool.document()["paths"].keys()
