"""Measure the links from this node: payloads of several sizes there, a short acknowledgement back.

What is measured must be the way that frames take.  A stage's data session dials the next node directly (ADR 3), while a query
of the agents may be passed on by a third one: a node that dialled only the first of the fleet reaches all others through it.
So each link is measured over a session of its own, dialled to the target's agent and closed afterwards.  A target that cannot
be dialled is left out, even where the agents reach it: no data session could carry a plan's frames to it.

A round trip of the smallest payload is credited half to each way; no two clocks are compared (ADR 4).
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import anyio
import anyio.to_thread

from shoal.clock import Clock
from shoal.errors import NodeUnreachableError, SettingsError
from shoal.ids import NodeId
from shoal.node.messages import ProbeTarget
from shoal.profile.fleet import LinkProfile
from shoal.profile.link import PROBE_BYTES, LinkSample, link_profile
from shoal.transport.bus import Bus, Closable
from shoal.transport.keys import ProbeTopic, key_of, pattern_of

Dial = Callable[[str, str], Bus]
"""A direct session to the agent at a locator, whose session has that id; raises NodeUnreachableError or SettingsError."""

_SMALL_COUNTS = (15, 200)
"""Fewest and most round trips: a 99th percentile of fewer than 100 is little else than the longest."""
_LARGE_COUNTS = (3, 9)
_ENOUGH_S = 0.5
"""After this, the fewest of a size will do."""
_PATIENCE_S = 2.0
"""After this, even fewer: one, on the slowest links."""
_TIMEOUT_S = 5.0
_DIAL_BUDGET_S = 8.0
"""A locator that swallows what is sent there costs the whole timeout of one dial."""


def answer_echoes(bus: Bus, fleet: str, me: NodeId) -> Closable:
    """Acknowledge every probe that reaches this node."""
    return bus.answer(pattern_of(ProbeTopic, fleet=fleet, target=me), lambda _: b"ok")


async def measure_links(
    dial: Dial, fleet: str, me: NodeId, targets: Sequence[ProbeTarget], clock: Clock
) -> tuple[LinkProfile, ...]:
    """Links to *targets*, one after another so that they do not disturb each other; one that cannot be dialled is left out."""
    found = []
    for target in targets:
        key = key_of(ProbeTopic(fleet=fleet, source=me, target=target.node))
        began_s = clock.now_s()
        try:
            samples = await anyio.to_thread.run_sync(partial(_measure, dial, target, key, clock))
        except NodeUnreachableError:
            continue
        found.append(link_profile(me, target.node, samples, probe_s=clock.now_s() - began_s))
    return tuple(found)


def _measure(dial: Dial, target: ProbeTarget, key: str, clock: Clock) -> list[LinkSample]:
    with closing(_dialled(dial, target, clock)) as bus:
        return round_trips(partial(bus.query, key, timeout_s=_TIMEOUT_S), clock)


def _dialled(dial: Dial, target: ProbeTarget, clock: Clock) -> Bus:
    """A session to the first locator of *target* where it answers itself."""
    began_s = clock.now_s()
    for locator in target.locators:
        if clock.now_s() - began_s > _DIAL_BUDGET_S:
            break
        try:
            return dial(locator, target.zid)
        except (NodeUnreachableError, SettingsError):  # a locator that cannot be read is of a newer version
            continue
    raise NodeUnreachableError(
        f"node {target.node} answers at none of {', '.join(target.locators) or 'no locators'}",
        hint="let it listen at an address that the others reach, and open its ports to them",
    )


def round_trips(ask: Callable[[bytes], object], clock: Clock) -> list[LinkSample]:
    """Time *ask* for payloads of each size: seconds in all, a tenth of one on a fast link.

    Raises NodeUnreachableError; not for the largest payload, which a very slow link does not carry in time.
    """
    small, *large = PROBE_BYTES
    ask(bytes(small))  # the first one opens the way and is not counted
    samples = _timed(ask, clock, small, _SMALL_COUNTS)
    for size_bytes in large:
        try:
            samples += _timed(ask, clock, size_bytes, _LARGE_COUNTS)
        except NodeUnreachableError:
            if size_bytes == large[0]:
                raise
    return samples


def _timed(ask: Callable[[bytes], object], clock: Clock, size_bytes: int, counts: tuple[int, int]) -> list[LinkSample]:
    least, most = counts
    payload = bytes(size_bytes)
    samples: list[LinkSample] = []
    began_s = sent_s = clock.now_s()
    while len(samples) < most and sent_s - began_s < (_ENOUGH_S if len(samples) >= least else _PATIENCE_S):
        ask(payload)
        back_s = clock.now_s()
        samples.append(LinkSample(payload_bytes=size_bytes, round_trip_s=back_s - sent_s))
        sent_s = back_s
    return samples
