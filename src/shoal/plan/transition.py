"""From what nodes hold to what a plan wants: `transition(actual, wanted)`, an ordered list of actions.

The rule is make before break: everything of the wanted pipeline is fetched, loaded and linked beside the one that serves, and only
then is that one retired.  A shard takes memory from its loading to its retirement; on disk both always fit.

Where a node's memory does not admit both, there is no such list, and the answer says so.  Everything is fetched first, for that
takes longest; what fits is loaded; then the serving pipeline goes, the rest is loaded in its place, and all of it linked.  `Gap`
names the part of the list in which nobody serves, and the bytes that are missing on each node.  Moving one node after the other
through pipelines of both plans was rejected: shards of two plans share no cache and number their frames apart, so each step would
be a plan of its own, and on a chain the node that is full is as full at every step.

The list is a function of the state alone: whoever carries out its beginning and asks again gets the rest of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

import msgspec

from shoal.ids import NodeId
from shoal.plan.figures import size
from shoal.plan.problem import Infeasible, Plan


class Progress(IntEnum):
    """How far a piece has come; each step contains those before it."""

    NONE = 0
    FETCHED = 1
    LOADED = 2
    LINKED = 3


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one plan on its node; *plan_epoch* and *stage* name it."""

    plan_epoch: int
    stage: int
    node: NodeId
    start: int
    stop: int
    memory_bytes: int


class Actual(msgspec.Struct, frozen=True, kw_only=True):
    """What nodes hold of one deployment.  `serving` is the epoch of the plan that requests go to; 0: nobody serves."""

    pieces: tuple[tuple[Piece, Progress], ...]
    memory_bytes: dict[NodeId, int]
    """What all pieces of the deployment may take of each node together."""
    serving: int = 0


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """Have the chunks on disk."""

    piece: Piece


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Have it in memory."""

    piece: Piece


class Link(msgspec.Struct, frozen=True, kw_only=True, tag="link"):
    """Send its frames to the next stage."""

    piece: Piece


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag="retire"):
    """Give its memory back."""

    piece: Piece


Action = Fetch | Load | Link | Retire


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Actions [`begin`, `end`) during which nobody serves, and how many bytes each node lacks to hold both plans."""

    begin: int
    end: int
    missing_bytes: dict[NodeId, int]


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, in this order.  `gap` is None when some pipeline serves all the time, or none did to begin with."""

    actions: tuple[Action, ...] = ()
    gap: Gap | None = None

    def until_the_break(self, serving: int) -> tuple[Action, ...]:
        """The actions before the first that ends service: all that may be done while the plan of that epoch answers."""
        breaks = (i for i, a in enumerate(self.actions) if isinstance(a, Retire) and a.piece.plan_epoch == serving)
        return self.actions[: next(breaks, len(self.actions))]


def pieces_of(plan: Plan, plan_epoch: int) -> tuple[Piece, ...]:
    """The stages of *plan* as pieces."""
    return tuple(
        Piece(
            plan_epoch=plan_epoch,
            stage=index,
            node=stage.node,
            start=stage.start,
            stop=stage.stop,
            memory_bytes=stage.memory_bytes,
        )
        for index, stage in enumerate(plan.stages)
    )


def transition(actual: Actual, wanted: Sequence[Piece]) -> Transition | Infeasible:
    """How the pieces of *actual* become those of *wanted*, a whole pipeline; Infeasible when even that alone does not fit."""
    lacking = _lacking(wanted, actual.memory_bytes)
    if lacking:
        return _too_large(wanted, lacking, actual.memory_bytes)
    progress = dict(actual.pieces)
    others = [piece for piece, _ in actual.pieces if piece not in wanted]
    serving = sorted((p for p in others if p.plan_epoch == actual.serving), key=lambda piece: piece.stage)
    fetched = [Fetch(piece=p) for p in wanted if progress.get(p, Progress.NONE) < Progress.FETCHED]
    links = [Link(piece=p) for p in wanted if progress.get(p, Progress.NONE) < Progress.LINKED]
    retired = [Retire(piece=p) for p in serving]
    first: list[Action] = [*(Retire(piece=p) for p in others if p not in serving), *fetched]
    unloaded = [p for p in wanted if progress.get(p, Progress.NONE) < Progress.LOADED]
    loaded = [p for p in wanted if p not in unloaded]
    beside = _fitting(unloaded, [*serving, *loaded], actual.memory_bytes)
    first += [Load(piece=p) for p in beside]
    late = [Load(piece=p) for p in unloaded if p not in beside]
    if not late:
        return Transition(actions=(*first, *links, *retired))
    actions = (*first, *retired, *late, *links)
    missing = _lacking([*serving, *wanted], actual.memory_bytes)
    return Transition(actions=actions, gap=Gap(begin=len(first), end=len(actions), missing_bytes=missing))


def _fitting(
    unloaded: Iterable[Piece], present: Iterable[Piece], memory_bytes: Mapping[NodeId, int]
) -> tuple[Piece, ...]:
    """Those of *unloaded* that fit beside what is *present*, each in its turn."""
    held, fitting = _held(present), []
    for piece in unloaded:
        if held.get(piece.node, 0) + piece.memory_bytes <= memory_bytes.get(piece.node, 0):
            held[piece.node] = held.get(piece.node, 0) + piece.memory_bytes
            fitting.append(piece)
    return tuple(fitting)


def _held(pieces: Iterable[Piece]) -> dict[NodeId, int]:
    held: dict[NodeId, int] = {}
    for piece in pieces:
        held[piece.node] = held.get(piece.node, 0) + piece.memory_bytes
    return held


def _lacking(pieces: Iterable[Piece], memory_bytes: Mapping[NodeId, int]) -> dict[NodeId, int]:
    """Bytes that each node lacks to hold all of *pieces* at once."""
    held = _held(pieces)
    return {n: b - memory_bytes.get(n, 0) for n, b in held.items() if b > memory_bytes.get(n, 0)}


def _too_large(
    wanted: Sequence[Piece], lacking: Mapping[NodeId, int], memory_bytes: Mapping[NodeId, int]
) -> Infeasible:
    node, needed = next(iter(lacking)), _held(wanted)
    return Infeasible(
        reason=f"{node} would need {size(needed[node])} and has {size(memory_bytes.get(node, 0))}",
        needed_bytes=sum(needed[n] for n in lacking),
        available_bytes=sum(memory_bytes.get(n, 0) for n in lacking),
        hint="make another plan: the memory was promised to somebody else meanwhile",
    )
