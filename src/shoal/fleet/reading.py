"""Which ways of writing activations the nodes of a fleet read: one of another release may lack the newest.

An unknown name would not only end a frame.  It would make whatever carries it unreadable there: an order, and every view of
the coordinator that names the deployment.  So a node says what it reads beyond what all releases do, and nobody tells the
others of anything else.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from shoal.errors import InvalidRequestError
from shoal.fleet.report import NodeFacts
from shoal.fleet.spec import DeploymentSpec
from shoal.transport.codec import Codec

EVERYWHERE = frozenset(
    {Codec.RAW, Codec.FP16, Codec.INT8, Codec.RAW_ZSTD, Codec.FP16_ZSTD, Codec.INT8_ZSTD},
)
"""What every release reads."""
HERE = tuple(codec.value for codec in Codec if codec not in EVERYWHERE)
"""What this one reads besides (`NodeFacts.codecs`)."""


def reads(codec: Codec, facts: NodeFacts) -> bool:
    """Whether a node with these *facts* knows *codec*."""
    return codec in EVERYWHERE or codec.value in facts.codecs


def readable(codec: Codec, nodes: Iterable[NodeFacts]) -> Codec:
    """*codec*, or where one of *nodes* does not know it, one that all do and that loses no more."""
    return codec if all(reads(codec, facts) for facts in nodes) else Codec.FP16


def check_readable(spec: DeploymentSpec, nodes: Iterable[NodeFacts]) -> None:
    """Raise InvalidRequestError when *spec* names a way of writing that a node of the fleet does not know."""
    strange = [facts.name for facts in nodes if not reads(spec.activations, facts)]
    if strange:
        raise InvalidRequestError(
            f"{', '.join(strange)} cannot read activations written as {spec.activations}",
            hint="run the same version of shoal on every node, or ask for fp16",
            param="activations",
        )


def for_all(spec: DeploymentSpec, nodes: Iterable[NodeFacts]) -> DeploymentSpec:
    """*spec* for whoever chooses how each cut is written: only what all *nodes* know may be chosen."""
    known = list(nodes)
    if not spec.activations_per_cut or all(set(HERE) <= set(facts.codecs) for facts in known):
        return spec
    return replace(spec, activations=Codec.RAW if spec.activations is Codec.RAW else Codec.FP16)
