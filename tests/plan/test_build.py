"""From blocks and a fleet profile to a problem."""

import math

import pytest
from msgspec.structs import replace

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.model.frontier import Block, BlockTensor, Boundary
from shoal.plan.budget import StepBudget
from shoal.plan.build import Demands, MemoryModel, Setting, missing_kinds, problem
from shoal.plan.cost import decode_times
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Limits, Plan, Relays, RequestShape, Residency, SharedTensor
from shoal.profile.fleet import BlockTrial, Declared, DeviceProfile, FleetProfile, LinkProfile
from shoal.transport.codec import Codec

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
SHAPE = RequestShape(tokens_in=20, tokens_out=10, context_tokens=100, slots=2, prefill_chunk_tokens=16)


def boundary(name: str) -> Boundary:
    return Boundary(name=name, dtype="float32", shape=(1, "T", 8), bytes_per_token=32, bytes_fixed=4)


def block(index: int, kind: str, **changes: object) -> Block:
    given = {
        "tensors": (BlockTensor(name=f"w{index}", size_bytes=100), BlockTensor(name=f"v{index}", size_bytes=40)),
        "inputs": (boundary("x"),),
        "outputs": (boundary("y"), boundary("z")),
        "kv_bytes_per_token": 6,
        "kv_layers": (index,),
    } | changes
    return Block(index=index, kind=kind, node_start=index, node_stop=index + 1, flops_per_token=1, **given)


BLOCKS = (
    block(0, "embedding", inputs=(boundary("input_ids"),), kv_layers=(), kv_bytes_per_token=0),
    block(1, "layer"),
    block(2, "layer"),
    block(3, "head", outputs=(boundary("logits"),), kv_layers=(), kv_bytes_per_token=0),
)


def trials(*kinds: str, scale: float = 1.0) -> tuple[BlockTrial, ...]:
    """t = 1 ms + 0.1 ms x rows + 0.001 ms x rows x context"""
    points = [(1, 0), (1, 100), (16, 0)]
    return tuple(
        BlockTrial(kind=kind, rows=r, batch=1, context=c, time_s=scale * (1e-3 + 1e-4 * r + 1e-6 * r * c), spread_s=0.0)
        for kind in kinds
        for r, c in points
    )


def device(node: NodeId, known: tuple[BlockTrial, ...], fingerprint: str) -> DeviceProfile:
    return DeviceProfile(
        node=node, fingerprint=fingerprint, cores=2, threads=2, memory_total_bytes=10**9, memory_budget_bytes=10**8,
        trials=known, step_overhead_s=0.0003,
    )  # fmt: skip


def fleet(*devices: DeviceProfile) -> FleetProfile:
    link = LinkProfile(source=A, target=B, rtt_p50_s=0.002, rtt_p99_s=0.1, bytes_per_s=1e6, relayed=True)
    return FleetProfile(profile_epoch=4, devices=devices, links=(link,))


ALL = trials("embedding", "layer", "head")
SLIM = MemoryModel(fixed_bytes=0, workspace_bytes_per_row=0)


def test_blocks_are_priced_by_each_devices_fit_at_the_middle_of_the_answer() -> None:
    built = problem(
        BLOCKS, fleet(device(A, ALL, "x"), device(B, trials("embedding", "layer", "head", scale=2.0), "y")), SHAPE, A
    )

    one, two = built.devices
    assert one.decode_s[1] == pytest.approx(1e-3 + 1e-4 + 1e-6 * 25)
    assert one.prefill_s[1] == pytest.approx((1e-3 + 16e-4) + (1e-3 + 4e-4 + 1e-6 * 4 * 16))
    assert two.decode_s[1] == pytest.approx(2 * one.decode_s[1])
    assert one.step_overhead_s == 0.0003


def test_blocks_keep_their_sizes_and_get_names_of_the_model() -> None:
    built = problem(
        BLOCKS, fleet(device(A, ALL, "x")), SHAPE, A, Setting(memory=MemoryModel(workspace_bytes_per_row=10))
    )

    assert [spec.name for spec in built.blocks] == ["embedding", "layer 1", "layer 2", "head"]
    layer = built.blocks[1]
    assert (layer.weights_bytes, layer.kv_bytes_per_token, layer.load_peak_bytes, layer.workspace_bytes) == (
        140,
        6,
        100,
        160,
    )
    assert (layer.output_bytes_per_token, layer.output_bytes_fixed) == (64, 8)


def test_activations_that_are_written_smaller_send_fewer_bytes() -> None:
    sizes = {}
    for codec in (Codec.RAW, Codec.FP16, Codec.INT8):
        setting = Setting(demands=Demands(activations=codec))
        layer = problem(BLOCKS, fleet(device(A, ALL, "x")), SHAPE, A, setting).blocks[1]
        sizes[codec] = (layer.output_bytes_per_token, layer.output_bytes_fixed)

    assert sizes[Codec.RAW] == (64, 8)
    assert sizes[Codec.FP16] == (32, 4)
    assert sizes[Codec.INT8] == (16 + 8, 2 + 8)  # a scale for each row of each of the two tensors


