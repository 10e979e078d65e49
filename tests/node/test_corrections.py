"""What live stages report corrects the profile that plans are made from."""

import pytest
from msgspec.structs import replace

from shoal.fleet.report import HopTimes, NodeFacts, NodeReport, ShardId, ShardReport, ShardState, StepTimes
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.corrections import Corrections, ProfileChanged, expected_step_s
from shoal.profile.fit import fit
from shoal.profile.fleet import BlockTrial, DeviceProfile, FleetProfile, LinkProfile

A, B = NodeId("a"), NodeId("b")
MODEL, OTHER = Digest("m"), Digest("o")
SERVED = {DeploymentId("chat"): MODEL}
PROFILE = FleetProfile(
    profile_epoch=1,
    devices=(
        DeviceProfile(
            node=A, fingerprint="f", cores=1, threads=1, memory_total_bytes=1, memory_budget_bytes=1,
            step_overhead_s=0.003, loop_overhead_s=0.001,
            trials=tuple(
                BlockTrial(kind="layer", rows=1, batch=1, context=context, time_s=0.01 + 1e-5 * context, spread_s=0.0)
                for context in (0, 1000)
            ),
        ),
    ),
    links=(LinkProfile(source=A, target=B, rtt_p50_s=0.01, rtt_p99_s=0.01, bytes_per_s=1e6),),
)  # fmt: skip


def report(count: int, factor: float, *, incarnation: int = 1, hop: HopTimes | None = None) -> NodeReport:
    """A heartbeat of A: its stage of four blocks takes *factor* times what was predicted."""
    shard = ShardReport(
        shard=ShardId(deployment=DeploymentId("chat"), plan_epoch=1, stage=0), state=ShardState.WIRED, start=0, stop=4,
        next_node=B, step_times=StepTimes(until=count, time_s=0.1 * factor), hop_times=hop,
    )  # fmt: skip
    facts = NodeFacts(name="a", version="1", locators=(), cores=1, memory_total_bytes=1, memory_budget_bytes=1)
    return NodeReport(node=A, incarnation=incarnation, sequence=count, facts=facts, shards=(shard,))


def heard(corrections: Corrections, *reports: NodeReport) -> None:
    for each in reports:
        corrections.hear(each, SERVED, lambda *_: 0.1, lambda _: 0.01)


def test_live_steps_correct_the_times_of_a_device_and_leave_what_was_measured_beside_them() -> None:
    told: list[ProfileChanged] = []
    corrections = Corrections(told.append)

    heard(corrections, *(report(n, 1.2) for n in range(1, 6)))

    (device,) = corrections.corrected(PROFILE, MODEL).devices
    assert device.factor == pytest.approx(1.2, rel=0.01)
    assert device.trials == PROFILE.devices[0].trials
    assert told == []


def test_a_device_that_becomes_slower_is_told_of_once() -> None:
    told: list[ProfileChanged] = []
    corrections = Corrections(told.append)

    heard(corrections, *(report(n, 1.0) for n in range(1, 9)), *(report(n, 3.0) for n in range(9, 30)))

    assert [change.node for change in told] == [A]
    assert told[0].factor == pytest.approx(3.0, rel=0.05)
    assert str(told[0]) == f"the engine of a now takes {told[0].factor:.2f} times as long as it was measured to"


def test_a_heartbeat_that_tells_nothing_new_is_not_counted_again() -> None:
    corrections = Corrections()

    heard(corrections, *([report(1, 3.0)] * 50))

    assert corrections.device_factor(A, MODEL) == 1.0


def test_another_model_is_corrected_by_what_is_known_of_the_device_until_it_is_served_there() -> None:
    corrections = Corrections()

    heard(corrections, *(report(n, 2.0) for n in range(1, 9)))

    assert corrections.device_factor(A, OTHER) == pytest.approx(2.0, rel=0.05)
    assert corrections.device_factor(B, MODEL) == 1.0


def test_trials_of_another_model_that_were_made_since_are_corrected_by_what_came_later_alone() -> None:
    corrections = Corrections()
    heard(corrections, *(report(n, 2.0) for n in range(1, 9)))

    corrections.forget_device(A, OTHER)
    assert corrections.device_factor(A, OTHER) == pytest.approx(1.0)
    heard(corrections, *(report(n, 6.0) for n in range(9, 40)))
    assert corrections.device_factor(A, OTHER) == pytest.approx(3.0, rel=0.1)

    corrections.forget_device(A, MODEL)
    assert corrections.device_factor(A, OTHER) == 1.0
    heard(corrections, *(report(n, 2.0) for n in range(40, 60)))
    assert corrections.device_factor(A, OTHER) == pytest.approx(2.0, rel=0.1)


