"""The grid: one cell in the middle, one factor changed at a time, and eight corners."""

import itertools
from dataclasses import dataclass, replace

from bench.links.network import Link

TOKENS = 128
"""Of each answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One network, and what is asked on it."""

    rtt_ms: int = 20
    mbit: int = 50
    nodes: int = 2
    streams: int = 1
    prompt: int = 32

    @property
    def name(self) -> str:
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{self.rtt_ms} ms, {self.mbit} Mbit/s, {self.nodes} nodes, {streams}, prompt {self.prompt}"

    @property
    def link(self) -> Link:
        return Link(rtt_s=self.rtt_ms / 1000, bits_per_s=self.mbit * 1e6)


BASE = Setting()
CROWD = replace(BASE, streams=8)
FAR_CROWD = replace(CROWD, rtt_ms=100)
RTTS_MS = (0, 5, 20, 50, 100)
RATES_MBIT = (10, 50, 1000)
CORNERS = tuple(
    replace(BASE, rtt_ms=rtt_ms, mbit=mbit, streams=streams)
    for rtt_ms, mbit, streams in itertools.product((5, 100), (10, 1000), (1, 8))
)


def grid() -> list[Setting]:
    """Every setting once; those that goals are judged by come first."""
    factors = [
        *(replace(BASE, rtt_ms=rtt_ms) for rtt_ms in RTTS_MS),
        *(replace(BASE, mbit=mbit) for mbit in RATES_MBIT),
        replace(BASE, nodes=3),
        replace(BASE, prompt=512),
    ]
    return list(dict.fromkeys([BASE, CROWD, FAR_CROWD, *factors, *CORNERS]))
