"""Nodes of one machine do not measure at the same time, whoever they belong to."""

import tempfile
from pathlib import Path

import pytest

from shoal.node.trials import alone_on_this_machine
from shoal.store.lock import try_locked


def test_who_measures_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with alone_on_this_machine(), try_locked(tmp_path / "shoal-trials.lock") as second:
        assert not second


def test_without_a_lock_that_can_be_had_it_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "shoal-trials.lock").mkdir()  # opens for nobody, as a file of another user's may not for us
    entered = False

    with alone_on_this_machine():
        entered = True

    assert entered
    assert "another user's node may measure at the same time" in caplog.text