def test_a_restarted_node_begins_anew_and_so_does_one_that_is_measured() -> None:
    corrections = Corrections()
    heard(corrections, *(report(n, 2.0) for n in range(1, 9)))

    heard(corrections, report(1, 1.0, incarnation=2))
    assert corrections.device_factor(A, MODEL) == 1.0

    heard(corrections, *(report(n, 2.0, incarnation=2) for n in range(2, 20)))
    assert corrections.device_factor(A, MODEL) > 1.5
    corrections.forget_device(A, MODEL)
    assert corrections.device_factor(A, MODEL) == 1.0


def test_steps_of_a_model_that_was_not_measured_teach_nothing() -> None:
    corrections = Corrections()

    for n in range(1, 20):
        corrections.hear(report(n, 5.0), SERVED, lambda *_: None, lambda _: None)
        corrections.hear(report(n, 5.0), {}, lambda *_: 0.1, lambda _: None)

    assert corrections.device_factor(A, MODEL) == 1.0


def test_a_link_that_becomes_slower_is_corrected_and_is_to_be_measured_anew() -> None:
    corrections = Corrections()
    hops = [HopTimes(until=n, rtt_s=0.04 if n > 8 else 0.01, base_s=0.01) for n in range(6, 20)]

    heard(corrections, *(report(1, 1.0, hop=hop) for hop in hops))

    (link,) = corrections.corrected(PROFILE, MODEL).links
    assert link.latency_s == pytest.approx(0.02, rel=0.1)
    assert (link.rtt_p50_s, link.bytes_per_s) == (0.01, 1e6)
    assert corrections.suspect((A, B))
    corrections.forget_link((A, B))
    assert corrections.corrected(PROFILE, MODEL).links == PROFILE.links
    assert not corrections.suspect((A, B))


def hops(*rtts_s: float, base_s: float = 0.01, after: int = 5) -> list[NodeReport]:
    """Heartbeats of A, each with a newer hello to B."""
    return [
        report(1, 1.0, hop=HopTimes(until=after + n, rtt_s=rtt_s, base_s=base_s)) for n, rtt_s in enumerate(rtts_s, 1)
    ]


def test_what_was_measured_anew_is_not_corrected_once_more_by_what_it_took_before() -> None:
    told: list[ProfileChanged] = []
    corrections = Corrections(told.append)
    heard(corrections, *hops(*[0.04] * 8))
    assert corrections.suspect((A, B))

    corrections.forget_link((A, B))
    heard(corrections, *hops(*[0.04] * 60, after=13))

    (link,) = corrections.corrected(PROFILE, MODEL).links
    assert link.factor == pytest.approx(1.0)
    assert not corrections.suspect((A, B))
    assert len(told) == 1


def test_a_link_that_recovers_after_it_was_measured_is_seen_to_be_faster() -> None:
    corrections = Corrections()
    heard(corrections, *hops(*[0.04] * 8))
    corrections.forget_link((A, B))

    heard(corrections, *hops(*[0.04] * 10, *[0.01] * 8, after=13))

    (link,) = corrections.corrected(PROFILE, MODEL).links
    assert link.factor < 0.35
    assert corrections.suspect((A, B))
    assert corrections.suspect((B, A)), "a hello went both ways"


def test_a_way_that_is_wired_after_its_link_was_measured_is_compared_with_its_first_hellos() -> None:
    corrections = Corrections()
    heard(corrections, *hops(0.01, 0.01))
    corrections.forget_link((A, B))

    heard(corrections, *hops(*[0.08] * 8, base_s=0.02))

    (link,) = corrections.corrected(PROFILE, MODEL).links
    assert link.factor == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(("base_s", "suspected"), [(0.011, False), (0.05, True), (0.003, True)])
def test_a_link_on_which_a_new_way_is_nothing_like_what_was_measured_is_to_be_measured_anew(
    base_s: float, suspected: bool
) -> None:
    told: list[ProfileChanged] = []
    corrections = Corrections(told.append)

    heard(corrections, *hops(*[base_s] * 4, base_s=base_s))

    assert corrections.suspect((A, B)) is suspected
    assert len(told) == suspected
    corrections.forget_link((A, B))
    heard(corrections, *hops(*[base_s] * 20, base_s=base_s, after=9))
    assert not corrections.suspect((A, B))
    (link,) = corrections.corrected(PROFILE, MODEL).links
    assert link.factor == pytest.approx(1.0)


def test_a_stages_step_is_predicted_without_the_loop_that_is_not_timed_with_it() -> None:
    times = StepTimes(until=1, time_s=0.0, context=500)
    device = PROFILE.devices[0]
    fits = fit(device.trials)

    assert expected_step_s(device, fits, ["layer"] * 4, times) == pytest.approx(0.002 + 4 * 0.015)
    assert expected_step_s(replace(device, factor=9.0), fits, ["layer"], times) == pytest.approx(0.002 + 0.015)
    assert expected_step_s(device, fits, ["layer", "head"], times) is None
