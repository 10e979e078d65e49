import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import numpy as np
import pytest

from shoal.errors import CorruptFileError, UnavailableError
from shoal.model.spec import ImportedModel
from shoal.store.chunk import digest_of
from shoal.store.derived import DerivedKey
from shoal.store.garbage import collect
from shoal.store.home import Store, fetching, missing_bytes, open_store, writing
from shoal.store.write import write_model

Make = Callable[..., ImportedModel]


def add(store: Store, imported: ImportedModel) -> None:
    store.library.write(imported.spec.name, write_model(store, imported))


def test_chunks_of_a_removed_model_go_and_shared_ones_stay(store: Store, small_model: Make) -> None:
    add(store, small_model("one", seed=1))
    add(store, small_model("two", seed=1, rows=32))
    add(store, small_model("three", seed=3))
    store.library.remove("one")

    freed = collect(store)

    # The matrix of "one" and its manifest go; its vector is that of "two" as well, its graph that of "three".
    assert freed.chunks == 2
    assert collect(store).total_bytes == 0
    for name in ("two", "three"):
        assert missing_bytes(store, store.library.read(name)) == {}
        assert store.chunks.get(store.library.digest(name)) is not None


def test_a_dry_run_counts_and_touches_nothing(store: Store, small_model: Make) -> None:
    add(store, small_model())
    store.library.remove("small")

    would = collect(store, dry_run=True)

    assert would.chunks_bytes > 64 * 32 * 4
    assert collect(store) == would


def test_derived_partial_and_temporary_files_go(store: Store) -> None:
    store.derived.arrays(
        DerivedKey(inputs=(digest_of(b"w"),), op="pack", lowering="cpu-1"), lambda: {"p": np.ones(100)}
    )
    for folder, size in ((store.partial, 10), (store.tmp, 20)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x").write_bytes(bytes(size))

    freed = collect(store)

    assert freed.derived_bytes > 800
    assert (freed.partial_bytes, freed.tmp_bytes) == (10, 20)
    assert collect(store).total_bytes == 0


def test_it_refuses_while_a_model_is_being_written(store: Store) -> None:
    with writing(store, "big"), pytest.raises(UnavailableError, match="a pull of big"):
        collect(store)

    collect(store)


def test_it_refuses_while_chunks_come_from_another_node(store: Store) -> None:
    with fetching(store), pytest.raises(UnavailableError, match="a fetch from another node"):
        collect(store)

    collect(store)


@pytest.mark.parametrize("name", ["fetch", "fetches", "gate"])
def test_a_model_of_any_name_can_be_written_while_chunks_come_from_another_node(store: Store, name: str) -> None:
    def refuse() -> None:
        pytest.fail(f"a pull of {name} waits for the fetch")

    with fetching(store), writing(store, name, waiting=refuse) as folder:
        assert folder.exists()


def test_a_manifest_that_does_not_parse_stops_it(store: Store, small_model: Make) -> None:
    add(store, small_model())
    (store.home / "models" / "small.json").write_bytes(b"{")

    with pytest.raises(CorruptFileError):
        collect(store)

    assert store.disk.sizes_bytes()


def test_a_writer_that_was_killed_holds_nothing_up_and_its_files_are_swept_by_the_next(store: Store) -> None:
    program = """
        import os, signal, sys
        from pathlib import Path
        from shoal.store.home import open_store, writing
        with writing(open_store(Path(sys.argv[1])), "big") as folder:
            (folder / "half").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(store.home)], timeout=60, check=False)
    assert (store.tmp / "big" / "half").exists()

    with writing(store, "other"):
        assert not (store.tmp / "big").exists()


def test_a_live_writers_files_are_left_alone(store: Store) -> None:
    with writing(store, "big") as folder, writing(open_store(store.home), "other"):
        assert folder.exists()


def test_the_second_writer_of_a_model_waits_for_the_first(store: Store) -> None:

    waiting, order = threading.Event(), []

    def second() -> None:
        with writing(open_store(store.home), "big", waiting=waiting.set):
            order.append("second")

    with writing(store, "big"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)

    assert order == ["first", "second"]


def test_a_model_that_is_in_use_stays_without_a_name(store: Store, small_model: Make) -> None:
    add(store, small_model())
    digest, manifest = store.library.digest("small"), store.library.read("small")
    store.library.remove("small")

    kept = collect(store, in_use=[digest, digest_of(b"a manifest that is not here any more")])

    assert kept.chunks == 0
    assert missing_bytes(store, manifest) == {}
    assert store.chunks.get(digest) is not None
    assert collect(store).chunks > 0
