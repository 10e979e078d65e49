"""Facts of this machine: what a shard may use of it, and what makes two machines alike.

A container's limits count, not the board's: cores by affinity and CPU quota, memory by the tightest group from this
process up to the root (cgroup v2, or v1's own controllers).  Files are read below a root folder that tests choose.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec
from blake3 import blake3

from shoal.errors import SettingsError

SPARED_BYTES = 256 * 2**20
"""Left to the system and to our own agent when a budget is suggested."""
NO_LIMIT = 2**60
"""cgroup v1 writes "no limit" as a number near 2^63."""


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; `flags` are the CPU's instruction sets."""

    cores: int
    memory_total_bytes: int
    """Installed, or the group's limit where that is lower."""
    memory_available_bytes: int
    """Free or reclaimable now, within the group's limit."""
    cpu_model: str
    flags: tuple[str, ...]
    machine: str
    engine: str
    """Name and version of the inference engine."""

    @property
    def suggested_budget_bytes(self) -> int:
        """What shards may use when nobody says otherwise: what is available, less a reserve."""
        return max(0, self.memory_available_bytes - SPARED_BYTES)


def device_facts(engine: str, *, root: Path = Path("/"), affinity: int | None = None) -> DeviceFacts:
    """Look at this machine; raises SettingsError when its memory cannot be told."""
    groups = _Groups(root)
    total, available = _memory(root)
    limit = groups.tightest(("memory.max", "memory.limit_in_bytes"), "memory")
    free = min((available, *(at_most - used for at_most, used in groups.memory_use())))
    model, flags = _cpu(root)
    return DeviceFacts(
        cores=_cores(affinity or _affinity(), groups.quota_cores()),
        memory_total_bytes=min(total, limit or total),
        memory_available_bytes=max(0, free),
        cpu_model=model,
        flags=flags,
        machine=platform.machine(),
        engine=engine,
    )


def fingerprint(facts: DeviceFacts, threads: int, extra: Sequence[str] = ()) -> str:
    """Equal for machines whose trials may stand for each other: 32 hexadecimal characters.

    *extra* names what else changes speed: an engine's provider, a throttle, a power mode.
    """
    parts = (
        facts.machine,
        facts.cpu_model,
        " ".join(facts.flags),
        str(facts.cores),
        str(threads),
        facts.engine,
        *extra,
    )
    return blake3("\n".join(parts).encode()).hexdigest()[:32]


def _cores(affinity: int, quota: float | None) -> int:
    return max(1, min(affinity, int(quota + 0.5)) if quota else affinity)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory(root: Path) -> tuple[int, int]:
    """Installed and available bytes."""
    fields = dict(_colon_lines(_text(root / "proc/meminfo")))
    if "MemTotal" in fields:
        total = _kilobytes(fields["MemTotal"])
        return total, _kilobytes(fields["MemAvailable"]) if "MemAvailable" in fields else total
    if root == Path("/") and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total // 2
    raise SettingsError(
        "this system does not tell its memory", hint="state what shards may use with --memory", param="memory"
    )


def _kilobytes(field: str) -> int:
    return int(field.split(maxsplit=1)[0]) * 1024


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    fields = dict(reversed([*_colon_lines(_text(root / "proc/cpuinfo"))]))
    model = (
        fields.get("model name") or fields.get("Model") or fields.get("Hardware") or platform.processor() or "unknown"
    )
    return model, tuple(sorted((fields.get("flags") or fields.get("Features") or "").split()))


class _Groups:
    """The control groups that hold this process, whichever version."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sys/fs/cgroup"
        rows = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
        self._paths = {name: path for _, names, path in rows for name in names.split(",")}

    def folders(self, controller: str) -> Iterator[Path]:
        """From this process's group up to the mounted root; a path that is not visible here is skipped."""
        for name, base in ((controller, self._root / controller), ("", self._root)):
            if name in self._paths:
                path = PurePosixPath(self._paths[name].lstrip("/"))
                yield from (folder for part in (path, *path.parents) if (folder := base / part).is_dir())

    def tightest(self, files: Sequence[str], controller: str) -> int | None:
        """The lowest limit in any of *files* on the way up."""
        limits = [
            number
            for folder in self.folders(controller)
            for name in files
            if (number := _number(folder / name)) is not None
        ]
        return min((number for number in limits if number < NO_LIMIT), default=None)

    def memory_use(self) -> Iterator[tuple[int, int]]:
        """(limit, held and not reclaimable) of each limited group."""
        for folder in self.folders("memory"):
            for limit_name, used_name, cache in V2_AND_V1_MEMORY:
                limit, used = _number(folder / limit_name), _number(folder / used_name)
                if limit is not None and limit < NO_LIMIT and used is not None:
                    yield limit, max(0, used - int(dict(_space_lines(_text(folder / "memory.stat"))).get(cache, "0")))

    def quota_cores(self) -> float | None:
        """CPU time per period, in cores."""
        quotas = [quota for folder in self.folders("cpu") for read in (_quota_v2, _quota_v1) if (quota := read(folder))]
        return min(quotas, default=None)


V2_AND_V1_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _colon_lines(text: str) -> Iterator[tuple[str, str]]:
    return _fields(text, lambda line: line.partition(":"))


def _space_lines(text: str) -> Iterator[tuple[str, str]]:
    return _fields(text, lambda line: line.partition(" "))


def _fields(text: str, split: Callable[[str], tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, mark, value = split(line)
        if mark:
            yield name.strip(), value.strip()
