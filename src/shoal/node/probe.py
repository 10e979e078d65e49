"""Measure the links from this node: payloads of several sizes there, a short acknowledgement back.

A round trip of the smallest is credited half to each way; no two clocks are compared (ADR 4).
"""

from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread

from shoal.clock import Clock
from shoal.errors import NodeUnreachableError
from shoal.ids import NodeId
from shoal.profile.fleet import LinkProfile
from shoal.profile.link import PROBE_BYTES, LinkSample, link_profile
from shoal.transport.bus import Bus, Closable
from shoal.transport.keys import ProbeTopic, key_of, pattern_of

_SMALL_COUNT = 15
_LARGE_COUNT = 3
_TIMEOUT_S = 5.0
_BUDGET_S = 4.0


def answer_echoes(bus: Bus, fleet: str, me: NodeId) -> Closable:
    """Acknowledge every probe that reaches this node."""
    return bus.answer(pattern_of(ProbeTopic, fleet=fleet, target=me), lambda _: b"ok")


async def measure_links(
    bus: Bus, fleet: str, me: NodeId, targets: Sequence[NodeId], clock: Clock
) -> tuple[LinkProfile, ...]:
    """Links to *targets*, one after another so that they do not disturb each other; an unreachable one is left out."""
    found = []
    for target in targets:
        try:
            samples = await anyio.to_thread.run_sync(partial(_echo, bus, fleet, (me, target), clock))
        except NodeUnreachableError:
            continue
        found.append(link_profile(me, target, samples))
    return tuple(found)


def _echo(bus: Bus, fleet: str, link: tuple[NodeId, NodeId], clock: Clock) -> list[LinkSample]:
    key = key_of(ProbeTopic(fleet=fleet, source=link[0], target=link[1]))
    samples: list[LinkSample] = []
    began_s = clock.now_s()
    small, *large = PROBE_BYTES
    for size_bytes in (*([small] * _SMALL_COUNT), *(large * _LARGE_COUNT)):
        sent_s = clock.now_s()
        if samples and sent_s - began_s > _BUDGET_S and size_bytes <= samples[-1].payload_bytes:
            continue  # a slow link: one sample of each size must do
        bus.query(key, bytes(size_bytes), timeout_s=_TIMEOUT_S)
        samples.append(LinkSample(payload_bytes=size_bytes, round_trip_s=clock.now_s() - sent_s))
    return samples
