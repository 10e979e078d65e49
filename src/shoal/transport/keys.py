"""The fleet's key scheme, and which keys a pattern covers.

Every key is `shoal/<fleet>/<letter>/<fields...>`: a topic is a frozen struct whose fields, in order, are the chunks, so a key is
built and parsed by the same declaration.  Text fields are percent-encoded: a model named `org/name` stays one chunk.
Patterns follow Zenoh's key expressions (`*` one chunk, `**` any number, none included; neither covers a chunk that starts with
`@`), without its sub-chunk wildcard `$*`, which we never need.
"""

import itertools
from typing import get_args
from urllib.parse import quote, unquote

import msgspec

from shoal.errors import InvalidRequestError, MalformedFrameError
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.transport.parse import shown

ROOT = "shoal"


class FrameTopic(msgspec.Struct, frozen=True, kw_only=True, tag="f"):
    """Activations and steering towards one stage of one plan."""

    fleet: str
    deployment: DeploymentId
    plan_epoch: int
    stage: int


class CreditTopic(msgspec.Struct, frozen=True, kw_only=True, tag="k"):
    """From a stage back to the one before it: frames that it has taken."""

    fleet: str
    deployment: DeploymentId
    plan_epoch: int
    stage: int


class TokensTopic(msgspec.Struct, frozen=True, kw_only=True, tag="t"):
    """Sampled tokens, from the last stage to the gateway."""

    fleet: str
    deployment: DeploymentId
    plan_epoch: int


class ControlTopic(msgspec.Struct, frozen=True, kw_only=True, tag="c"):
    """An order or question to a node's agent."""

    fleet: str
    node: NodeId
    verb: str


class WorkerTopic(msgspec.Struct, frozen=True, kw_only=True, tag="w"):
    """An order or question to one worker process."""

    fleet: str
    node: NodeId
    deployment: DeploymentId
    plan_epoch: int
    stage: int
    verb: str


class CoordinatorTopic(msgspec.Struct, frozen=True, kw_only=True, tag="o"):
    """A question to whoever holds the coordinator's lease."""

    fleet: str
    verb: str


class EventTopic(msgspec.Struct, frozen=True, kw_only=True, tag="e"):
    """Something that happened on a node."""

    fleet: str
    node: NodeId
    kind: str


class HeartbeatTopic(msgspec.Struct, frozen=True, kw_only=True, tag="h"):
    """A node says that it lives."""

    fleet: str
    node: NodeId


class AliveTopic(msgspec.Struct, frozen=True, kw_only=True, tag="a"):
    """A node's process is there, in this life of it."""

    fleet: str
    node: NodeId
    incarnation: int


class ChunkTopic(msgspec.Struct, frozen=True, kw_only=True, tag="b"):
    """A chunk's bytes, asked from the node that holds it."""

    fleet: str
    node: NodeId
    digest: Digest


class ProbeTopic(msgspec.Struct, frozen=True, kw_only=True, tag="p"):
    """Round trips and bandwidth between two nodes."""

    fleet: str
    source: NodeId
    target: NodeId


Topic = (
    FrameTopic
    | CreditTopic
    | TokensTopic
    | ControlTopic
    | WorkerTopic
    | CoordinatorTopic
    | EventTopic
    | HeartbeatTopic
    | AliveTopic
    | ChunkTopic
    | ProbeTopic
)


def key_of(topic: Topic) -> str:
    """The key of *topic*; raises InvalidRequestError when a field is empty, negative or not text."""
    fleet, *fields = (_chunk(name, getattr(topic, name)) for name in topic.__struct_fields__)
    return "/".join((ROOT, fleet, _letter(type(topic)), *fields))


def topic_of(key: str) -> Topic:
    """The topic behind *key*; raises MalformedFrameError when no function of ours builds such a key."""
    match key.split("/"):
        case [root, fleet, letter, *fields] if root == ROOT:
            kind = next((kind for kind in get_args(Topic) if _letter(kind) == letter), None)
        case _:
            kind, fleet, fields = None, "", []
    if kind is None or len(fields) != len(kind.__struct_fields__) - 1:
        raise MalformedFrameError(
            f"key {shown(key)!r} is not of the fleet's scheme", hint="look for a node of another version"
        )
    try:
        values = dict(zip(kind.__struct_fields__, map(unquote, (fleet, *fields)), strict=True))
        topic: Topic = msgspec.convert(values, kind, strict=False)
        exact = key_of(topic) == key
    except (msgspec.ValidationError, InvalidRequestError) as error:
        raise MalformedFrameError(f"key {shown(key)!r}: {shown(str(error))}") from error
    if not exact:
        raise MalformedFrameError(f"key {shown(key)!r} is not in its canonical form {shown(key_of(topic))!r}")
    return topic


def pattern_of(kind: type[Topic], /, **fixed: str | int) -> str:
    """The pattern of all topics of *kind* whose named fields have these values; the other fields are free."""
    unknown = fixed.keys() - set(kind.__struct_fields__)
    if unknown:
        raise InvalidRequestError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    fleet, *fields = (_chunk(name, fixed[name]) if name in fixed else "*" for name in kind.__struct_fields__)
    return "/".join((ROOT, fleet, _letter(kind), *fields))


def _letter(kind: type[Topic]) -> str:
    return str(kind.__struct_config__.tag)


def _chunk(name: str, value: str | int) -> str:
    try:
        chunk = quote(str(value), safe="")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} {value!r} is not valid Unicode text", param=name) from error
    if not chunk or (isinstance(value, int) and value < 0):
        raise InvalidRequestError(
            f"{name} {value!r} cannot be part of a key: it must be text, or a number from 0", param=name
        )
    return chunk


def check_key(key: str) -> None:
    """Raise InvalidRequestError unless *key* is slash-separated chunks without wildcards."""
    if "*" in key:
        raise InvalidRequestError(
            f"key {key!r} has a wildcard", hint="wildcards belong in patterns of subscribe and answer"
        )
    check_pattern(key)


def check_pattern(pattern: str) -> None:
    """Raise InvalidRequestError unless *pattern* is a canonical key expression without `$*`."""
    chunks = pattern.split("/")
    for chunk in chunks:
        if not chunk or any(sign in chunk for sign in "#?$") or ("*" in chunk and chunk not in {"*", "**"}):
            raise InvalidRequestError(
                f"pattern {pattern!r} has a bad chunk {chunk!r}", hint="chunks are text, `*` or `**`"
            )
    for left, right in itertools.pairwise(chunks):
        if left == "**" and right in {"*", "**"}:
            hint = "write `**` once, and `*/**` instead of `**/*`"
            raise InvalidRequestError(f"pattern {pattern!r} is not in its canonical form", hint=hint)


def matches(pattern: str, key: str) -> bool:
    """Whether *pattern* covers *key*.

    Greedy with one point of return: a later `**` can always take over what an earlier one would have to absorb.
    """
    wanted, have = pattern.split("/"), key.split("/")
    at = position = 0
    retry: tuple[int, int] | None = None
    while position < len(have):
        if at < len(wanted) and wanted[at] == "**":
            at, retry = at + 1, (at + 1, position)
        elif at < len(wanted) and _covers(wanted[at], have[position]):
            at, position = at + 1, position + 1
        elif retry is not None and not have[retry[1]].startswith("@"):
            retry = (retry[0], retry[1] + 1)
            at, position = retry
        else:
            return False
    return all(chunk == "**" for chunk in wanted[at:])


def _covers(wanted: str, have: str) -> bool:
    return wanted == have or (wanted == "*" and not have.startswith("@"))
