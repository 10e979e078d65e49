"""What a node must not forget."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shoal.errors import CorruptFileError, StorageFullError
from shoal.node.journal import Journal


class Note(msgspec.Struct, frozen=True, kw_only=True):
    text: str


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


def test_what_was_put_is_there_after_reopening(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal.db")
    first.put("note", "a", Note(text="kept"))
    first.close()

    second = Journal(tmp_path / "journal.db")
    try:
        assert second.get("note", "a", Note) == Note(text="kept")
    finally:
        second.close()


def test_an_older_generation_changes_nothing(journal: Journal) -> None:
    journal.put("note", "a", Note(text="new"), generation=2)
    journal.put("note", "a", Note(text="old"), generation=1)

    assert journal.get("note", "a", Note) == Note(text="new")


def test_records_of_a_kind_come_by_key_and_without_other_kinds(journal: Journal) -> None:
    for key in ("b", "a"):
        journal.put("note", key, Note(text=key))
    journal.put("other", "c", Note(text="c"))

    assert journal.all("note", Note) == (Note(text="a"), Note(text="b"))


def test_a_removed_record_is_gone_and_removing_it_again_is_harmless(journal: Journal) -> None:
    journal.put("note", "a", Note(text="a"))
    journal.remove("note", "a")
    journal.remove("note", "a")

    assert journal.get("note", "a", Note) is None


def test_numbers_only_grow_also_over_a_restart(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal.db")
    numbers = [first.next_number("incarnation"), first.next_number("incarnation")]
    first.close()
    second = Journal(tmp_path / "journal.db")
    numbers.append(second.next_number("incarnation"))
    second.close()

    assert numbers == sorted(set(numbers))


def test_many_threads_lose_no_write(journal: Journal) -> None:
    def write(worker: int) -> None:
        for i in range(20):
            journal.put("note", f"{worker}-{i}", Note(text="x"))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(journal.all("note", Note)) == 160


def test_a_closed_journal_says_so(journal: Journal) -> None:
    journal.close()
    journal.close()

    with pytest.raises(StorageFullError, match="closed"):
        journal.put("note", "a", Note(text="a"))


def test_a_file_that_is_no_journal_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"something else entirely" * 100)

    with pytest.raises(CorruptFileError, match="not a readable journal"):
        Journal(tmp_path / "journal.db")


def test_every_acknowledged_write_survives_a_kill(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, msgspec
        from pathlib import Path
        from shoal.node.journal import Journal
        class Note(msgspec.Struct, frozen=True, kw_only=True):
            text: str
        journal = Journal(Path(sys.argv[1]))
        for i in range(100000):
            journal.put("note", f"{i:06}", Note(text=str(i)))
            print(i, flush=True)
        """
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "journal.db")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(25)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    writer.stdout.close()

    journal = Journal(tmp_path / "journal.db")
    try:
        kept = {int(note.text) for note in journal.all("note", Note)}
    finally:
        journal.close()
    assert set(acknowledged) <= kept


def test_a_number_is_above_what_is_known_from_elsewhere(journal: Journal) -> None:
    assert journal.next_number("plan", above=41) == 42
    assert journal.next_number("plan", above=7) == 43
