"""Nodes join, fetch what they need, drain and leave; and are told what is wrong when they cannot start."""

import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from shoal.store.home import open_store

Fleet = Any  # of conftest
Machine = Any
ASKED = {"model": "two", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def shoal(*flags: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")} | {"SHOAL_HOME": str(home)} | more
    command = [sys.executable, "-m", "shoal", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def site(three_nodes: Fleet) -> Fleet:
    return three_nodes


@pytest.mark.slow
def test_a_node_that_leaves_ends_its_answers_first_then_its_stage_moves_and_it_may_come_back(site: Fleet) -> None:
    plan = site.deployment("two")
    leaver = next(m for m in site.machines if m.id == plan.plan.stages[-1].node)
    client = site.openai()
    whole = client.chat.completions.create(**ASKED, max_tokens=600).choices[0].message.content
    stream = client.chat.completions.create(**ASKED, max_tokens=600, stream=True)
    text = next(stream).choices[0].delta.content or ""

    with site.asking() as fleet:
        fleet.leave(leaver.id)  # at once: no report has told the coordinator of the answer yet
    chunks = list(stream)

    assert chunks[-1].choices[0].finish_reason == "length"
    assert text + "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    view = site.wait_ready("two", after=plan)
    assert leaver.id not in {s.node for s in view.plan.stages}
    assert leaver.process.wait(timeout=20) == 0
    assert client.chat.completions.create(**ASKED, max_tokens=600).choices[0].message.content == whole

    leaver.start()
    leaver.wait_up()
    site.wait_alive(leaver.name)


@pytest.mark.slow
def test_a_fetch_that_was_killed_goes_on_where_it_stopped(site: Fleet) -> None:
    a = site.machines[0]
    slow = site.join("slow", "--link", f"{a.id}=20ms,4mbit")
    slow.wait_up()
    site.wait_alive("slow")
    site.deploy("fetched", a, slow, most_on_last=True, wait=False)
    store = open_store(slow.home)
    weights = {e.chunk.digest for e in site.stock.artifact("tiny").manifest.tensors}

    def held() -> dict[str, int]:
        """Weights on disk, each with the time when its file was written."""
        return {
            d: (slow.home / "chunks" / d[:2] / d).stat().st_mtime_ns for d in store.disk.sizes_bytes() if d in weights
        }

    site.wait(lambda: len(held()) >= 5, "some weights have arrived")
    slow.kill()
    before = held()
    assert len(before) < len(weights) - 5, "the fetch was under way"

    slow.start()
    slow.wait_up()
    site.wait_ready("fetched")

    after = held()
    assert {d: after[d] for d in before} == before, "nothing was fetched twice"
    assert len(after) > len(before)
    answers = [
        site.openai().chat.completions.create(**{**ASKED, "model": m}, max_tokens=30).choices[0].message.content
        for m in ("two", "fetched")
    ]
    assert answers[0] == answers[1]
    site.stop("fetched")
    site.dismiss(slow)


@pytest.mark.slow
def test_a_chunk_that_was_damaged_on_disk_is_fetched_again(site: Fleet) -> None:
    a = site.machines[0]
    other = site.machines[1]
    site.deploy("mended", a, other)
    site.stop("mended")
    store = open_store(other.home)
    weights = {e.chunk.digest: e.chunk.size_bytes for e in site.stock.artifact("tiny").manifest.tensors}
    digest = max((d for d in store.disk.sizes_bytes() if d in weights), key=lambda d: weights[d])
    path = other.home / "chunks" / digest[:2] / digest
    path.unlink()
    path.write_bytes(bytes(weights[digest]))

    view = site.deploy("mended", a, other)

    assert view.plan.stages[-1].node == other.id
    asked_both = [
        site.openai().chat.completions.create(**{**ASKED, "model": m}, max_tokens=30).choices[0].message.content
        for m in ("two", "mended")
    ]
    assert asked_both[0] == asked_both[1]
    site.stop("mended")


@pytest.mark.slow
def test_a_node_whose_fleet_is_not_there_yet_waits_for_it_and_says_so(fleet: Fleet) -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    early = fleet.add("early", "join", f"127.0.0.1:{port}")
    early.wait_up()
    fleet.wait(
        lambda: f"127.0.0.1:{port}" in early.log and "fleet.not_heard" in early.log, "it says whom it waits for", 15
    )

    first = fleet.up("a", "--listen", f"127.0.0.1:{port}")
    first.wait_up()

    fleet.wait_alive("early", at=first)


TAKEN = [
    (("up", "--port", "0", "--listen", "127.0.0.1:{taken}"), "--listen 127.0.0.1:{next}, or --listen 127.0.0.1:0 for"),
    (("up", "--port", "{taken}", "--listen", "127.0.0.1:0"), "--port {next}, or --port 0 for"),
    (("join", "127.0.0.1:9", "--gateway", "127.0.0.1:{taken}"), "--gateway 127.0.0.1:{next}, or --gateway 127.0.0.1:0"),
    (("join", "127.0.0.1:9", "--listen", "127.0.0.1:{taken}"), "--listen 127.0.0.1:{next}, or"),
    (("serve", "smollm2-135m", "--port", "{taken}", "--listen", "127.0.0.1:0"), "--port {next}, or"),
    (("serve", "smollm2-135m", "--port", "0", "--listen", "127.0.0.1:{taken}"), "--listen 127.0.0.1:{next}, or"),
]


@pytest.mark.parametrize(("flags", "advice"), TAKEN, ids=[" ".join(f[0::2]) for f, _ in TAKEN])
def test_a_taken_port_is_named_with_the_flag_to_give(flags: tuple[str, ...], advice: str, tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = {"taken": port, "next": port + 1}

        done = shoal(*(flag.format(**words) for flag in flags), home=tmp_path / "home")

    assert done.returncode == 69
    assert f"error: port {port} on 127.0.0.1 is in use" in done.stderr
    assert advice.format(**words) in done.stderr
    assert done.stdout == "", "nothing was begun"
    assert not (tmp_path / "home" / "models").exists(), "nothing was downloaded"


def test_a_second_node_in_one_home_is_refused(site: Fleet) -> None:
    done = shoal("up", "--port", "0", "--listen", "127.0.0.1:0", home=site.machines[0].home)

    assert done.returncode != 0
    assert "already running" in done.stderr
    assert "Traceback" not in done.stderr


def test_flags_for_a_node_that_serve_starts_are_refused_where_one_runs(site: Fleet, tmp_path: Path) -> None:
    here = shoal("serve", "tiny", "--port", "1", home=site.machines[0].home)
    there = shoal("serve", "tiny", "--memory", "1GB", home=tmp_path, SHOAL_URL=site.machines[0].url)

    for done, why in ((here, "one runs here already"), (there, "another one is asked")):
        assert done.returncode == 2
        assert why in done.stderr


def test_commands_find_a_fleet_by_its_address(site: Fleet, tmp_path: Path) -> None:
    done = shoal("ps", home=tmp_path, SHOAL_URL=site.machines[0].url)

    assert done.returncode == 0, done.stderr
    assert "two" in done.stdout


@pytest.mark.slow
def test_a_stopped_model_that_is_deployed_again_differently_answers_the_same(site: Fleet) -> None:
    a = site.machines[0]
    other = site.machines[1]
    expected = site.openai().chat.completions.create(**ASKED, max_tokens=30).choices[0].message.content
    epochs = []
    for places in ((a, other), (a,), (a, other)):
        epochs.append(site.deploy("again", *places).plan_epoch)
        answer = site.openai().chat.completions.create(**{**ASKED, "model": "again"}, max_tokens=30)
        assert answer.choices[0].message.content == expected
        site.stop("again")

    assert epochs == sorted(set(epochs)), "an epoch is never used twice: old shards may still lie somewhere"


def test_a_stopped_model_is_gone_and_its_memory_with_it(site: Fleet) -> None:
    a = site.machines[0]
    before = len(a.workers())
    site.deploy("short", a)
    site.stop("short")

    assert len(a.workers()) == before
    with pytest.raises(openai.NotFoundError):
        site.openai().chat.completions.create(**{**ASKED, "model": "short"})
    began_s = time.monotonic()
    assert site.openai().chat.completions.create(**ASKED, max_tokens=5), f"after {time.monotonic() - began_s:.1f} s"
