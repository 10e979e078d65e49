"""Who coordinates, as one node knows it: its own lease, the newest view of anybody's, and who else may hold one (ADR 5).

The broadcast of the view is the lease: whoever has not heard one for `LEASE_S` may take the next fencing epoch.  A node that has
never heard another that may coordinate need not wait, for nobody else can have taken over while it was away.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import anyio.to_thread
import msgspec

from shoal.fleet.view import LEASE_S, CoordinatorView, DeploymentStatus, Lease
from shoal.ids import NodeId
from shoal.node.journal import Journal
from shoal.node.last_plan import recall


class _Peer(msgspec.Struct, frozen=True, kw_only=True):
    node: NodeId


@dataclass(slots=True)
class Tenure:
    """Belongs to the event loop.  What the disk does not take raises StorageFullError, and does not count."""

    me: NodeId
    journal: Journal
    eager: bool
    """Takes a lease that nobody holds at once; a standby waits."""
    lease: Lease | None = None
    """Ours, as far as we know."""
    view: CoordinatorView | None = None
    """The newest, ours or heard; None before the first."""
    since_s: float = 0.0
    """When our lease began."""
    _view_s: float = 0.0
    _heard_holder: bool = False
    _peer: NodeId | None = None
    _peer_kept: bool = True
    _fenced_by: int = 0
    """The newest fencing epoch for which a node refused ours."""
    _sequence: int = 0

    def begin(self, now_s: float) -> None:
        """Remember what was known before this node was started."""
        self._view_s = now_s
        self.view = self.view or recall(self.journal)
        self._peer = next((peer.node for peer in self.journal.all("peer", _Peer)), None)

    def meet(self, node: NodeId) -> None:
        """Another node that may coordinate is there; `write` keeps it."""
        if node != self.me and self._peer is None:
            self._peer, self._peer_kept = node, False

    def hear(self, view: CoordinatorView, now_s: float) -> bool:
        """A broadcast of whoever holds the lease; True when it ends ours."""
        if view.newer_than(self.view):
            self.view, self._view_s, self._heard_holder = view, now_s, True
        ends = self.lease is not None and view.lease.rank > self.lease.rank
        if ends:
            self.lease = None
        return ends

    def fenced(self, fencing_epoch: int) -> None:
        """A node has obeyed a newer lease, whose views we may never have heard: ours ends, and our next is above it."""
        self.lease, self._fenced_by = None, max(self._fenced_by, fencing_epoch)

    async def write(self) -> None:
        """Make durable that another may coordinate."""
        if self._peer is not None and not self._peer_kept:
            peer = _Peer(node=self._peer)
            await anyio.to_thread.run_sync(lambda: self.journal.put("peer", peer.node, peer))
            self._peer_kept = True

    def due(self, now_s: float) -> bool:
        """Whether the lease is ours to take."""
        nobody_else = not self._heard_holder and self._peer is None
        return self.lease is None and (now_s - self._view_s >= LEASE_S or (self.eager and nobody_else))

    async def next_epoch(self) -> int:
        """A fencing epoch above every one that is known here, durably."""
        known = max(self._fenced_by, self.view.lease.fencing_epoch if self.view is not None else 0)
        # The other holder's were taken from its own journal.
        return await anyio.to_thread.run_sync(lambda: self.journal.next_number("fencing", above=known))

    def take(self, epoch: int, now_s: float) -> None:
        """The lease is ours."""
        self.lease, self.since_s = Lease(holder=self.me, fencing_epoch=epoch), now_s

    def tell(self, lease: Lease, statuses: Iterable[DeploymentStatus], now_s: float) -> CoordinatorView:
        """The next view under our lease."""
        self._sequence += 1
        self.view = CoordinatorView(lease=lease, sequence=self._sequence, deployments=tuple(statuses))
        self._view_s = now_s
        return self.view