def test_what_is_chosen_for_each_cut_is_sized_exactly_and_loses_no_more_than_is_allowed() -> None:
    found = {}
    for most in (Codec.RAW, Codec.FP16, Codec.INT8_PEAKS):
        setting = Setting(demands=Demands(activations=most, activations_per_cut=True))
        layer = problem(BLOCKS, fleet(device(A, ALL, "x")), SHAPE, A, setting).blocks[1]
        assert (layer.output_bytes_per_token, layer.output_bytes_fixed) == (64, 8)
        found[most] = [(size.codec, size.bytes_per_token, size.bytes_fixed) for size in layer.smaller]

    half, apart = (Codec.FP16, 32, 4), (Codec.INT8_PEAKS, 16 + 2 * (4 + 4 * 6), 2 + 2 * (4 + 6))
    assert found == {Codec.RAW: [], Codec.FP16: [half], Codec.INT8_PEAKS: [half, apart]}


def test_a_draft_model_takes_memory_on_the_source_and_nowhere_else() -> None:
    draft = (BLOCKS[1], BLOCKS[3])
    plain, drafted = (
        problem(
            BLOCKS, fleet(device(A, ALL, "x"), device(B, ALL, "y")), SHAPE, A, Setting(demands=Demands(draft=given))
        )
        for given in ((), draft)
    )

    more = [late.fixed_bytes - early.fixed_bytes for early, late in zip(plain.devices, drafted.devices, strict=True)]

    weights = sum(block.weights_bytes for block in draft)
    kv = sum(block.kv_bytes_per_token for block in draft) * SHAPE.slots * SHAPE.context_tokens
    rows = min(SHAPE.prefill_chunk_tokens, SHAPE.tokens_in)
    assert more == [math.ceil(1.1 * weights) + kv + 200_000 * rows, 0]


def test_links_memory_promises_and_demands_are_carried_over() -> None:
    setting = Setting(promised_bytes={A: 77}, demands=Demands(max_stages=2, exclude=(B,)))

    built = problem(BLOCKS, fleet(device(A, ALL, "x"), device(B, (), "y")), SHAPE, A, setting)

    assert [spec.node for spec in built.devices] == [A, B]
    assert (built.exclude, built.devices[1].decode_s) == ((B,), ())  # never timed, and never asked
    assert (built.devices[0].memory_budget_bytes, built.devices[0].memory_promised_bytes) == (10**8, 77)
    assert (built.links[0].latency_s, built.links[0].relayed) == (0.001, True)
    assert built.max_stages == 2


def test_an_excluded_device_has_its_reason_in_the_plan() -> None:
    known = fleet(device(A, ALL, "x"), device(B, ALL, "y"), device(C, (), "z"))

    plan = place(
        problem(BLOCKS, known, SHAPE, A, Setting(demands=Demands(exclude=(B, C)), memory=SLIM)), StepBudget(10**6)
    )

    assert isinstance(plan, Plan)
    reasons = {reason.node: reason.text for reason in plan.reasons}
    assert reasons[B] == reasons[C] == "left out: excluded by request"


def test_excluding_what_alone_would_do_is_said_so() -> None:
    """The device that was never timed does not count as a way out."""
    demands = Demands(stages_exactly=2, exclude=(B, C))

    answer = place(
        problem(
            BLOCKS,
            fleet(device(A, ALL, "x"), device(B, ALL, "y"), device(C, (), "z")),
            SHAPE,
            A,
            Setting(demands=demands, memory=SLIM),
        ),
        StepBudget(10**6),
    )

    assert isinstance(answer, Infeasible)


def test_a_tied_tensor_is_shared_by_its_blocks() -> None:
    tied = BlockTensor(name="token_embd.weight", size_bytes=90)
    blocks = (block(0, "embedding", tensors=(tied,)), block(1, "layer"), block(2, "head", tensors=(tied,)))

    built = problem(blocks, fleet(device(A, ALL, "x")), SHAPE, A)

    assert built.shared == (SharedTensor(size_bytes=90, blocks=(0, 2)),)
    assert [spec.weights_bytes for spec in built.blocks] == [90, 140, 90]


def test_a_device_that_was_never_timed_on_a_kind_is_named_with_it() -> None:
    with pytest.raises(InvalidRequestError, match=r"b has no trial of block 3 \(head, kind head\)"):
        problem(BLOCKS, fleet(device(A, ALL, "x"), device(B, trials("embedding", "layer"), "y")), SHAPE, A)


