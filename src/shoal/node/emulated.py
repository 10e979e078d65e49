"""Sessions of an agent over emulated links: as an unequal network would carry them, on one machine (demos, rehearsals)."""

from shoal.clock import SystemClock
from shoal.ids import Digest, NodeId
from shoal.node.options import NodeOptions
from shoal.transport.bus import Bus
from shoal.transport.keys import ChunkTopic, ControlTopic, ProbeTopic, key_of
from shoal.transport.shaped import Link, ShapedBus, Way
from shoal.transport.zenoh import open_control


def dial_agent(options: NodeOptions, me: NodeId, locator: str, zid: str) -> Bus:
    """A session of its own to the agent *zid*, with the emulated links that the agent's bus and workers have too."""
    return shaped_agent(open_control(locator, zid=zid), options, me)


def shaped_agent(bus: Bus, options: NodeOptions, me: NodeId) -> Bus:
    """The agent's bus as over the emulated links: what is addressed to a node travels on the link to it."""
    if not options.links:
        return bus
    links: dict[str, Link] = {}
    for shape in options.links:
        way = Way(latency_s=shape.latency_s, bytes_per_s=shape.bytes_per_s)
        link = Link(out=way, back=way)
        fleet, node = options.fleet, shape.target
        for key in (
            key_of(ControlTopic(fleet=fleet, node=node, verb="x")).removesuffix("/x"),
            key_of(ChunkTopic(fleet=fleet, node=node, digest=Digest("x"))).removesuffix("/x"),
            key_of(ProbeTopic(fleet=fleet, source=me, target=node)),
        ):
            links[key] = link
    return ShapedBus(bus, links, SystemClock())
