"""`docs/benchmarks.md` from the results: every goal with what was measured, met or missed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from bench.measure import RESULTS, ROOT, Finding, load_cells

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "pictures"
NOTES = ROOT / "bench" / "notes.md"
_HEAD = """# Benchmarks

Written by `python -m bench` from `bench/results/*.json`; do not edit (remarks belong into `bench/notes.md`). What each
benchmark does, and how to run it: `bench/README.md`. Peers run in the same session, in turn with Shoal; tests never assert on time.
"""


def write_page(claims: Sequence[ModuleType]) -> None:
    """Every claim in order; one without results says so."""
    parts = [_HEAD, _machine(claims), *(f"## {claim.TITLE}\n\n{_claim(claim)}" for claim in claims)]
    if NOTES.exists():
        parts.append(NOTES.read_text().strip() + "\n")
    PAGE.write_text("\n".join(parts))


def table(findings: Iterable[Finding]) -> str:
    rows = ["| what | goal | measured | |", "|---|---|---|---|"]
    rows += [f"| {f.what} | {f.goal} | {f.measured} | {_verdict(f)} |" for f in findings]
    return "\n".join(rows) + "\n"


def _verdict(finding: Finding) -> str:
    match finding.met:
        case None:
            return "not judged"
        case True:
            return "met"
        case False:
            return "**MISSED**"


def _claim(claim: ModuleType) -> str:
    cells = load_cells(claim.NAME)
    found = claim.findings(cells)
    if not found:
        return f"Not measured yet: `python -m bench {claim.NAME}`.\n"
    more = "".join(f"{part}\n" for part in (_pictures(claim, cells), _details(claim, cells)) if part)
    return table(found) + "\n" + more + "".join(f"- {_when(name, cell)}\n" for name, cell in cells.items())


def _pictures(claim: ModuleType, cells: Mapping[str, Any]) -> str:
    """Draw what a claim wants to show (`draw`: SVG by file name), and show it."""
    drawn: Mapping[str, str] = claim.draw(cells) if hasattr(claim, "draw") else {}
    for name, text in drawn.items():
        (PICTURES / name).write_text(text)
    return "".join(f"![{claim.TITLE}]({PICTURES.name}/{name})\n" for name in drawn)


def _details(claim: ModuleType, cells: Mapping[str, Any]) -> str:
    """What a claim tells beside its findings (`details`: Markdown)."""
    return str(claim.details(cells)) if hasattr(claim, "details") else ""


def _when(name: str, cell: Mapping[str, Any]) -> str:
    quick = " **quick run: too few repetitions to judge by**;" if cell["quick"] else ""
    skipped = f" skipped: {cell['skipped']};" if "skipped" in cell else ""
    load = f"load average {cell['load_before']} before, {cell['load_after']} after"
    return (
        f"cell `{name}`:{quick}{skipped} {cell['at']} UTC, commit {cell['revision']}, {load}, took {cell['took_s']} s"
    )


def _machine(claims: Sequence[ModuleType]) -> str:
    for claim in claims:
        path = RESULTS / f"{claim.NAME}.json"
        if path.exists():
            facts = json.loads(path.read_text())["machine"]
            packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
            return (
                f"Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}; "
                f"Python {facts['python']}, {packages}.\n"
            )
    return ""
