"""Something that answers on the first host, whoever made it: where to ask, and which processes to hold to account."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One OpenAI-compatible endpoint on loopback of the first host; *pids*: what was started on all hosts."""

    port: int
    model: str
    pids: tuple[int, ...]

    def cpu_s(self) -> float:
        """Seconds of all its processes and their children so far."""
        return sum(_tree_cpu_s(pid) for pid in self.pids)


def _tree_cpu_s(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        tree: Iterable[psutil.Process] = (process, *process.children(recursive=True))
    except psutil.Error:
        return 0.0
    total_s = 0.0
    for member in tree:
        with contextlib.suppress(psutil.Error):
            times = member.cpu_times()
            total_s += times.user + times.system
    return total_s
