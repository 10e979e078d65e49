"""`shoal demo --once`, as a newcomer types it, with a model that is on disk already."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.scenarios.conftest import clean_environment

from shoal.cli.demo import DEVICES, MODEL

Stock = Any  # of conftest


def processes_of(home: Path) -> list[psutil.Process]:
    """Processes, ours or their children, that were started for a home below *home*."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SHOAL_HOME", "").startswith(str(home)) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.model
def test_the_demo_answers_through_several_nodes_none_of_which_could_hold_the_model(
    stock: Stock, tmp_path: Path
) -> None:
    stock.put(tmp_path / "demo" / DEVICES[0].name, MODEL)

    done = subprocess.run(
        [sys.executable, "-m", "shoal", "demo", "--once"],
        env=clean_environment() | {"SHOAL_HOME": str(tmp_path), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )

    assert done.returncode == 0, done.stderr + done.stdout
    said = " ".join(done.stdout.split())
    through = re.search(r"measured +\d+ ms to the first token, +[\d.]+ ms per token, through (\d) nodes", said)
    assert through is not None, done.stdout
    assert int(through[1]) >= 2
    assert said.count("not possible: the whole model") == len(DEVICES), done.stdout
    assert "downloads" not in said, "the model was on disk"
    for part in ("link", "BLOCK KIND", "STAGE", "predicted", f"{MODEL} is ready", "> Why is the sky blue?"):
        assert part in said
    before_the_answer = done.stdout.partition("> Why")[0]
    assert max(len(line.rstrip()) for line in before_the_answer.splitlines()) <= 80, done.stdout
    assert processes_of(tmp_path) == []
