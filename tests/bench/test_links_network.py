"""The network that `bench/links` measures on: how long it holds frames back, and that nothing of it stays behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.links.network import Link, cores_of, missing, network, shaping, stale, transmitted_bytes
from bench.links.sounding import sounded
from bench.links.wire import Line, namespace_path

LINK = Link(rtt_s=0.02, bits_per_s=50e6)
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount")


def _user_namespaces() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "tc", "unshare"))
    return tools and subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


privileged = pytest.mark.skipif(bool(missing()), reason=f"a network of namespaces {missing()}")


def test_a_frame_leaves_after_the_delay_and_in_its_order() -> None:
    line = Line(delay_s=5.0)
    line.push(0.0, b"a")
    line.push(1.0, b"b")

    assert line.due(4.9) == []
    assert line.next_s() == 5.0
    assert line.due(5.5) == [b"a"]
    assert line.due(9.0) == [b"b"]
    assert line.next_s() is None


def test_a_rate_is_held_with_bursts_of_a_millisecond_and_a_queue_of_a_tenth_of_a_second() -> None:
    (arguments,) = shaping("eth0", LINK, 0.0)

    assert arguments[5:] == ["tbf", "rate", "50000000bit", "burst", "6250b", "limit", "625000b"]


def test_netem_delays_before_the_rate_is_held() -> None:
    delay, rate = shaping("eth0", LINK, 0.005)

    assert delay[6:10] == ["1:", "netem", "delay", "5000us"]
    assert rate[4:9] == ["parent", "1:1", "handle", "10:", "tbf"]


def test_hosts_share_cores_only_where_there_are_fewer() -> None:
    assert cores_of(2, [0, 1, 2]) == [(0,), (1,)]
    assert cores_of(3, [4, 6]) == [(4,), (6,), (4,)]


def test_sent_bytes_are_those_of_the_card() -> None:
    table = "Inter-| Receive | Transmit\n    lo: 1 0 0 0 0 0 0 0 1 0\n  eth0: 500 5 0 0 0 0 0 0 777 7 0 0 0 0 0 0\n"

    assert transmitted_bytes(table, "eth0") == 777


def test_only_namespaces_of_ended_runs_are_stale() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    names = [f"shoalbench-{os.getpid()}-h0", f"shoalbench-{ended.pid}-sw", "shoalbench-x-h0", f"other-{ended.pid}-h0"]

    assert stale(names) == [f"shoalbench-{ended.pid}-sw"]


@pytest.mark.skipif(not _user_namespaces(), reason="no iproute2, or no user namespaces here")
def test_a_user_namespace_does_instead_of_root() -> None:
    script = (
        "from bench.links.network import Link, network\n"
        "with network(2, Link(rtt_s=0.0, bits_per_s=1e9)) as hosts: print([host.address for host in hosts])"
    )
    command = f"mount -t tmpfs none /run && exec {sys.executable} -c '{script}'"

    done = subprocess.run([*UNSHARE, "sh", "-c", command], capture_output=True, text=True, check=False)

    assert done.stdout.strip() == "['10.78.0.1', '10.78.0.2']", done.stderr


@privileged
def test_a_path_has_its_round_trip_and_its_rate() -> None:
    with network(2, LINK) as (first, second):
        said = sounded(first, second, for_s=0.6)
        sent = second.sent_bytes()

    assert said["rtt_ms"] >= 20.0
    assert 0.0 < said["mbit_per_s"] < 52.0
    assert sent > 0


@privileged
def test_nothing_of_a_network_stays_behind_when_its_block_fails() -> None:
    before = Path("/proc/thread-self/ns/net").readlink(), os.sched_getaffinity(0)
    seen: list[Path] = []
    left: list[subprocess.Popen[bytes]] = []

    def fail() -> None:
        with network(2, LINK) as hosts, hosts[1].inside(pinned=True):
            seen.extend(namespace_path(host.namespace) for host in hosts)
            left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert not any(path.exists() for path in seen)
    assert left[0].wait(5) != 0
    assert (Path("/proc/thread-self/ns/net").readlink(), os.sched_getaffinity(0)) == before
