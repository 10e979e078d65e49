"""Start a worker as a process of its own (ADR 6): its exit gives all of its memory back."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

import anyio
import anyio.abc
import msgspec

from shoal.node.worker_spec import WorkerSpec

_STOP_S = 3.0
_HEAP_BYTES = 32 * 2**20


class WorkerProcess:
    """A worker process of ours; it ends when its standard input closes, so it never outlives its agent."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def wait(self) -> str:
        """Wait for its end; the reason in words."""
        code = await self._process.wait()
        if code < 0:
            return f"worker {self.pid} was ended by {signal.Signals(-code).name}"
        return f"worker {self.pid} ended with exit code {code}"

    async def stop(self) -> None:
        """Close its input; kill it when it does not end by itself."""
        if self._process.stdin is not None:
            await self._process.stdin.aclose()
        with anyio.move_on_after(_STOP_S):
            await self._process.wait()
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def engine_environment(inherited: Mapping[str, str], threads: int) -> dict[str, str]:
    """What a process that runs an engine must find in its environment before it starts.

    Weights packed by the engine are read once per token, so huge pages matter.  glibc asks for them in its
    heap, but gives each array of more than 128 KB a mapping of its own, too small for a huge page: such arrays go to the heap, too
    (up to 32 MB, the most it allows).  SmolLM2 decodes 20 % faster so.  A freed end of the heap above that size goes back at once.
    """
    asked = ("hugetlb=1", f"mmap_threshold={_HEAP_BYTES}", f"trim_threshold={_HEAP_BYTES}")
    tunables = [inherited.get("GLIBC_TUNABLES", ""), *(f"glibc.malloc.{setting}" for setting in asked)]
    return {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": ":".join(filter(None, tunables))}


async def launch(spec: WorkerSpec, module: str = "shoal.node.worker") -> WorkerProcess:
    """Start the worker of *spec*; its log goes to our standard error."""
    process = await anyio.open_process(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=None,
        stderr=None,
        env={**os.environ, **engine_environment(os.environ, spec.threads)},
        start_new_session=True,  # Ctrl-C at the terminal is the agent's to handle
    )
    assert process.stdin is not None
    await process.stdin.send(msgspec.json.encode(spec) + b"\n")
    return WorkerProcess(process)
