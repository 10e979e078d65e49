"""A home folder that cannot be used is the owner's move, or the disk's: never "a fault of Shoal"."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.errors import SettingsError, StorageFullError
from shoal.node.journal import Journal
from shoal.store.disk import home_named
from shoal.store.lock import try_locked

HANGING_S = 300.0
"""After this a command hangs: what a loaded machine takes to start an interpreter with its engines is no failure."""
UP = ("up", "--port", "0", "--listen", "127.0.0.1:0")


def shoal(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")} | {"SHOAL_HOME": str(home)}
    command = [sys.executable, "-m", "shoal", *arguments]
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A small disk of its own, mounted with the given options; skips where this user may not mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = False

    def mount(options: str) -> Path:
        nonlocal done
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        if not done:
            pytest.skip("mounting a small disk takes root")
        return folder

    yield mount
    if done:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(done: subprocess.CompletedProcess[str], code: int, said: str, hint: str) -> None:
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert f"hint: {hint}" in done.stderr
    assert "fault of Shoal" not in done.stderr


EVERY = [
    ("models",),
    ("gc",),
    ("rm", "m"),
    ("pull", "smollm2-135m"),
    ("serve", "smollm2-135m"),
    ("nodes",),
    UP,
    ("demo",),
]


@pytest.mark.parametrize("command", EVERY, ids=lambda c: c[0])
def test_a_home_that_is_a_file_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")

    done = shoal(tmp_path / "home", *command)

    refused(done, 2, f"cannot write to home {tmp_path / 'home'}: Not a directory", "set SHOAL_HOME to a folder that")


def test_a_file_in_the_place_of_a_folder_of_the_home_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")

    refused(shoal(tmp_path, *UP), 2, f"cannot write to home {tmp_path}", "set SHOAL_HOME to a folder that")


@pytest.mark.parametrize("command", [("gc",), ("pull", "pypi:m==1"), UP, ("demo", "--once")], ids=lambda c: c[0])
def test_a_home_on_a_read_only_disk_is_named(command: tuple[str, ...], mounted: Callable[..., Path]) -> None:
    home = mounted("ro,size=1m") / "home"

    refused(shoal(home, *command), 2, f"cannot write to home {home}", "set SHOAL_HOME to a folder that")


def test_a_home_on_a_full_disk_is_storage_that_is_full(mounted: Callable[..., Path]) -> None:
    home = mounted("size=64k")
    (home / "ballast").write_bytes(bytes(60 * 1024))

    refused(shoal(home, *UP), 69, str(home), "free space on that disk")


HOME = Path("/data/shoal")


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (PermissionError(errno.EACCES, "no", "/data/shoal/run/lock"), SettingsError),
        (PermissionError(errno.EACCES, "no", "/data"), SettingsError),
        (OSError(errno.ENOSPC, "full"), StorageFullError),
        (PermissionError(errno.EACCES, "no", "/elsewhere/model.gguf"), PermissionError),
        (PermissionError(errno.EACCES, "no"), PermissionError),
        (FileNotFoundError(errno.ENOENT, "no", "/data/shoal/x"), FileNotFoundError),
    ],
)
def test_only_errors_about_the_home_are_about_the_home(error: OSError, becomes: type[Exception]) -> None:
    with pytest.raises(becomes), home_named(HOME):
        raise error


def test_a_journal_that_cannot_be_made_is_no_corrupt_one(tmp_path: Path) -> None:
    (tmp_path / "journal.db").mkdir()

    with pytest.raises(SettingsError, match="cannot write to home"):
        Journal(tmp_path / "journal.db")


def test_a_lock_of_another_user_is_taken_by_whoever_may_read_it(mounted: Callable[..., Path], tmp_path: Path) -> None:
    disk = mounted("size=64k")
    with try_locked(disk / "lock"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)  # root may write to every other file

    with try_locked(disk / "lock") as mine, try_locked(disk / "lock") as theirs:
        assert (mine, theirs) == (True, False)
    with pytest.raises(OSError, match="Read-only"), try_locked(disk / "none"):
        pass
