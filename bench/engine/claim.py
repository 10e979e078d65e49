"""Engine against engine: one process of ours and one of llama.cpp in turn, on the same file with the same prompt."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.measure import (
    MODEL,
    ROOT,
    Cell,
    Finding,
    Options,
    SkippedError,
    Values,
    child_environment,
    spread,
    values_of,
)
from bench.nodes import imported_home
from bench.prompt import NEW_TOKENS, PROMPT_TOKENS, prompt_ids
from shoal.node.launch import engine_environment

NAME = "engine"
TITLE = f"Engine: SmolLM2-135M Q4_1, prompt of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones, against llama.cpp"
GOALS = {"decode": 1.2, "prefill": 2.0}
_HERE = Path(__file__).resolve().parent


def cells(options: Options) -> list[Cell]:
    return [Cell(name=f"{n} threads", measure=lambda n=n: _compare(options, n)) for n in (1, 2)]  # type: ignore[misc]


def _compare(options: Options, threads: int) -> Values:
    """Rounds of ours, then theirs, each in a fresh process: where pages fall differs from process to process."""
    home = imported_home(options)
    prompt = prompt_ids(options.gguf, PROMPT_TOKENS)
    asked = {"home": str(home), "gguf": str(options.gguf), "model": MODEL, "prompt": prompt, "threads": threads}
    asked |= {"new_tokens": 16 if options.quick else NEW_TOKENS, "warm_tokens": 16}
    ours: list[Values] = []
    theirs: list[Values] = []
    peer = ""
    for _ in range(2 if options.quick else 7):
        ours += _run([sys.executable, "-m", "bench.engine.shoal_engine"], asked, engine_environment({}, threads))
        if options.llama_python:
            said = _run([options.llama_python, str(_HERE / "llama_engine.py")], asked, {})
            theirs, peer = theirs + said["runs"], said["version"]
    if not theirs:
        print("  llama.cpp: SKIPPED, name an interpreter that has llama_cpp (--llama-python, see bench/README.md)")
    found: Values = {"shoal": _figures(ours), "peer": f"llama-cpp-python {peer}" if peer else ""}
    if theirs:
        found["llama.cpp"] = _figures(theirs)
        found["same first tokens"] = _common(ours[0]["tokens"], theirs[0]["tokens"])
    return found


def _run(command: list[str], asked: Values, environment: Mapping[str, str]) -> "Values | list[Values]":  # type: ignore[return]
    done = subprocess.run(
        command,
        input=json.dumps(asked) + "\n",
        env={**child_environment(), **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SkippedError(f"{' '.join(command)} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _figures(runs: list[Values]) -> Values:
    names = [name for name in runs[0] if name != "tokens"]
    return {name: spread([run[name] for run in runs]) for name in names}


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two greedy answers share from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def findings(results: Mapping[str, Values]) -> list[Finding]:
    found: list[Finding] = []
    for threads in (1, 2):
        values = values_of(results, f"{threads} threads")
        if values is None:
            continue
        for phase, goal in GOALS.items():
            found.append(_finding(values, threads, phase, goal))
    return found


def _finding(values: Values, threads: int, phase: str, goal: float) -> Finding:
    what = f"{phase}, {threads} thread{'s' * (threads > 1)}"
    ours, ours_cpu = _rate(values["shoal"], phase)
    wanted = f">= {goal}x llama.cpp"
    if "llama.cpp" not in values:
        return Finding(what=what, goal=wanted, measured=f"{ours:.1f} tok/s; llama.cpp not measured")
    theirs, theirs_cpu = _rate(values["llama.cpp"], phase)
    ratio = ours / theirs
    said = f"**{ratio:.2f}x** ({ours:.1f} against {theirs:.1f} tok/s; CPU time per token {theirs_cpu / ours_cpu:.2f}x)"
    return Finding(what=what, goal=wanted, measured=said, met=ratio >= goal)


def _rate(figures: Values, phase: str) -> tuple[float, float]:
    return figures[f"{phase}_tokens_per_s"]["median"], figures[f"{phase}_cpu_s_per_token"]["median"]
