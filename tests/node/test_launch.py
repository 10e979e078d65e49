"""What an engine's process finds in its environment."""

from pathlib import Path

import pytest

from shoal.node.launch import engine_environment

MIB = 2**20


def tunables(size_file: Path, **inherited: str) -> list[str]:
    return engine_environment(inherited, 3, size_file)["GLIBC_TUNABLES"].split(":")


@pytest.mark.parametrize(
    ("size", "asked"),
    [(str(2 * MIB), True), (str(4 * MIB), True), (str(32 * MIB), False), (str(512 * MIB), False), ("?", False)],
)
def test_huge_pages_are_asked_for_only_where_they_are_small(size: str, asked: bool, tmp_path: Path) -> None:
    size_file = tmp_path / "hpage_pmd_size"
    size_file.write_text(size + "\n")

    assert ("glibc.malloc.hugetlb=1" in tunables(size_file)) is asked


def test_a_kernel_that_has_no_huge_pages_is_not_asked_for_them_and_arrays_go_to_the_heap(tmp_path: Path) -> None:
    assert tunables(tmp_path / "absent") == [
        f"glibc.malloc.mmap_threshold={32 * MIB}",
        f"glibc.malloc.trim_threshold={32 * MIB}",
    ]


def test_tunables_of_the_user_come_last_so_that_they_win(tmp_path: Path) -> None:
    mine = "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=1"

    assert tunables(tmp_path, GLIBC_TUNABLES=mine)[-2:] == mine.split(":")


def test_an_engine_gets_as_many_threads_as_its_node_gives_it(tmp_path: Path) -> None:
    assert engine_environment({"OMP_NUM_THREADS": "64"}, 3, tmp_path)["OMP_NUM_THREADS"] == "3"
