"""A memory limit for a process that runs already: by control group where one can be written, else on its private data."""

import contextlib
import os
import resource
from pathlib import Path
from typing import Protocol

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_NAME = "shoal-bench"


class Limit(Protocol):
    kind: str

    def apply(self, pid: int, limit_bytes: int) -> None: ...
    def peak_bytes(self) -> int: ...
    def remove(self) -> None: ...


class GroupLimit:
    """A control group of either version; page cache counts too, but can be dropped."""

    def __init__(self, root: Path, file: str, peak: str, kind: str) -> None:
        self.kind = kind
        self._folder = root / f"{_NAME}-{os.getpid()}"
        self._file, self._peak = self._folder / file, self._folder / peak
        self._folder.mkdir()

    def apply(self, pid: int, limit_bytes: int) -> None:
        self._file.write_text(str(limit_bytes))
        (self._folder / "cgroup.procs").write_text(str(pid))

    def peak_bytes(self) -> int:
        """The most that was counted: proof that the limit saw the process."""
        return int(self._peak.read_text())

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()


class DataLimit:
    """RLIMIT_DATA: counts private memory that is reserved, too, so it is the stricter one."""

    kind = "RLIMIT_DATA, which counts reserved memory too"

    def apply(self, pid: int, limit_bytes: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    def peak_bytes(self) -> int:
        """The system does not tell."""
        return 0

    def remove(self) -> None:
        """It ends with the process."""


def find_limit() -> Limit | None:
    """The best limit that this system lets us set."""
    for root, file, peak, kind in (
        (_V1, "memory.limit_in_bytes", "memory.max_usage_in_bytes", "cgroup v1, page cache counts too"),
        (_V2, "memory.max", "memory.peak", "cgroup v2, page cache counts too"),
    ):
        with contextlib.suppress(OSError):
            limit = GroupLimit(root, file, peak, kind)
            if (root / f"{_NAME}-{os.getpid()}" / file).exists():
                return limit
            limit.remove()
    return DataLimit() if hasattr(resource, "prlimit") else None
