"""What a network really does: its round trip, and the rate of one TCP connection."""

import socket
import statistics
import threading
import time

from bench.links.network import Host
from bench.measure import Values

_PORT = 7999
_PINGS = 15
_CHUNK = b"\0" * (64 << 10)
_LIMIT_S = 20.0
_RATE_S = 3.0
"""How long bytes are sent for; the first third, in which a connection learns its rate, is not counted."""


def sounded(source: Host, target: Host, *, for_s: float = _RATE_S) -> Values:
    """Between two hosts: the median round trip in milliseconds, and Mbit/s from the first to the second."""
    with target.inside():
        listener = socket.create_server((target.address, _PORT))
    heard: list[tuple[float, int]] = []
    thread = threading.Thread(target=_answer, args=(listener, heard))
    thread.start()
    try:
        with source.inside(), socket.create_connection((target.address, _PORT), timeout=_LIMIT_S) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips_s = [_round_trip_s(line) for _ in range(_PINGS)]
            began_s = time.monotonic()
            line.sendall(b"!")
            while time.monotonic() - began_s < for_s:
                line.sendall(_CHUNK)
    finally:
        listener.close()
        thread.join(_LIMIT_S)
    from_s = heard[0][0] + for_s / 3
    counted = [(at_s, size) for at_s, size in heard if from_s <= at_s <= heard[0][0] + for_s]
    rate = sum(size for _, size in counted[1:]) / (counted[-1][0] - counted[0][0]) if len(counted) > 1 else 0.0
    return {"rtt_ms": round(statistics.median(trips_s) * 1000, 2), "mbit_per_s": round(rate * 8 / 1e6, 1)}


def _round_trip_s(line: socket.socket) -> float:
    began_s = time.monotonic()
    line.sendall(b"?")
    line.recv(1)
    return time.monotonic() - began_s


def _answer(listener: socket.socket, heard: list[tuple[float, int]]) -> None:
    """Return each `?`; after a `!` only count."""
    listener.settimeout(_LIMIT_S)
    try:
        line, _ = listener.accept()
    except OSError:
        return
    with line:
        line.settimeout(_LIMIT_S)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (got := line.recv(1)) == b"?":
            line.sendall(got)
        while got:
            got = line.recv(1 << 18)
            heard.append((time.monotonic(), len(got)))
