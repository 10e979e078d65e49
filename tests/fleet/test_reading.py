"""Nodes of another release are told nothing that they cannot read."""

import msgspec
import pytest

from shoal.errors import InvalidRequestError
from shoal.fleet.reading import EVERYWHERE, HERE, check_readable, for_all, readable, reads
from shoal.fleet.reconcile import hold_order
from shoal.fleet.report import NodeFacts, NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import Deployment
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage
from shoal.transport.codec import Codec

A, B = NodeId("a"), NodeId("b")
OLD = NodeFacts(name="old", version="0.1.0", locators=(), cores=2, memory_total_bytes=8, memory_budget_bytes=4)
NEW = msgspec.structs.replace(OLD, name="new", codecs=HERE)
SPEC = DeploymentSpec(deployment=DeploymentId("chat"), model="m", manifest=Digest("d"), source=A)


def spec(activations: Codec, *, per_cut: bool = False) -> DeploymentSpec:
    return msgspec.structs.replace(SPEC, activations=activations, activations_per_cut=per_cut)


def test_this_release_reads_all_that_it_knows_and_an_older_one_what_every_release_does() -> None:
    assert all(reads(codec, NEW) for codec in Codec)
    assert {codec for codec in Codec if reads(codec, OLD)} == EVERYWHERE
    assert HERE == ("int8+peaks",)


def test_a_deployment_that_an_older_node_could_not_read_is_refused_by_name() -> None:
    check_readable(spec(Codec.INT8_PEAKS), [NEW, NEW])
    check_readable(spec(Codec.INT8), [OLD])

    with pytest.raises(InvalidRequestError, match=r"old cannot read activations written as int8\+peaks"):
        check_readable(spec(Codec.INT8_PEAKS), [NEW, OLD])


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [(Codec.RAW, Codec.RAW), (Codec.FP16, Codec.FP16), (Codec.INT8_PEAKS, Codec.FP16), (Codec.INT8, Codec.FP16)],
)
def test_beside_an_older_node_a_plan_chooses_from_what_it_reads(asked: Codec, chosen: Codec) -> None:
    assert for_all(spec(asked, per_cut=True), [NEW, OLD]).activations is chosen
    assert for_all(spec(asked, per_cut=True), [NEW, NEW]).activations is asked
    assert for_all(spec(asked), [NEW, OLD]).activations is asked, "what is asked for by name is not changed in silence"


@pytest.mark.parametrize("older", [A, B])
def test_a_stage_is_never_told_to_write_what_it_or_the_next_one_does_not_know(older: NodeId) -> None:
    stages = tuple(
        Stage(
            node=node, start=i, stop=i + 1, weights_bytes=1, kv_bytes=1, memory_bytes=1, prefill_s=0.1, decode_s=0.1,
            send_prefill_s=0.1, send_decode_s=0.1, writes=writes,
        )
        for i, (node, writes) in enumerate(((A, Codec.INT8_PEAKS), (B, Codec.RAW)))
    )  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    plan = Plan(
        stages=stages,
        objective=Objective.LATENCY,
        shape=RequestShape(),
        estimate=figures,
        lower_bound=1,
        gap=0,
        solver="x",
    )

    def told(facts: dict[NodeId, NodeFacts]) -> list[Codec]:
        reports = {n: NodeReport(node=n, incarnation=1, sequence=1, facts=f) for n, f in facts.items()}
        deployment = Deployment(spec=spec(Codec.INT8, per_cut=True), plan_epoch=1, answer=plan)
        return [hold_order(deployment, plan, index, reports, 1).activations for index in range(2)]

    assert told({A: NEW, B: NEW}) == [Codec.INT8_PEAKS, Codec.RAW]
    assert told({A: NEW, B: NEW} | {older: OLD}) == [Codec.FP16, Codec.RAW]


def test_an_older_node_reads_the_facts_of_this_one() -> None:
    class OlderFacts(msgspec.Struct):
        name: str

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(NEW), type=OlderFacts).name == "new"
    assert readable(Codec.INT8_PEAKS, [NEW]) is Codec.INT8_PEAKS
