"""Links that workers cannot use are none for the planner, whatever agents measured."""

from shoal.ids import NodeId
from shoal.node.planning import without
from shoal.profile.fleet import FleetProfile, LinkProfile

A, B = NodeId("a" * 32), NodeId("b" * 32)


def link(source: NodeId, target: NodeId) -> LinkProfile:
    return LinkProfile(source=source, target=target, rtt_p50_s=0.001, rtt_p99_s=0.002, bytes_per_s=1e8)


def test_a_pair_that_cannot_dial_each_other_is_planned_without_that_direction() -> None:
    fleet = FleetProfile(profile_epoch=1, devices=(), links=(link(A, B), link(B, A)))

    assert without(fleet, frozenset({(A, B)})).links == (link(B, A),)
    assert without(fleet, frozenset()) == fleet
