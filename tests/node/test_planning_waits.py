"""Who has nothing to measure waits for nobody who measures."""

import itertools
from collections.abc import Callable

import anyio
from structlog.typing import FilteringBoundLogger

from shoal.clock import ManualClock
from shoal.fleet.report import NodeFacts, NodeReport
from shoal.ids import Digest, NodeId
from shoal.node.calls import CallDesk, Caller
from shoal.node.desk import handler
from shoal.node.messages import Profiled, ProfileModel
from shoal.node.planning import FleetPlanner
from shoal.profile.fleet import DeviceProfile
from shoal.transport.memory import MemoryBus

BOX = NodeId("b" * 32)
KNOWN, NEW = Digest("k" * 64), Digest("n" * 64)
FACTS = NodeFacts(name="box", version="1", locators=(), cores=1, memory_total_bytes=9, memory_budget_bytes=9)
DEVICE = DeviceProfile(node=BOX, fingerprint="", cores=1, threads=1, memory_total_bytes=9, memory_budget_bytes=9)


def test_a_model_that_is_measured_already_does_not_wait_for_the_trials_of_another(
    bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger
) -> None:
    reports = {BOX: NodeReport(node=BOX, incarnation=1, sequence=1, facts=FACTS)}
    asked: list[Digest] = []

    async def measure(wanted: ProfileModel) -> Profiled:
        asked.append(wanted.manifest)
        if wanted.manifest == NEW:
            await anyio.sleep_forever()
        return Profiled(device=DEVICE)

    async def scenario() -> None:
        numbers = itertools.count()
        planner = FleetPlanner(Caller(bus_of("a"), "f", lambda: str(next(numbers))), ManualClock(), log)
        desk = CallDesk(bus_of("b"), "f", BOX, {"profile": handler(ProfileModel, measure)})
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(desk.run)
                first = await planner.profile(KNOWN, BOX, reports)
                group.start_soon(planner.profile, NEW, BOX, reports)
                while NEW not in asked:  # noqa: ASYNC110 - the desk tells nobody
                    await anyio.sleep(0.005)

                again = await planner.profile(KNOWN, BOX, reports)

                assert [d.node for d in again.devices] == [d.node for d in first.devices] == [BOX]
                group.cancel_scope.cancel()

    anyio.run(scenario)
    assert asked == [KNOWN, NEW]
