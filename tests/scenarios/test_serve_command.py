"""`shoal serve` where no node runs: it starts one, deploys on it, and ends with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.scenarios.conftest import clean_environment, wait_for
from tests.scenarios.test_coming_and_going import shoal

SERVE = ("serve", "tiny", "--port", "0", "--listen", "127.0.0.1:0", "--memory", "1GiB")


Stock = Any  # of conftest


@pytest.fixture
def home(stock: Stock, tmp_path: Path) -> Path:
    stock.furnish(tmp_path / "home", ("tiny",))
    return tmp_path / "home"


@pytest.mark.slow
def test_serve_starts_a_node_and_prints_a_line_that_works(home: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    environment = clean_environment() | {"SHOAL_HOME": str(home)}
    with said.open("wb") as out:
        command = [sys.executable, "-m", "shoal", *SERVE, "--name", "chat"]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        curl = wait_for(lambda: "curl " in said.read_text() or process.poll() is not None, "it serves", 60)
        assert curl, said.read_text()
        words = next(line for line in said.read_text().splitlines() if line.startswith("curl ")).split(" ", 2)
        body = words[2].split("-d '")[1].rstrip("'")

        answer = httpx.post(words[1], content=body, headers={"Content-Type": "application/json"}, timeout=60)

        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
        for part in ("predicted", "chat is ready", "API at "):
            assert part in said.read_text()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_what_cannot_be_served_ends_the_node_with_the_errors_exit_code(home: Path) -> None:
    done = shoal(*SERVE, "--context", "1000000", home=home)

    assert done.returncode == 2
    assert "was made for a context of 4096 tokens" in done.stderr
    assert "hint: ask for at most --context 4096" in done.stderr
    assert not (home / "run" / "node.json").exists()
