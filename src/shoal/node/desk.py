"""What a node answers as the coordinator: the questions of gateways, wherever in the fleet they are."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from msgspec.msgpack import Decoder

from shoal.errors import NodeUnreachableError
from shoal.fleet.report import NodeReport
from shoal.fleet.state import Standing
from shoal.fleet.views import LinkView, NodeView
from shoal.ids import NodeId
from shoal.node.calls import Handler
from shoal.node.coordinator import Coordinator
from shoal.node.events import EventRing
from shoal.node.messages import (
    AskEvents,
    AskNodes,
    AskProblem,
    AskProfile,
    Deploy,
    Drop,
    Events,
    Nodes,
    Nothing,
    Preview,
    Previewed,
    Stated,
    Wake,
)
from shoal.node.planning import FleetPlanner
from shoal.plan.problem import Infeasible, Problem
from shoal.profile.fleet import FleetProfile
from shoal.transport.parse import parse

Q = TypeVar("Q", bound=msgspec.Struct)


def handler(question: type[Q], answer: Callable[[Q], Awaitable[msgspec.Struct]]) -> Handler:
    """*answer* behind the wire format of `calls`."""
    decoder = Decoder(question)

    async def handle(body: bytes) -> bytes:
        return msgspec.msgpack.encode(await answer(parse(body, decoder, question.__name__)))

    return handle


@dataclass(frozen=True, slots=True)
class CoordinatorDesk:
    """Answers from the coordinator's state; refuses to change it without the lease."""

    coordinator: Coordinator
    planner: FleetPlanner
    ring: EventRing

    def handlers(self) -> dict[str, Handler]:
        """By verb."""
        return {
            "deploy": handler(Deploy, self._deploy),
            "drop": handler(Drop, self._drop),
            "wake": handler(Wake, self._wake),
            "preview": handler(Preview, self._preview),
            "problem": handler(AskProblem, self._problem),
            "nodes": handler(AskNodes, self._nodes),
            "fleet_profile": handler(AskProfile, self._profile),
            "events": handler(AskEvents, self._events),
        }

    async def _deploy(self, asked: Deploy) -> Nothing:
        await self.coordinator.want(asked.spec, asked.previewed)
        return Nothing()

    async def _drop(self, asked: Drop) -> Nothing:
        await self.coordinator.drop(asked.deployment)
        return Nothing()

    async def _wake(self, asked: Wake) -> Nothing:
        await self.coordinator.wake(asked.deployment)
        return Nothing()

    async def _problem(self, asked: AskProblem) -> Stated:
        stated = await self.coordinator.state_problem(asked.spec)
        match stated:
            case Problem():
                return Stated(problem=stated)
            case Infeasible():
                return Stated(refused=stated)

    async def _preview(self, asked: Preview) -> Previewed:
        return Previewed(answer=await self.coordinator.preview(asked.spec))

    async def _nodes(self, _: AskNodes) -> Nodes:
        members = self.coordinator.nodes()
        return Nodes(nodes=tuple(self._view(report, stands) for report, stands, _ in members.values()))

    async def _profile(self, asked: AskProfile) -> FleetProfile:
        members = self.coordinator.nodes()
        reports = {n: report for n, (report, stands, _) in members.items() if stands is Standing.ALIVE}
        unknown = [n for n in asked.nodes if n not in reports]
        if unknown:
            raise NodeUnreachableError(f"no node {unknown[0]} is alive", hint="`shoal nodes` lists them")
        chosen = {n: r for n, r in reports.items() if not asked.nodes or n in asked.nodes}
        return await self.planner.profile(asked.manifest, asked.source, chosen, again=asked.again)

    async def _events(self, asked: AskEvents) -> Events:
        return Events(events=tuple(await self.ring.events(asked.after, asked.limit)))

    def _view(self, report: NodeReport, stands: Standing) -> NodeView:
        facts = report.facts
        leads = self.coordinator.leading and report.node == self.coordinator.me
        roles = [name for name, has in (("coordinator", leads), ("gateway", bool(facts.gateway))) if has]
        standby = facts.coordinates and not leads
        return NodeView(
            id=report.node,
            name=facts.name,
            standing=stands,
            roles=(*roles, *(["standby"] if standby else []), "worker"),
            address=facts.locators[0] if facts.locators else "",
            cores=facts.cores,
            memory_total_bytes=facts.memory_total_bytes,
            memory_budget_bytes=facts.memory_budget_bytes,
            memory_promised_bytes=sum(s.memory_bytes for s in report.shards),
            providers=facts.providers,
            load=report.load_1m / max(1, facts.cores),
            links=tuple(self._links(report.node)),
        )

    def _links(self, node: NodeId) -> list[LinkView]:
        return [
            LinkView(
                target=link.target,
                rtt_p50_s=link.rtt_p50_s,
                rtt_p99_s=link.rtt_p99_s,
                bytes_per_s=link.bytes_per_s,
                relayed=link.relayed,
                jitter_s=link.jitter_s,
            )
            for link in self.planner.links_from(node)
        ]
