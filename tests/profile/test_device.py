"""Facts of a machine, read from a made tree of files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.errors import SettingsError
from shoal.profile.device import SPARED_BYTES, DeviceFacts, device_facts, fingerprint

MEBI = 2**20
Tree = Callable[[dict[str, str]], Path]

BARE = {
    "proc/meminfo": "MemTotal:        8388608 kB\nMemFree:  100 kB\nMemAvailable:    4194304 kB\n",
    "proc/cpuinfo": "processor: 0\nmodel name\t: Board A\nflags\t\t: sse avx\n\nprocessor: 1\nmodel name\t: Other\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def make(files: dict[str, str]) -> Path:
        for name, text in (BARE | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def facts(root: Path, affinity: int = 4) -> DeviceFacts:
    return device_facts("onnxruntime 1.2", root=root, affinity=affinity)


def test_a_bare_machine_has_all_of_its_memory_and_the_cores_of_its_affinity(tree: Tree) -> None:
    found = facts(tree({}))

    assert (found.cores, found.memory_total_bytes, found.memory_available_bytes) == (4, 8192 * MEBI, 4096 * MEBI)
    assert (found.cpu_model, found.flags, found.engine) == ("Board A", ("avx", "sse"), "onnxruntime 1.2")
    assert found.suggested_budget_bytes == 4096 * MEBI - SPARED_BYTES


def test_an_arm_board_names_its_model_and_features(tree: Tree) -> None:
    found = facts(tree({"proc/cpuinfo": "processor : 0\nFeatures : fp asimd\nModel : Pi 5\n"}))

    assert (found.cpu_model, found.flags) == ("Pi 5", ("asimd", "fp"))


def test_the_tightest_group_on_the_way_up_limits_memory_and_cores_in_version_2(tree: Tree) -> None:
    base = "sys/fs/cgroup/outer"
    found = facts(
        tree(
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                f"{base}/memory.max": f"{1000 * MEBI}\n",
                f"{base}/memory.current": f"{700 * MEBI}\n",
                f"{base}/memory.stat": f"anon 5\ninactive_file {200 * MEBI}\n",
                f"{base}/cpu.max": "200000 100000\n",
                f"{base}/inner/memory.max": "max\n",
                f"{base}/inner/cpu.max": "max 100000\n",
            }
        )
    )

    assert found.memory_total_bytes == 1000 * MEBI
    assert found.memory_available_bytes == 500 * MEBI
    assert found.cores == 2


def test_a_container_of_version_1_sees_its_limits_at_the_mounted_root(tree: Tree) -> None:
    found = facts(
        tree(
            {
                "proc/self/cgroup": "5:memory:/docker/unseen\n4:cpu,cpuacct:/docker/unseen\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{512 * MEBI}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{600 * MEBI}\n",
                "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {100 * MEBI}\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            }
        )
    )

    assert (found.memory_total_bytes, found.memory_available_bytes, found.cores) == (512 * MEBI, 12 * MEBI, 2)


def test_no_limit_in_version_1_is_a_huge_number_and_a_negative_quota(tree: Tree) -> None:
    found = facts(
        tree(
            {
                "proc/self/cgroup": "5:memory:/\n4:cpu:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            }
        )
    )

    assert (found.memory_total_bytes, found.cores) == (8192 * MEBI, 4)


def test_a_system_without_meminfo_says_which_setting_helps(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--memory"):
        facts(tmp_path)


def test_this_machine_can_be_looked_at() -> None:
    found = device_facts("onnxruntime 1.2")

    assert found.cores >= 1
    assert 0 <= found.memory_available_bytes <= found.memory_total_bytes


def test_a_fingerprint_changes_with_all_that_changes_speed_and_with_nothing_else(tree: Tree) -> None:
    one = facts(tree({}))
    busy = facts(tree({"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 1 kB\n"}))
    other = facts(tree({"proc/cpuinfo": "model name: Board B\n"}))

    assert fingerprint(one, 2) == fingerprint(busy, 2)
    assert (
        len({fingerprint(one, 2), fingerprint(one, 1), fingerprint(other, 2), fingerprint(one, 2, ["throttle 4"])}) == 4
    )
