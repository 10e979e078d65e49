"""Every tier behaves like a dict from digest to bytes, whatever is wrapped around what."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shoal.ids import Digest
from shoal.store.chunk import digest_of
from shoal.store.disk import MAP_FROM_BYTES, DiskTier
from shoal.store.memory import MemoryTier
from shoal.store.quota import Quota
from shoal.store.tier import Tier
from shoal.store.verified import Verified


def disk(root: Path) -> DiskTier:
    return DiskTier(root / "chunks", tmp=root / "tmp", quota=Quota(None, root))


TIERS: dict[str, Callable[[Path], Tier]] = {
    "memory": lambda _: MemoryTier(),
    "disk": disk,
    "verified memory": lambda _: Verified(MemoryTier()),
    "verified disk": lambda root: Verified(disk(root)),
}

# Few values, so that histories put, drop and ask for the same ones; sizes on both sides of what is mapped.
CONTENTS = [b"", b"a", b"bc" * 50, bytes(MAP_FROM_BYTES - 1), bytes(range(256)) * 300]


def machine(make: Callable[[Path], Tier]) -> type[RuleBasedStateMachine]:
    class BehavesLikeADict(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.root = Path(tempfile.mkdtemp())
            self.tier = make(self.root)
            self.model: dict[Digest, bytes] = {}

        @rule(data=st.sampled_from(CONTENTS))
        def put(self, data: bytes) -> None:
            self.tier.put(digest_of(data), memoryview(data))
            self.model[digest_of(data)] = data

        @rule(data=st.sampled_from(CONTENTS))
        def drop(self, data: bytes) -> None:
            self.tier.drop(digest_of(data))
            self.model.pop(digest_of(data), None)

        @invariant()
        def holds_what_a_dict_holds(self) -> None:
            for data in CONTENTS:
                found = self.tier.get(digest_of(data))
                assert (None if found is None else bytes(found)) == self.model.get(digest_of(data))

        def teardown(self) -> None:
            shutil.rmtree(self.root)

    return BehavesLikeADict


@pytest.mark.parametrize("make", TIERS.values(), ids=TIERS.keys())
def test_any_history_of_puts_and_drops_leaves_what_a_dict_would_hold(make: Callable[[Path], Tier]) -> None:
    limits = settings(max_examples=30, stateful_step_count=15, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine(make), settings=limits)


@pytest.fixture(params=TIERS.values(), ids=TIERS.keys())
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    return request.param(tmp_path)


def test_what_is_read_cannot_be_written_to(tier: Tier) -> None:
    for data in (b"small", bytes(MAP_FROM_BYTES)):
        tier.put(digest_of(data), data)

        found = tier.get(digest_of(data))

        assert found is not None
        assert found.readonly


def test_a_chunk_that_was_read_stays_readable_after_it_is_dropped(tier: Tier) -> None:
    data = bytes(range(256)) * 1024
    tier.put(digest_of(data), data)
    found = tier.get(digest_of(data))

    tier.drop(digest_of(data))

    assert bytes(found) == data


def test_a_tier_keeps_its_own_copy(tier: Tier) -> None:
    data = bytearray(b"first")
    digest = digest_of(data)
    tier.put(digest, data)

    data[:] = b"other"

    assert bytes(tier.get(digest)) == b"first"
