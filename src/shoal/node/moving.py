"""The coordinator's hand in moves: begins those that pay, and takes each step when `fleet.moves` says that it is due."""

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.abc

from shoal.clock import Clock
from shoal.errors import ShoalError
from shoal.fleet.deployment import Deployment, MoveBegun, MoveClosing, MoveDropped, MoveEnded, MoveMade, Successor
from shoal.fleet.moves import due, towards
from shoal.fleet.reconcile import Phase, heard, phase
from shoal.fleet.state import Event, FleetState, highest_plan_epoch
from shoal.fleet.statuses import places
from shoal.ids import DeploymentId, NodeId
from shoal.node.weighing import Weighing
from shoal.plan.replan import Move
from shoal.plan.transition import Transition, pieces_of


class Note(Protocol):
    """Where the coordinator writes what happened; see `events`."""

    def __call__(
        self, kind: str, text: str, *, node: NodeId | None = None, deployment: DeploymentId | None = None
    ) -> None: ...


@dataclass(slots=True)
class Moving:
    """Belongs to the event loop.  `apply` changes the coordinator's state; `keep` has a deployment on disk, sooner or later."""

    weighing: Weighing
    clock: Clock
    state: Callable[[], FleetState]
    apply: Callable[[Event], None]
    number: Callable[[int], Awaitable[int]]
    """A plan epoch above this one, durably."""
    keep: Callable[[DeploymentId], Coroutine[Any, Any, None]]
    note: Note
    one_plan: anyio.Lock
    counts: Counter[tuple[DeploymentId, str]] = field(default_factory=Counter)
    """Moves by deployment and how they went: `made`, `dropped`."""
    _said: dict[DeploymentId, str] = field(default_factory=dict)

    def tick(self, now_s: float, group: anyio.abc.TaskGroup) -> None:
        """Take the steps that are due, and begin to look at what should be looked at."""
        for event in due(self.state(), now_s):
            self._take(event)
            group.start_soon(self.keep, event.deployment)
        self.weighing.observe(now_s)
        for deployment in self.weighing.due(now_s):
            group.start_soon(self._look, deployment)

    async def _look(self, deployment: Deployment) -> None:
        name = deployment.spec.deployment
        try:
            move = await self.weighing.look(deployment)
            if move is not None:
                async with self.one_plan:
                    await self._begin(deployment, move)
            self._said.pop(name, None)
        except ShoalError as error:
            self._failed(name, error.message)
        except Exception as error:  # noqa: BLE001 that one model cannot be weighed must not end the service of the others
            self._failed(name, f"{type(error).__name__}: {error}")

    async def _begin(self, deployment: Deployment, move: Move) -> None:
        name = deployment.spec.deployment
        epoch = await self.number(highest_plan_epoch(self.state()))
        state, now_s = self.state(), self.clock.now_s()
        reports = heard(state, now_s)
        if state.deployments.get(name) is not deployment or phase(deployment, reports) is not Phase.SERVING:
            return
        change = towards(state, deployment, pieces_of(move.plan, epoch), reports)
        if not isinstance(change, Transition):
            return  # somebody else was given the memory meanwhile
        successor = Successor(plan_epoch=epoch, plan=move.plan, why=move.why, waits=change.gap is not None)
        self.apply(MoveBegun(deployment=name, from_epoch=deployment.plan_epoch, successor=successor))
        self.note("plan.moving", f"{places(move.plan.stages)}: {move.why}", deployment=name)
        await self.keep(name)

    def _take(self, event: MoveClosing | MoveMade | MoveEnded | MoveDropped | MoveBegun) -> None:
        name = event.deployment
        deployment = self.state().deployments[name]
        self.apply(event)
        match event:
            case MoveMade():
                why = deployment.successor.why if deployment.successor is not None else ""
                self.counts[name, "made"] += 1
                self.note("plan.moved", f"moved {name}: {why}", deployment=name)
            case MoveDropped(why=why):
                self.counts[name, "dropped"] += 1
                self.weighing.came_to_nothing(name)
                self.note("plan.stays", f"{name} stays where it is: {why}", deployment=name)
            case MoveBegun() | MoveClosing() | MoveEnded():
                pass  # the phases tell

    def _failed(self, name: DeploymentId, why: str) -> None:
        """Said once, not at every look."""
        if self._said.get(name) != why:
            self._said[name] = why
            self.note("plan.not_weighed", why, deployment=name)
