"""Start a worker as a process of its own (ADR 6): its exit gives all of its memory back."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import anyio
import anyio.abc
import msgspec

from shoal.node.worker_spec import WorkerSpec

_STOP_S = 3.0
_HEAP_BYTES = 32 * 2**20
HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_HUGE_PAGE_AT_MOST_BYTES = 4 * 2**20


class WorkerProcess:
    """A worker process of ours; it ends when its standard input closes, so it never outlives its agent."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is no more."""
        return self._process.returncode is not None

    async def tell(self, spec: WorkerSpec) -> None:
        """Give it one more spec, if it is a process that takes several (`relay`)."""
        assert self._process.stdin is not None
        await self._process.stdin.send(msgspec.json.encode(spec) + b"\n")

    async def wait(self) -> str:
        """Wait for its end; the reason in words."""
        code = await self._process.wait()
        if code < 0:
            return f"worker {self.pid} was ended by {signal.Signals(-code).name}"
        return f"worker {self.pid} ended with exit code {code}"

    async def stop(self, *, at_once: bool = False) -> None:
        """Close its input; kill it when it does not end by itself, or *at_once*."""
        if at_once and self._process.returncode is None:
            self._process.kill()
        if self._process.stdin is not None:
            await self._process.stdin.aclose()
        with anyio.move_on_after(_STOP_S):
            await self._process.wait()
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def engine_environment(
    inherited: Mapping[str, str], threads: int, huge_page_size: Path = HUGE_PAGE_SIZE
) -> dict[str, str]:
    """What a process that runs an engine must find in its environment before it starts.

    Weights packed by the engine are read once per token, so huge pages matter.  glibc asks for them in its
    heap, but gives each array of more than 128 KB a mapping of its own, too small for a huge page: such arrays go to the heap, too
    (up to 32 MB, the most it allows).  SmolLM2 decodes 20 % faster so.  A freed end of the heap above that size goes back at once.

    The size of a huge page follows that of a page: 2 MiB on most machines, but 32 or 512 MiB where pages have 16 or 64 KiB
    (aarch64), and one touched byte commits a whole one.  Such large ones are not asked for.  Who sets tunables has the last word.
    """
    asked = [f"mmap_threshold={_HEAP_BYTES}", f"trim_threshold={_HEAP_BYTES}"]
    if _huge_pages_are_small(huge_page_size):
        asked.insert(0, "hugetlb=1")
    tunables = [*(f"glibc.malloc.{setting}" for setting in asked), inherited.get("GLIBC_TUNABLES", "")]
    return {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": ":".join(filter(None, tunables))}


def _huge_pages_are_small(size_file: Path) -> bool:
    try:
        return int(size_file.read_text()) <= _HUGE_PAGE_AT_MOST_BYTES
    except (OSError, ValueError):
        return False  # a kernel without huge pages, or one that does not say how large they are


WORKER, RELAY = "shoal.node.worker", "shoal.node.relay"


async def launch(spec: WorkerSpec, module: str = WORKER) -> WorkerProcess:
    """Start the worker of *spec*; its log goes to our standard error."""
    process = await anyio.open_process(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=None,
        stderr=None,
        env={**os.environ, **engine_environment(os.environ, spec.threads)},
        start_new_session=True,  # Ctrl-C at the terminal is the agent's to handle
    )
    worker = WorkerProcess(process)
    await worker.tell(spec)
    return worker
