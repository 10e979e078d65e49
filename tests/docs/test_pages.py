"""What pages claim about the code, checked: links, commands and their options, make targets, snippets, rooms, decisions."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer.main

from shoal.cli.main import COMMANDS, app

Pages = dict[Path, str]

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?<![\w./-])shoal ([a-z]+)((?: [^\s`|&#;)]+)*)")


def anchors(text: str) -> set[str]:
    """Ids that headings get: lower case, words joined by hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_internal_link_leads_somewhere(pages: Pages) -> None:
    broken = []
    for path, text in pages.items():
        for target in _LINK.findall(_FENCE.sub("", text)):
            if "://" in target:
                continue
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file).resolve() if file else path
            missing = not there.exists() or (
                anchor and there.suffix == ".md" and anchor not in anchors(there.read_text(encoding="utf-8"))
            )
            if missing:
                broken.append(f"{path.name}: {target}")
    assert broken == []


def test_every_page_can_be_reached_from_the_readme(root: Path, pages: Pages) -> None:
    seen: set[Path] = set()
    pending = [root / "README.md"]
    while pending:
        path = pending.pop()
        if path in seen or path not in pages:
            continue
        seen.add(path)
        files = [t.partition("#")[0] for t in _LINK.findall(pages[path]) if "://" not in t]
        pending += [(path.parent / unquote(file)).resolve() for file in files if file]
    assert {path.name for path in pages.keys() - seen} <= {"template.md"}


def shell_lines(pages: Pages) -> Iterator[tuple[Path, str]]:
    """Lines that a reader would type, and commands inside sentences."""
    for path, text in pages.items():
        if path.parent.name == "reference":
            continue
        yield from (
            (path, line)
            for kind, body in _FENCE.findall(text)
            if kind == "console"
            for line in body.splitlines()
            if line.startswith("$ ")
        )
        yield from ((path, code) for code in re.findall(r"`(shoal [^`]+)`", _FENCE.sub("", text)))


def test_commands_that_pages_show_exist_with_their_options(pages: Pages) -> None:
    group = typer.main.get_command(app)
    wrong, checked = [], 0
    for path, line in shell_lines(pages):
        for name, rest in _COMMAND.findall(line.partition("   #")[0]):
            if name not in COMMANDS:
                wrong.append(f"{path.name}: shoal {name}")
                continue
            context = group.make_context("shoal", [name], resilient_parsing=True)
            _, command, _ = group.resolve_command(context, [name])
            known = {spelling for parameter in command.params for spelling in parameter.opts} | {"--help"}
            used = {word.partition("=")[0] for word in rest.split() if re.match(r"--?[a-z]", word)}
            wrong += [f"{path.name}: shoal {name} {option}" for option in used - known]
            checked += 1
    assert wrong == []
    assert checked > 40


def test_make_targets_that_pages_show_exist(root: Path, pages: Pages) -> None:
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {t for text in pages.values() for t in re.findall(r"(?:`|\$ )make ([a-z]+)", text)}

    assert {"demo", "test"} <= shown <= targets


def test_snippets_can_be_read_by_their_languages(pages: Pages) -> None:
    for path, text in pages.items():
        for language, body in _FENCE.findall(text):
            match language:
                case "python":
                    ast.parse(body, filename=str(path))
                case "json":
                    json.loads(body)
                case _:
                    assert language in {"console", "text"}, f"{path.name}: a block without a known language"


def test_the_readme_shows_what_a_newcomer_types(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")

    for line in ("make demo", "make test", "pip install .", "shoal serve smollm2-135m"):
        assert f"$ {line}" in readme
    assert re.search(r"!\[.{40,}\]\(docs/pictures/\w+\.svg\)", readme), "a picture with words for who cannot see it"


def test_the_architecture_names_every_room_in_the_order_of_the_contract(root: Path) -> None:
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(c["layers"] for c in contracts if c["name"] == "layers")
    table = page[page.index("| room |") : page.index("\n\n", page.index("| room |"))]
    places = {
        name: index
        for index, row in enumerate(table.splitlines()[2:])
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    present = {p.stem for p in (root / "src" / "shoal").iterdir() if p.suffix in {"", ".py"} and "__" not in p.name}

    assert places.keys() == present
    order = [[name for name in re.findall(r"\w+", layer) if name in places] for layer in reversed(layers)]
    ranks = [[places[name] for name in names] for names in order if names]
    assert all(max(lower) <= min(upper) for lower, upper in pairwise(ranks))


def test_files_and_modules_that_pages_tell_to_read_exist(root: Path, pages: Pages) -> None:
    source = root / "src" / "shoal"
    rooms = "|".join(p.name for p in source.iterdir() if p.is_dir())
    absent = []
    for path, text in pages.items():
        absent += [
            f"{path.name}: {f}" for f in re.findall(rf"`((?:{rooms})/\w+\.py)`", text) if not (source / f).exists()
        ]
        if path.parent.name == "adr" or path.name == "architecture.md":
            named = re.findall(rf"`((?:{rooms})(?:\.\w+)+)`", text)
            absent += [f"{path.name}: {m}" for m in named if not m.endswith(".py") and not is_in(source, m)]
    assert absent == []


def is_in(source: Path, dotted: str) -> bool:
    """Whether *dotted* is a package or module below *source*, or a name inside one."""
    parts = dotted.split(".")
    candidates = (source.joinpath(*parts[:count]) for count in range(len(parts), 1, -1))
    return any(path.is_dir() or path.with_suffix(".py").exists() for path in candidates)


def decisions(root: Path) -> dict[int, Path]:
    return {int(p.name[:4]): p for p in (root / "docs" / "adr").glob("[0-9]*.md")}


@pytest.mark.parametrize(
    "heading", ["Context", "Decision", "Consequences", "Alternatives rejected", "In the code today"]
)
def test_every_decision_has_this_section(heading: str, root: Path) -> None:
    assert [p.name for p in decisions(root).values() if f"\n## {heading}\n" not in p.read_text(encoding="utf-8")] == []


def test_every_decision_is_listed_and_says_what_it_costs(root: Path) -> None:
    index = (root / "docs" / "adr" / "README.md").read_text(encoding="utf-8")

    assert sorted(decisions(root)) == list(range(1, len(decisions(root)) + 1))
    for number, path in decisions(root).items():
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix(f"# ADR {number}: ")
        assert f"| {number} | [{title}]({path.name}) |" in index
        assert "\n- Good: " in text
        assert "\n- Bad: " in text


def test_decisions_that_the_code_cites_are_written_down(root: Path) -> None:
    cited: set[int] = set()
    for path in [*(root / "src").rglob("*.py"), root / "pyproject.toml"]:
        text = path.read_text(encoding="utf-8")
        cited |= {
            int(n)
            for group in re.findall(r"ADRs? (\d+(?:(?:, | and )(?:ADR )?\d+)*)", text)
            for n in re.findall(r"\d+", group)
        }

    assert len(cited) > 8
    assert cited <= decisions(root).keys()
