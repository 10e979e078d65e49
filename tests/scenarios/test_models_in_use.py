"""A model that is served is not lost by tidying up; and when its files are gone after all, the way back is named."""

import shutil
from typing import Any

import pytest
from tests.scenarios.test_coming_and_going import shoal

from shoal.store.home import open_store

Fleet = Any  # of conftest


@pytest.mark.slow
def test_a_served_model_survives_rm_and_gc(fleet: Fleet) -> None:
    a, *_ = fleet.site()
    before = fleet.deploy("chat", a)

    refused = shoal("rm", "tiny", home=a.home)
    open_store(a.home).library.remove("tiny")  # as a pull of something else under this name would
    collected = shoal("gc", home=a.home)
    a.workers()[0].kill()
    fleet.wait_ready("chat", after=before)

    assert refused.returncode == 2
    assert "tiny is served here, as chat" in refused.stderr
    assert "`shoal stop chat`" in refused.stderr
    assert collected.returncode == 0, collected.stderr
    answer = fleet.openai().chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert answer.choices[0].finish_reason == "length"

    fleet.stop("chat")

    # The worker's start has given it its name back; the last view is kept a moment after the deployment has ended.
    fleet.wait(lambda: shoal("rm", "tiny", home=a.home).returncode == 0, "it can be removed once it is stopped", 10)
    assert "chunks" in shoal("gc", home=a.home).stdout


@pytest.mark.slow
def test_chunks_that_are_nowhere_are_named_with_what_brings_them_back(fleet: Fleet) -> None:
    a, *_ = fleet.site()
    fleet.deploy("chat", a)
    weights = {e.chunk.digest for e in fleet.stock.artifact("tiny").manifest.tensors}
    for digest in weights:
        (a.home / "chunks" / digest[:2] / digest).unlink()
    shutil.rmtree(a.home / "derived", ignore_errors=True)

    a.workers()[0].kill()

    def told() -> bool:
        return fleet.deployment("chat").detail.endswith("with `shoal pull PATH/tiny-source --name tiny`")

    fleet.wait(told, "the reason ends with what to type")
