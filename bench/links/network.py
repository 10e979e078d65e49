"""Hosts that are network namespaces: each has a core, an address, and a link to the switch with a rate and a delay.

A path between two hosts leads over two links: each holds back a quarter of the round trip in each direction, and each has
the rate in both directions (`tbf`).  The delay is netem's where the kernel has it, else `bench.links.wire` carries the frames.
What the network really does is measured before anything else runs on it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.links.wire import READY, namespace_path, within
from bench.measure import ROOT, SkippedError, ended

PREFIX = "shoalbench"
_NETWORK = "10.78.0"
_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}
_TUN = "/dev/net/tun"
_QUEUE_S = 0.1
"""What a link buffers before it drops, in seconds of its rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A path between any two hosts."""

    rtt_s: float
    bits_per_s: float

    @property
    def burst_bytes(self) -> int:
        """A millisecond, and at least two packets: small enough that an activation takes its time on the wire."""
        return max(3200, round(self.bits_per_s / 8 / 1000))

    @property
    def queue_bytes(self) -> int:
        return max(64 << 10, round(self.bits_per_s / 8 * _QUEUE_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine of the network."""

    namespace: str
    address: str
    cores: tuple[int, ...]

    @contextmanager
    def inside(self, *, pinned: bool = False) -> Iterator[None]:
        """Have the calling thread here, with its new sockets and the processes that it starts; *pinned*: on the host's cores."""
        before = os.sched_getaffinity(0)
        with within(namespace_path(self.namespace)):
            try:
                if pinned:
                    os.sched_setaffinity(0, self.cores)
                yield
            finally:
                os.sched_setaffinity(0, before)

    def sent_bytes(self) -> int:
        """What has left through the network card so far, headers included."""
        with self.inside():
            return transmitted_bytes(Path("/proc/thread-self/net/dev").read_text(), "eth0")


def transmitted_bytes(table: str, device: str) -> int:
    """Bytes sent by *device* in the kernel's table of `/proc/net/dev`."""
    line = next(line for line in table.splitlines() if line.strip().startswith(f"{device}:"))
    return int(line.split(":", 1)[1].split()[8])


def cores_of(hosts: int, cores: Sequence[int]) -> list[tuple[int, ...]]:
    """One core for each host; the cores are shared where there are fewer."""
    return [(cores[host % len(cores)],) for host in range(hosts)]


def missing() -> str:
    """What a network of namespaces needs and is not here; empty: nothing."""
    lacking = [f"`{tool}` (iproute2)" for tool in ("ip", "tc") if shutil.which(tool) is None]
    lacking += [name for bit, name in _CAPABILITIES.items() if not _capabilities() >> bit & 1]
    return (
        f"{', '.join(lacking)} missing: needs Linux, iproute2, and root or a namespace (see bench/README.md)"
        if lacking
        else ""
    )


def _capabilities() -> int:
    with suppress(OSError):
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1], 16) if found else 0
    return 0


@contextmanager
def network(hosts: int, link: Link) -> Iterator[list[Host]]:
    """Hosts that reach each other over *link*; nothing of it stays behind.  Raises SkippedError where it cannot be made."""
    lacking = missing()
    if lacking:
        raise SkippedError(lacking)
    remove_stale()
    own = f"{PREFIX}-{os.getpid()}"
    cores = cores_of(hosts, sorted(os.sched_getaffinity(0)))
    made = [Host(namespace=f"{own}-h{n}", address=f"{_NETWORK}.{n + 1}", cores=cores[n]) for n in range(hosts)]
    switch = f"{own}-sw"
    with ExitStack() as stack:
        for name in (switch, *(host.namespace for host in made)):
            _ip("netns", "add", name)
            stack.callback(remove, name)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        netem = link.rtt_s > 0 and has_netem(switch)
        for number, host in enumerate(made):
            stack.enter_context(_attached(host, switch, f"p{number}", link, netem=netem))
        yield made


@contextmanager
def _attached(host: Host, switch: str, port: str, link: Link, *, netem: bool) -> Iterator[None]:
    """A cable between a host and the switch."""
    delay_s = link.rtt_s / 4
    with ExitStack() as stack:
        if link.rtt_s > 0 and not netem:
            stack.enter_context(_wire(host.namespace, switch, port, delay_s))
        else:
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for namespace, device in ((host.namespace, "eth0"), (switch, port)):
            for arguments in shaping(device, link, delay_s if netem else 0.0):
                _run("tc", "-n", namespace, *arguments)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")
        _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        yield


def shaping(device: str, link: Link, netem_delay_s: float) -> list[list[str]]:
    """What `tc` is told about one end of a cable."""
    rate = ["rate", f"{round(link.bits_per_s)}bit", "burst", f"{link.burst_bytes}b", "limit", f"{link.queue_bytes}b"]
    if not netem_delay_s:
        return [["qdisc", "add", "dev", device, "root", "tbf", *rate]]
    delay = ["delay", f"{round(netem_delay_s * 1_000_000)}us", "limit", "20000"]
    return [
        ["qdisc", "add", "dev", device, "root", "handle", "1:", "netem", *delay],
        ["qdisc", "add", "dev", device, "parent", "1:1", "handle", "10:", "tbf", *rate],
    ]


@contextmanager
def _wire(namespace: str, switch: str, port: str, delay_s: float) -> Iterator[None]:
    if not os.access(_TUN, os.R_OK | os.W_OK):
        raise SkippedError(f"the kernel has no netem, and {_TUN} cannot be opened")
    command = [sys.executable, "-m", "bench.links.wire", namespace, "eth0", switch, port, f"{delay_s:.9f}"]
    with (
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process,
        ended(process),
    ):
        assert process.stdout is not None
        if process.stdout.readline().strip() != READY:
            raise SkippedError(f"the wire of {namespace} did not start (code {process.wait(5)})")
        yield


def has_netem(namespace: str) -> bool:
    """Whether the kernel delays by itself, tried on the loopback of a namespace of ours."""
    tried = subprocess.run(
        ["tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem"], capture_output=True, check=False
    )
    return tried.returncode == 0


def remove(namespace: str) -> None:
    """End what still runs in a namespace of ours, then take it away."""
    for attempt in (signal.SIGTERM, signal.SIGKILL):
        inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
        pids = [int(text) for text in inside.stdout.split()]
        for pid in pids:
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, attempt)
        if pids:
            time.sleep(0.5)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def remove_stale() -> None:
    """Take away what earlier runs left that were killed; a run that is still there keeps its own."""
    folder = namespace_path("")
    for name in stale(sorted(path.name for path in folder.iterdir()) if folder.exists() else []):
        remove(name)


def stale(names: Sequence[str]) -> list[str]:
    """Namespaces of ours whose process is gone."""
    found = [(name, re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name)) for name in names]
    return [name for name, match in found if match and not Path(f"/proc/{match[1]}").exists()]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"`{' '.join(command)}`: {done.stderr.strip()}")