def test_machines_of_one_fingerprint_lend_each_other_their_trials() -> None:
    known = fleet(device(A, ALL, "x"), device(B, trials("layer", scale=3.0), "x"), device(C, (), "other"))

    assert missing_kinds(BLOCKS, known, B) == ()
    assert missing_kinds(BLOCKS, known, C) == ("embedding", "layer", "head")
    built = problem(BLOCKS, known, SHAPE, A, Setting(demands=Demands(exclude=(C,))))
    assert built.devices[1].decode_s[0] == pytest.approx(built.devices[0].decode_s[0])
    assert built.devices[1].decode_s[1] == pytest.approx(3 * built.devices[0].decode_s[1])


def test_a_model_without_a_cache_is_priced_at_no_context() -> None:
    shape = RequestShape(tokens_in=1, tokens_out=1, context_tokens=0)

    built = problem(BLOCKS, fleet(device(A, ALL, "x")), shape, A)

    assert built.devices[0].prefill_s[1] == pytest.approx(1.1e-3)


def test_what_owners_declare_of_their_nodes_prices_joules_money_and_residency() -> None:
    said = Declared(watts=12.0, price_per_hour=0.5, joules_per_byte=3e-7, region="eu", trust="own")
    known = trials("embedding", "layer", "head")

    found = problem(BLOCKS, fleet(replace(device(A, known, "x"), declared=said), device(B, known, "x")), SHAPE, A)

    told, silent = found.devices
    assert (told.active_watts, told.price_per_hour, told.region, told.trust) == (12.0, 0.5, "eu", "own")
    assert (silent.active_watts, silent.price_per_hour, silent.region, silent.trust) == (0.0, 0.0, "", "")
    assert [link.joules_per_byte for link in found.links] == [3e-7]


def test_limits_and_residency_of_a_deployment_become_the_problems() -> None:
    demands = Demands(limits=Limits(joules=2.0), residency=Residency(regions=("eu",)))

    found = problem(
        BLOCKS, fleet(device(A, trials("embedding", "layer", "head"), "x")), SHAPE, A, Setting(demands=demands)
    )

    assert (found.limits, found.residency) == (demands.limits, demands.residency)


def batch_trials(*kinds: str) -> tuple[BlockTrial, ...]:
    """Three together for twice the time of one."""
    return tuple(
        BlockTrial(kind=kind, rows=1, batch=batch, context=0, time_s=time_s, spread_s=0.0)
        for kind in kinds
        for batch, time_s in ((1, 0.001), (3, 0.002))
    )


def test_batches_that_were_timed_are_priced_as_they_were_timed() -> None:
    known = batch_trials("embedding", "layer", "head")

    (built,) = problem(BLOCKS, fleet(device(A, known, "x")), SHAPE, A).devices

    assert [sizes.batch for sizes in built.batched] == [3]
    assert decode_times(built, 3)[1] == pytest.approx(0.002)
    assert decode_times(built, 2)[1] == pytest.approx(0.0015)


def test_a_batch_that_not_every_block_was_timed_with_is_not_priced_by_it() -> None:
    known = (*batch_trials("embedding", "layer"), *(t for t in batch_trials("head") if t.batch == 1))

    (built,) = problem(BLOCKS, fleet(device(A, known, "x")), SHAPE, A).devices

    assert built.batched == ()


def test_what_live_times_say_of_a_device_and_a_link_is_in_the_prices() -> None:
    one = device(A, batch_trials("embedding", "layer", "head"), "x")
    link = LinkProfile(source=A, target=B, rtt_p50_s=0.002, rtt_p99_s=0.1, bytes_per_s=1e6)
    quiet = FleetProfile(profile_epoch=1, devices=(one,), links=(link,))
    now = FleetProfile(profile_epoch=1, devices=(replace(one, factor=2.0),), links=(replace(link, factor=4.0),))

    (before, after) = (problem(BLOCKS, fleet_now, SHAPE, A) for fleet_now in (quiet, now))

    old, new = before.devices[0], after.devices[0]
    assert new.decode_s == pytest.approx([2 * s for s in old.decode_s])
    assert new.prefill_s == pytest.approx([2 * s for s in old.prefill_s])
    assert new.step_overhead_s == 2 * old.step_overhead_s
    assert new.batched[0].decode_s == pytest.approx([2 * s for s in old.batched[0].decode_s])
    assert after.links[0].latency_s == 4 * before.links[0].latency_s
    assert after.links[0].bytes_per_s == before.links[0].bytes_per_s / 4


@pytest.mark.parametrize(
    ("said", "relay", "needed"),
    [(Relays.NEVER, False, False), (Relays.IF_NEEDED, False, True), (Relays.ALWAYS, True, False)],
)
def test_what_is_said_of_relays_becomes_the_problems(said: Relays, relay: bool, needed: bool) -> None:
    found = problem(BLOCKS, fleet(device(A, ALL, "x")), SHAPE, A, Setting(demands=Demands(relays=said)))

    assert (found.relay, found.relay_if_needed) == (relay, needed)
