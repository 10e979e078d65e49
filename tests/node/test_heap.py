"""Memory that was freed goes back to the system when asked to, even from the midst of a heap."""

import ctypes
import gc
import sys
from pathlib import Path

import pytest

from shoal.node.heap import give_back_memory

_BLOCK_BYTES, _BLOCKS = 2000, 20_000


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells private memory under /proc")
def test_what_was_freed_below_a_block_in_use_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    # Given a heap of which all but the last block was freed, so that the allocator keeps it
    blocks = [libc.malloc(_BLOCK_BYTES) for _ in range(_BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, _BLOCK_BYTES)
    for block in blocks[:-1]:
        libc.free(block)
    gc.collect()
    held = _private_bytes()
    # When it is asked to give back
    gave = give_back_memory()
    # Then most of it is gone from the process
    assert gave
    assert held - _private_bytes() > _BLOCK_BYTES * _BLOCKS / 2
    libc.free(blocks[-1])
