"""What owners declare of their nodes, from the flags to the planner."""

import msgspec

from shoal.cli.start import declared_from, options_from
from shoal.fleet.report import NodeFacts
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.planning import with_facts
from shoal.plan.problem import Limits, Relays, Residency
from shoal.profile.fleet import Declared, DeviceProfile

SAID = Declared(watts=15.0, price_per_hour=0.2, joules_per_byte=3e-7, region="eu", trust="own")


def test_flags_become_declared_rates_and_commands_without_them_declare_nothing() -> None:
    flags = {"watts": 15.0, "price_per_hour": 0.2, "joules_per_mb": 0.3, "region": "eu", "trust": "own"}

    assert declared_from(flags) == SAID
    assert declared_from({}) == Declared()


def test_a_node_starts_with_what_its_flags_declare() -> None:
    flags = {
        "listen": "127.0.0.1:0", "api_keys": "", "name": "desk", "memory": "", "threads": 0, "discover": False,
        "slowdown": 1.0, "links": None, "watts": 15.0,
    }  # fmt: skip

    assert options_from(flags).declared == Declared(watts=15.0)


def test_a_restarted_node_is_planned_with_what_it_declares_now() -> None:
    """Trials are kept from before; what the owner says is not."""
    profile = DeviceProfile(
        node=NodeId("a"), fingerprint="x", cores=1, threads=1, memory_total_bytes=2, memory_budget_bytes=1
    )
    facts = NodeFacts(
        name="a", version="1", locators=(), cores=1, memory_total_bytes=2, memory_budget_bytes=1, declared=SAID
    )

    assert with_facts(profile, facts).declared == SAID


def test_a_node_of_an_older_version_declares_nothing() -> None:
    facts = NodeFacts(
        name="a", version="0", locators=(), cores=1, memory_total_bytes=2, memory_budget_bytes=1, declared=SAID
    )
    older = {name: value for name, value in msgspec.to_builtins(facts).items() if name != "declared"}

    assert msgspec.convert(older, NodeFacts).declared == Declared()


def test_a_deployment_that_was_written_before_limits_and_relays_existed_is_read_without_any() -> None:
    spec = DeploymentSpec(
        deployment=DeploymentId("d"),
        model="m",
        manifest=Digest("x"),
        source=NodeId("a"),
        limits=Limits(joules=1.0),
        residency=Residency(regions=("eu",)),
        relays=Relays.NEVER,
    )
    newer = {"limits", "residency", "relays"}
    older = {name: value for name, value in msgspec.to_builtins(spec).items() if name not in newer}

    read = msgspec.json.decode(msgspec.json.encode(older), type=DeploymentSpec)

    assert (read.limits, read.residency, read.relays) == (Limits(), Residency(), Relays.IF_NEEDED)
