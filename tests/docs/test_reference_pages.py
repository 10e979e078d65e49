"""Reference pages come from the code and must not fall behind it; what exists must be written about."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from shoal.cli.main import COMMANDS
from shoal.errors import ShoalError
from shoal.fleet.reconcile import Phase
from shoal.fleet.state import Standing
from shoal.node.settings import Settings

Load = Callable[[str], ModuleType]


def guides(pages: dict[Path, str]) -> str:
    return "\n".join(text for path, text in pages.items() if path.parent.name == "guides")


@pytest.mark.parametrize("name", ["cli", "settings", "errors", "metrics"])
def test_the_page_is_what_the_code_says(name: str, generator: Load) -> None:
    tool = generator(name)

    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), f"run python tools/docs/{name}.py (or make docs)"


def test_every_generated_page_names_its_generator(root: Path) -> None:
    for page in (root / "docs" / "reference").glob("*.md"):
        assert f"`tools/docs/{page.stem}.py`" in page.read_text(encoding="utf-8")


def test_every_command_has_a_section_and_a_place_in_a_guide(root: Path, pages: dict[Path, str]) -> None:
    reference = (root / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")

    assert [c for c in COMMANDS if f"## shoal {c}\n" not in reference] == []
    assert [c for c in COMMANDS if f"shoal {c}" not in guides(pages)] == []


def test_every_setting_and_variable_is_explained(root: Path, pages: dict[Path, str]) -> None:
    reference = (root / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    settings = [f"SHOAL_{field.upper()}" for field in Settings.__struct_fields__]

    assert [s for s in settings if f"`{s}`" not in reference or s not in guides(pages)] == []
    assert [v for v in variables_read(root) if f"`{v}`" not in reference] == []


def test_every_error_of_the_tree_has_a_row(root: Path) -> None:
    reference = (root / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")

    for kind in subclasses(ShoalError):
        assert f"`{kind.__name__}` | `{kind.code}`" in reference


def test_every_metric_has_a_row(root: Path, generator: Load) -> None:
    reference = (root / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    names = [family.name for family in generator("metrics").families()]

    assert len(names) >= 10
    assert [name for name in names if f"`{name}" not in reference] == []


def test_every_route_is_in_the_reference_and_every_public_one_in_a_guide(
    generator: Load, root: Path, pages: dict[Path, str]
) -> None:
    reference = (root / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    routes = generator("api").document()["paths"]
    public = [route for route in routes if not route.startswith("/shoal/")]

    assert [r for r in routes if f"{r}`" not in reference] == []
    assert [r for r in public if f"{r}`" not in guides(pages)] == []


def test_every_event_is_explained(root: Path) -> None:
    page = (root / "docs" / "guides" / "operating.md").read_text(encoding="utf-8")
    kinds = set(events_noted(root))

    assert {"plan.made", "node.", "deployment."} <= kinds
    expected = {k for k in kinds if not k.endswith(".")}
    expected |= {f"node.{s.value}" for s in Standing} | {f"deployment.{p.value}" for p in Phase}
    assert [kind for kind in sorted(expected) if f"`{kind}`" not in page] == []


def test_every_field_of_the_settings_page_is_a_setting(generator: Load) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `SHOAL_", generator("settings").page(), re.MULTILINE)

    assert set(rows) == {f.name for f in msgspec.structs.fields(Settings)} - {"home"}


def variables_read(root: Path) -> set[str]:
    """Environment variables of ours that the sources look up by name."""
    found: set[str] = set()
    for path in (root / "src").rglob("*.py"):
        found |= set(re.findall(r"environ(?:\.get\(|\[)\"(SHOAL_\w+)\"", path.read_text(encoding="utf-8")))
    return found


def events_noted(root: Path) -> Iterator[str]:
    """First arguments of `note(...)`: whole kinds, or the fixed beginning of one that is put together."""
    for path in (root / "src" / "shoal" / "node").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("note") and node.args):
                continue
            match node.args[0]:
                case ast.Constant(value=str(kind)):
                    yield kind
                case ast.JoinedStr(values=[ast.Constant(value=str(beginning)), *_]):
                    yield beginning


def subclasses(kind: type[ShoalError]) -> Iterator[type[ShoalError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == "shoal.errors":
            yield from subclasses(child)
