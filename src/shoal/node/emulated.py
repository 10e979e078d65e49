"""Sessions of an agent over emulated links: as an unequal network would carry them, on one machine (demos, rehearsals)."""

from pathlib import Path

from shoal.ids import Digest, NodeId
from shoal.node.options import NodeOptions
from shoal.node.weather import ChangingLinks, link_of, links_of
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus
from shoal.transport.keys import ChunkTopic, ControlTopic, ProbeTopic, key_of
from shoal.transport.shaped import ShapedBus
from shoal.transport.zenoh import open_control


def dial_agent(options: NodeOptions, me: NodeId, locator: str, zid: str) -> Bus:
    """A session of its own to the agent *zid*, with the emulated links that the agent's bus and workers have too."""
    bus = open_control(locator, zid=zid)
    return _shaped(bus, options, me) if options.links else bus


def shaped_agent(bus: Bus, options: NodeOptions, me: NodeId) -> Bus:
    """The agent's bus as over the emulated links, as they are from moment to moment."""
    if not options.links:
        return bus
    shaped = _shaped(bus, options, me)
    ChangingLinks(shaped, Path(options.home), options.links, lambda target: _keys_to(options.fleet, me, target)).start()
    return shaped


def _shaped(bus: Bus, options: NodeOptions, me: NodeId) -> ShapedBus:
    """What is addressed to a node travels on the link to it."""
    links = {
        key: link_of(shape)
        for shape in links_of(Path(options.home), options.links)
        for key in _keys_to(options.fleet, me, shape.target)
    }
    return ShapedBus(bus, links, SystemThreads())


def _keys_to(fleet: str, me: NodeId, node: NodeId) -> tuple[str, ...]:
    return (
        key_of(ControlTopic(fleet=fleet, node=node, verb="x")).removesuffix("/x"),
        key_of(ChunkTopic(fleet=fleet, node=node, digest=Digest("x"))).removesuffix("/x"),
        key_of(ProbeTopic(fleet=fleet, source=me, target=node)),
    )
