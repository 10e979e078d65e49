"""Delay in user space: a process that carries frames between two TAP devices, each in a network namespace of its own.

For kernels without netem.  What it holds back is decided by `Line`, which knows no clock.  Rates are not its business: `tbf` on
the devices does that.  `python -m bench.links.wire` runs until its standard input ends, so it never outlives who started it.
"""

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CLONE_NEWNET = 0x40000000
READY = "ready"
_PR_SET_TIMERSLACK = 29
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME_BYTES = 1 << 16
_MOST_HELD = 20_000
"""Frames; what comes on top is dropped, as by a router without memory."""


@dataclass(slots=True)
class Line:
    """One direction: frames leave in the order in which they came, each *delay_s* after that."""

    delay_s: float
    held: deque[tuple[float, bytes]] = field(default_factory=deque)
    dropped: int = 0

    def push(self, now_s: float, frame: bytes) -> None:
        if len(self.held) >= _MOST_HELD:
            self.dropped += 1
        else:
            self.held.append((now_s + self.delay_s, frame))

    def due(self, now_s: float) -> list[bytes]:
        """What may leave by now."""
        found: list[bytes] = []
        while self.held and self.held[0][0] <= now_s:
            found.append(self.held.popleft()[1])
        return found

    def next_s(self) -> float | None:
        """When the next frame may leave."""
        return self.held[0][0] if self.held else None


def namespace_path(name: str) -> Path:
    """Where iproute2 keeps a namespace."""
    return Path("/run/netns") / name


def enter(descriptor: int) -> None:
    """Put the calling thread into a network namespace; `os.setns` is only there from Python 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@contextmanager
def within(namespace: Path) -> Iterator[None]:
    """Have the calling thread in *namespace*: its new sockets, and processes that it starts."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        inside = os.open(namespace, os.O_RDONLY)
        try:
            enter(inside)
        finally:
            os.close(inside)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)


def carry(ends: tuple[int, int], delay_s: float, until: int) -> None:
    """Pass frames between two descriptors until *until* is readable."""
    lines = {ends[0]: Line(delay_s), ends[1]: Line(delay_s)}
    onward = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        coming = [due_s for line in lines.values() if (due_s := line.next_s()) is not None]
        wait_s = max(0.0, min(coming) - time.monotonic()) if coming else None
        # Not epoll: it counts in milliseconds.
        readable, _, _ = select.select((*ends, until), (), (), wait_s)
        if until in readable:
            return
        for end in readable:
            lines[end].push(time.monotonic(), os.read(end, _FRAME_BYTES))
        for end, line in lines.items():
            for frame in line.due(time.monotonic()):
                with suppress(OSError):  # a device that is down takes nothing
                    os.write(onward[end], frame)


def _tap(namespace: str, device: str) -> int:
    with within(namespace_path(namespace)):
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TAP_WITHOUT_HEADER))
    return descriptor


def main() -> None:
    near, near_device, far, far_device, delay_s = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    ends = (_tap(near, near_device), _tap(far, far_device))
    print(READY, flush=True)
    carry(ends, float(delay_s), sys.stdin.fileno())


if __name__ == "__main__":
    main()
