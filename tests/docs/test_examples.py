"""Examples are documentation that runs: each exits with 0 and says what it is for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 100


def run(root: Path, name: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")}
    done = subprocess.run(
        [sys.executable, str(root / "examples" / name), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all: the second example finds the model pulled and measured."""
    return tmp_path_factory.mktemp("examples")


def test_a_problem_file_is_planned_offline(root: Path) -> None:
    said = run(root, "plan_a_problem_file.py")

    assert "as the file says" in said
    assert "gap 0.0%" in said


@pytest.mark.slow
@pytest.mark.model
def test_the_openai_client_gets_answers_a_stream_and_an_error(root: Path, smollm2_gguf: Path, home: Path) -> None:
    said = run(root, "openai_client.py", str(smollm2_gguf), "--home", str(home))

    assert "whole: " in said
    assert "first token: " in said
    assert "'code': 'model_not_found'" in said


@pytest.mark.slow
@pytest.mark.model
def test_the_sdk_shows_nodes_a_plan_and_why_there_is_none(root: Path, smollm2_gguf: Path, home: Path) -> None:
    said = run(root, "sdk_nodes_and_plan.py", str(smollm2_gguf), "--home", str(home))

    assert "coordinator, gateway, worker" in said
    assert "first token after " in said
    assert "no plan: " in said


@pytest.mark.slow
def test_embeddings_tell_alike_from_unlike(root: Path, minilm_folder: Path, home: Path) -> None:
    said = run(root, "embeddings.py", str(minilm_folder), "--home", str(home))

    alike, *unlike = [float(line.split()[0]) for line in said.splitlines() if " / " in line]
    assert alike > 0.5
    assert all(value < 0.3 for value in unlike)


def test_every_example_is_run_here(root: Path) -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    shared = {"local_node.py"}

    assert [
        p.name for p in (root / "examples").glob("*.py") if p.name not in shared and f'"{p.name}"' not in here
    ] == []
