"""Memory that was freed goes back to the system.

Reading a tokenizer of 49,000 entries takes about 40 MB for a moment, on whichever thread has time for it; glibc gives every
thread a heap of its own and keeps there what was freed, for later.  A node that serves and unloads models again and again grows
by that much for each thread, though it holds nothing: 133 MB after the first unloading of SmolLM2, 236 MB after the fourth.
Asked to (malloc_trim(3)), glibc hands back whole pages from the midst of its heaps: 90 MB, and 114 MB after twenty.
"""

import ctypes
import sys


def give_back_memory() -> bool:
    """Hand freed pages of every heap back to the system; False where the allocator cannot.  Takes milliseconds: for a thread."""
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and needs none
    return trim is not None and bool(trim(0))
