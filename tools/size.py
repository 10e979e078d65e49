"""Print how large the source is: lines per room, the longest files and functions."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def functions(tree: ast.AST) -> list[tuple[int, str]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [((n.end_lineno or n.lineno) - n.lineno + 1, n.name) for n in ast.walk(tree) if isinstance(n, kinds)]


def row(folder: Path) -> tuple[int, list[tuple[int, str]], list[tuple[int, str]]]:
    files, found = [], []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        files.append((text.count("\n"), str(path.relative_to(ROOT))))
        found += [(n, f"{path.relative_to(ROOT)} {name}") for n, name in functions(ast.parse(text))]
    return sum(n for n, _ in files), files, found


def main() -> None:
    source = ROOT / "src" / "shoal"
    print(f"{'room':12} {'lines':>6} {'files':>5} {'longest file':>13} {'function p50':>13} {'p90':>4} {'max':>4}")
    everything: list[tuple[int, str]] = []
    for folder in [*sorted(p for p in source.iterdir() if p.is_dir() and p.name != "__pycache__"), ROOT / "tests"]:
        lines, files, found = row(folder)
        everything += found if folder.name != "tests" else []
        sizes = sorted(n for n, _ in found) or [0]
        p90 = sizes[int(0.9 * (len(sizes) - 1))]
        longest, _ = max(files, default=(0, ""))
        middle = statistics.median(sizes)
        print(f"{folder.name:12} {lines:6} {len(files):5} {longest:13} {middle:13.0f} {p90:4} {sizes[-1]:4}")
    print("longest functions:", *(f"  {n:4} {name}" for n, name in sorted(everything)[-8:][::-1]), sep="\n")


if __name__ == "__main__":
    main()
