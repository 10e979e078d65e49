"""From timed round trips to a link's latency and bandwidth, and which links are worth timing.

Decode is ruled by the round trip of small frames, prefill and loading by bandwidth: both are taken from the same
samples.  Bandwidth is the slope of time over payload, by the weighted median of slopes between pairs of sizes
(Theil-Sen), so that stray samples move neither figure. The payload goes one way and a few bytes come back: the slope
belongs to one direction.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import combinations
from statistics import median

import msgspec

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.profile.fleet import LinkProfile

PROBE_BYTES = (64, 16_384, 262_144)
"""Payload sizes that the probing shell sends: a decode frame and two that show the bandwidth of slow and fast links."""


class LinkSample(msgspec.Struct, frozen=True, kw_only=True):
    """One probe: *payload_bytes* there, a short acknowledgement back."""

    payload_bytes: int
    round_trip_s: float


def link_profile(source: NodeId, target: NodeId, samples: Sequence[LinkSample], *, probe_s: float = 0.0) -> LinkProfile:
    """Profile one direction; raises InvalidRequestError without at least one sample."""
    if not samples:
        raise InvalidRequestError(
            f"no probe from {source} to {target} came back", hint="is the link up? probe it again"
        )
    by_size: defaultdict[int, list[float]] = defaultdict(list)
    for sample in samples:
        by_size[sample.payload_bytes].append(sample.round_trip_s)
    small = sorted(by_size[min(by_size)])
    rtt_p50_s = median(small)
    return LinkProfile(
        source=source,
        target=target,
        rtt_p50_s=rtt_p50_s,
        rtt_p99_s=_quantile(small, 0.99),
        bytes_per_s=_bytes_per_s({size: median(times) for size, times in by_size.items()}),
        jitter_s=median(abs(time_s - rtt_p50_s) for time_s in small),
        round_trips=len(small),
        probe_s=probe_s,
    )


def probe_pairs(
    nodes: Sequence[NodeId], source: NodeId, k: int, regions: Mapping[NodeId, str] | None = None
) -> tuple[tuple[NodeId, NodeId], ...]:
    """Directed pairs to probe: all with the source, and for each node *k* neighbours on a ring, both ways.

    The ring is ordered by region, then by a hash of the name: neighbours are mostly of one site, everybody is reached,
    and the choice stays the same while nodes come and go.  About 2 * n * (k + 1) pairs instead of n * (n - 1).
    """
    known = regions or {}
    ring = sorted({*nodes} - {source}, key=lambda node: (known.get(node, ""), _spread(node)))
    near = {
        frozenset((node, ring[(index + step) % len(ring)]))
        for index, node in enumerate(ring)
        for step in range(1, k + 1)
    }
    pairs = {pair for pair in near if len(pair) == 2} | {frozenset((source, node)) for node in ring}
    both = (tuple(pair) for pair in pairs)
    return tuple(sorted((a, b) for one, two in both for a, b in ((one, two), (two, one))))


def _bytes_per_s(medians: Mapping[int, float]) -> float:
    """Bytes per second from the median time of each size; what the largest payload reached when times do not rise with size."""
    slopes = sorted(
        ((medians[large] - medians[small]) / (large - small), large - small)
        for small, large in combinations(sorted(medians), 2)
    )
    slope = _weighted_median(slopes) if slopes else 0.0
    if slope > 0:
        return 1 / slope
    largest = max(medians)
    return max(1.0, largest / max(medians[largest], 1e-9))


def _weighted_median(weighted: Sequence[tuple[float, int]]) -> float:
    half = sum(weight for _, weight in weighted) / 2
    passed = 0.0
    for value, weight in weighted:
        passed += weight
        if passed >= half:
            return value
    return weighted[-1][0]


def _quantile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _spread(node: NodeId) -> bytes:
    return blake2b(node.encode(), digest_size=8).digest()
