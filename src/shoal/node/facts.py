"""What a node tells the fleet about its machine."""

from importlib.metadata import version

from shoal import __version__
from shoal.fleet.reading import HERE
from shoal.fleet.report import NodeFacts
from shoal.node.options import NodeOptions
from shoal.profile.device import device_facts, fingerprint
from shoal.runtime.backend.onnx import providers
from shoal.transport.zenoh import ZenohBus


def engine_threads(options: NodeOptions, cores: int) -> int:
    """Threads of an engine session on this node."""
    return options.threads or cores


def node_facts(options: NodeOptions, fabric: ZenohBus, gateway: str) -> NodeFacts:
    """What this node tells about itself; an emulated slowdown counts as another kind of machine."""
    machine = device_facts(f"onnxruntime {version('onnxruntime')}")
    emulated = (f"slowdown {options.slowdown}",) if options.slowdown != 1 else ()
    return NodeFacts(
        name=options.name,
        version=__version__,
        locators=fabric.locators,
        zid=fabric.zid,
        cores=machine.cores,
        memory_total_bytes=machine.memory_total_bytes,
        memory_budget_bytes=options.memory_bytes or machine.suggested_budget_bytes,
        providers=providers(),
        fingerprint=fingerprint(machine, engine_threads(options, machine.cores), emulated),
        gateway=gateway,
        coordinates=options.coordinates,
        slowdown=options.slowdown,
        declared=options.declared,
        codecs=HERE,
        mends=True,
    )
