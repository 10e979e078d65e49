"""Links of a fleet by kind of network; see `bench.planner.instances` for what each kind stands for."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

MBIT = 1e6 / 8
"""Bytes per second of one Mbit/s."""
_SITE = 6
"""Devices of a site, about."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Uniform draws named by what they are for."""

    key: tuple[str, ...]

    def unit(self, *what: object) -> float:
        """In [0, 1)."""
        text = "|".join((*self.key, *(str(part) for part in what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64

    def between(self, low: float, high: float, *what: object) -> float:
        return low + (high - low) * self.unit(*what)

    def spread(self, low: float, high: float, *what: object) -> float:
        """Log-uniform."""
        return float(low * (high / low) ** self.unit(*what))

    def below(self, count: int, *what: object) -> int:
        return int(self.unit(*what) * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One direction between two devices by index."""

    source: int
    target: int
    latency_s: float
    bytes_per_s: float
    medium: str = ""


def lines(network: str, devices: int, draws: Draws) -> Iterator[Line]:
    """Both directions between every two devices."""
    kinds = {"star": _star, "clusters": _clusters, "mesh": _mesh, "trace": _trace}
    between = kinds[network](devices, draws)
    for source in range(devices):
        for target in range(devices):
            if source != target:
                yield _rounded(between(source, target))


def _rounded(line: Line) -> Line:
    """To whole bytes per second and 0.1 us: logarithms differ in their last bit from machine to machine."""
    return replace(line, latency_s=round(line.latency_s, 7), bytes_per_s=float(round(line.bytes_per_s)))


Between = Callable[[int, int], Line]


def _star(devices: int, draws: Draws) -> Between:
    """Two of five access lines are wired, two wireless, one is wide-area."""
    latency_s, up, down = [], [], []
    for index in range(devices):
        kind = draws.below(5, "access", index)
        low, high = ((0.0001, 0.0003), (0.001, 0.005), (0.008, 0.040))[(0, 0, 1, 1, 2)[kind]]
        rates = (((1000, 1000), (1000, 1000)), ((30, 200), (50, 300)), ((5, 50), (20, 200)))[(0, 0, 1, 1, 2)[kind]]
        latency_s.append(draws.between(low, high, "access latency", index))
        up.append(draws.spread(*rates[0], "up", index) * MBIT)
        down.append(draws.spread(*rates[1], "down", index) * MBIT)

    def between(a: int, b: int) -> Line:
        return Line(source=a, target=b, latency_s=latency_s[a] + latency_s[b], bytes_per_s=min(up[a], down[b]))

    return between


def _clusters(_: int, draws: Draws) -> Between:
    def between(a: int, b: int) -> Line:
        if a // _SITE == b // _SITE:
            return Line(source=a, target=b, latency_s=0.0002, bytes_per_s=1000 * MBIT)
        sites = sorted((a // _SITE, b // _SITE))
        return Line(
            source=a,
            target=b,
            latency_s=draws.between(0.005, 0.040, "between sites", *sites),
            bytes_per_s=draws.spread(10, 200, "rate between sites", *sites) * MBIT,
        )

    return between


def _mesh(_: int, draws: Draws) -> Between:
    def between(a: int, b: int) -> Line:
        return Line(
            source=a,
            target=b,
            latency_s=draws.between(0.001, 0.030, "latency", a, b),
            bytes_per_s=draws.spread(1, 1000, "rate", a, b) * MBIT,
        )

    return between


_WIDE = ((0.010, 250.0), (0.050, 100.0), (0.010, 1000.0), (0.002, 250.0))
"""Published wide-area figures: latency one way (half the round trip), Mbit/s."""
_CLOUD = (1.0, 5.0, 10.0, 25.0, 50.0)
"""Mbit/s of EdgeShard's sweep of the line from the source to the cloud."""


def _trace(devices: int, draws: Draws) -> Between:
    """Sites with wired and wireless devices; from three devices on, the last is a cloud of its own."""
    wireless = [draws.below(2, "wireless", index) == 1 for index in range(devices)]
    cloud = devices - 1 if devices > 2 else -1

    def between(a: int, b: int) -> Line:
        pair = sorted((a, b))
        if cloud in pair:
            rate = _CLOUD[draws.below(len(_CLOUD), "cloud", pair[0] // _SITE)]
            return Line(source=a, target=b, latency_s=0.010, bytes_per_s=rate * MBIT)
        if a // _SITE != b // _SITE:
            sites = sorted((a // _SITE, b // _SITE))
            latency_s, rate = _WIDE[draws.below(len(_WIDE), "wide", *sites)]
            return Line(source=a, target=b, latency_s=latency_s, bytes_per_s=rate * MBIT)
        if wireless[a] or wireless[b]:
            rate = draws.between(40, 60, "wireless", *pair)
            air = f"channel {a // _SITE}"
            return Line(source=a, target=b, latency_s=0.003, bytes_per_s=rate * MBIT, medium=air)
        return Line(source=a, target=b, latency_s=0.0002, bytes_per_s=1000 * MBIT)

    return between
