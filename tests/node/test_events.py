"""What happened, for those who ask later and elsewhere."""

import io

import pytest

from shoal.node.events import EventRing
from shoal.observe.log import set_up_logs


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ring_of(fencing_epoch: int, *kinds: str) -> EventRing:
    ring = EventRing(set_up_logs(io.StringIO()), lambda: 0.0)
    ring.begin(fencing_epoch)
    for kind in kinds:
        ring.note(kind, "")
    return ring


@pytest.mark.anyio
async def test_who_follows_hears_of_a_later_lease_though_its_holder_noted_less() -> None:
    before = ring_of(1, *["node.alive"] * 50)
    seen = (await before.events(0, 100))[-1].sequence

    after = ring_of(2, "coordinator.leads")

    assert [e.kind for e in await after.events(seen, 100)] == ["coordinator.leads"]
