"""Who comes and goes, as the coordinator tells it: an event when a node's standing changes, and whether somebody has come."""

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.fleet.state import LOST_AFTER_S, Event, FleetState, Member, NodeForgotten, Standing, standing
from shoal.ids import NodeId
from shoal.node.moving import Note

FORGET_AFTER_S = 600.0
AWAY_AFTER_S = 30.0
"""A node that was lost for that long has come anew when it is heard, restarted or not."""


@dataclass(slots=True)
class Attendance:
    """What was said of nodes last.  `came` is called when one has come, or was restarted: what had no place may have one now.

    Not so when its link is back: one that flaps would let what fails be tried again and again at full speed.
    """

    note: Note
    came: Callable[[], None]
    apply: Callable[[Event], None]
    _standings: dict[NodeId, Standing] = field(default_factory=dict)
    _lives: dict[NodeId, int] = field(default_factory=dict)
    """The incarnation in which a node last came."""

    def watch(self, state: FleetState, now_s: float) -> None:
        """Say what has changed, and forget who has left or was lost for long."""
        for node, member in state.members.items():
            now = standing(member, now_s)
            if self._standings.get(node) is not now:
                self.note(f"node.{now.value}", _told(member, now, now_s), node=node)
                self._standings[node] = now
            if now is Standing.ALIVE and self._lives.get(node) != member.report.incarnation:
                self.came()
                self._lives[node] = member.report.incarnation
            elif now_s - member.heard_s > AWAY_AFTER_S:
                self._lives.pop(node, None)
            if now_s - member.heard_s > (LOST_AFTER_S if member.report.leaving else FORGET_AFTER_S):
                self.apply(NodeForgotten(node=node, incarnation=member.report.incarnation))


def _told(member: Member, now: Standing, now_s: float) -> str:
    """The node's name, and why it is given up: a process that ended is another matter for its owner than a silent machine."""
    name = member.report.facts.name
    if now not in {Standing.SUSPECT, Standing.LOST}:
        return name
    why = "its process or link ended" if member.vanished_s is not None else "silent"
    return f"{name}: {why}, last heard {now_s - member.heard_s:.1f} s ago"
