from pathlib import Path

import ml_dtypes
import numpy as np

from shoal.ids import Digest
from shoal.store.chunk import digest_of
from shoal.store.derived import DerivedKey
from shoal.store.home import Store, open_store

KEY = DerivedKey(inputs=(digest_of(b"w"),), op="pack", lowering="cpu-1")


class Counted:
    """A derivation that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"packed": np.arange(50_000, dtype=np.uint8).reshape(-1, 2), "scales": np.ones(3, ml_dtypes.bfloat16)}


def test_what_was_derived_once_is_mapped_by_the_next_process(store: Store) -> None:
    make = Counted()
    first = store.derived.arrays(KEY, make)

    again = open_store(store.home).derived.arrays(KEY, make)

    assert make.calls == 1
    for name, array in first.items():
        assert again[name].dtype == array.dtype
        assert np.array_equal(again[name], array)
        assert not again[name].flags.writeable


def test_another_input_operation_or_lowering_is_another_value(store: Store) -> None:
    make = Counted()
    keys = [
        KEY,
        DerivedKey(inputs=(Digest("0" * 64),), op="pack", lowering="cpu-1"),
        DerivedKey(inputs=KEY.inputs, op="other", lowering="cpu-1"),
        DerivedKey(inputs=KEY.inputs, op="pack", lowering="cpu-2"),
    ]

    for key in keys:
        store.derived.arrays(key, make)

    assert make.calls == len({key.digest() for key in keys}) == 4


def test_a_damaged_value_is_made_again(store: Store) -> None:
    make = Counted()
    store.derived.arrays(KEY, make)
    largest = max((store.home / "derived").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(bytes(largest.stat().st_size))

    again = store.derived.arrays(KEY, make)

    assert make.calls == 2
    assert np.array_equal(again["packed"], make()["packed"])


def test_without_room_on_disk_the_fresh_value_is_used(tmp_path: Path) -> None:
    make = Counted()
    store = open_store(tmp_path, quota_bytes=100)

    found = store.derived.arrays(KEY, make)

    assert np.array_equal(found["packed"], make()["packed"])
