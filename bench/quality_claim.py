"""The program in `bench/quality`, run as a cell: its JSON is the cell's values."""

import json
import subprocess
import sys
from collections.abc import Mapping

from bench.measure import ROOT, SCRATCH, Cell, Finding, Options, SkippedError, Values, child_environment, values_of

NAME = "quality"
TITLE = "Quality: KL per token from Transformers on the same weights (see bench/quality)"
_CELL = "kl"
_PROGRAM = ROOT / "bench" / "quality" / "kl.py"


def cells(options: Options) -> list[Cell]:
    return [Cell(name=_CELL, measure=lambda: _run(options))]


def _run(options: Options) -> Values:
    out = SCRATCH / "quality.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(_PROGRAM), "--model", str(options.gguf), "--out", str(out)]
    command += ["--quick"] if options.quick else []
    command += ["--transformers", options.transformers_python] if options.transformers_python else []
    done = subprocess.run(command, env=child_environment() | _peer_path(options), cwd=ROOT, check=False)
    if done.returncode:
        raise SkippedError(f"{_PROGRAM.name} ended with exit code {done.returncode}")
    values: Values = json.loads(out.read_text())
    return values


def _peer_path(options: Options) -> dict[str, str]:
    """`llama_cpp` is found beside the interpreter that was built for it; it is pure Python over a shared library."""
    if not options.llama_python:
        return {}
    asked = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent.parent)"
    done = subprocess.run([options.llama_python, "-c", asked], capture_output=True, text=True, check=False)
    return {"PYTHONPATH": done.stdout.strip()} if done.returncode == 0 else {}


def findings(results: Mapping[str, Values]) -> list[Finding]:
    values = values_of(results, _CELL)
    if values is None:
        return []
    engines = {e["engine"]: e for e in values["engines"]}
    ours, theirs = engines["shoal cpu"], engines.get("llama.cpp")
    tokens = f"{ours['tokens']} tokens against {values['reference']}"
    said = f"**{ours['mean_kl']:.2e}** nats, {ours['top1_equal']:.1%} same likeliest token ({tokens})"
    if theirs is None:
        return [Finding(what="mean KL", goal="<= llama.cpp's", measured=f"{said}; llama.cpp not measured")]
    said = f"{said}; llama.cpp {theirs['mean_kl']:.2e}, {theirs['top1_equal']:.1%}"
    return [Finding(what="mean KL", goal="<= llama.cpp's", measured=said, met=ours["mean_kl"] <= theirs["mean_kl"])]
