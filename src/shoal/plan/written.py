"""How activations are written over each cut of a plan, where that is left to it: exactly, unless a smaller way pays.

Placed first, for exact activations; then each cut is looked at by itself, with the sizes that are really sent and the links that
are really used.  A codec that loses more is taken only where it saves a stated share of the time of a typical request
(`WORTH`): on a quick link, or one whose round trip is what costs, everything stays exact.

Rejected: to place and write in one search.  It would multiply the cuts by the codecs, and would find plans whose answers are
worse for a device that a little time would have done without.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.choosing import as_chosen
from shoal.plan.cost import Priced, Span, price
from shoal.plan.figures import duration
from shoal.plan.problem import BlockSpec, Plan, Problem, Stage, Written
from shoal.transport.codec import Codec

LOSS_NATS: Mapping[Codec, float] = MappingProxyType(
    {Codec.RAW: 0.0, Codec.FP16: 0.0033, Codec.INT8_PEAKS: 0.0033, Codec.INT8: 0.037}
)
"""KL divergence of the next token from that of exact activations, at the worst of three cuts of SmolLM2-135M, 512 tokens of prose
(`python -m bench activations`, `bench/results/activations.json`); those that lose least come first.  Rows that are computed one
by one rather than in chunks are 0.0031 off."""
WORTH: Mapping[Codec, float] = MappingProxyType({Codec.FP16: 0.05, Codec.INT8_PEAKS: 0.02})
"""The share of a request's time that a codec must save, over the one before it, to be taken.  INT8_PEAKS loses hardly more than
FP16 and only has to earn its processor time, 70 us a row rather than 20.  Plain INT8 is never taken: it saves 24 bytes a row
of INT8_PEAKS, and loses ten times as much."""


def allowed(most: Codec) -> tuple[Codec, ...]:
    """Codecs that lose no more than *most*, the one that loses least first; without the exact one."""
    order = list(LOSS_NATS)
    return tuple(codec for codec in WORTH if order.index(codec) <= order.index(most.base))


def written(problem: Problem, plan: Plan) -> Plan:
    """*plan*, placed for exact activations, with a codec for each cut; the same where the problem leaves none to choose.

    The lower bound and the gap stay those of the exact plan: they are about where blocks are.
    """
    if not any(block.smaller for block in problem.blocks):
        return plan
    stated, spans = _stated(problem, plan), _spans(plan)
    exact_s = price(stated, spans).estimate.latency_s
    looked_at = tuple(_looked_at(stated, plan.stages, spans, sender, exact_s) for sender in _senders(plan.stages))
    return repriced(problem, replace(_with_codecs(plan, looked_at), written=looked_at))


def repriced(problem: Problem, plan: Plan) -> Plan:
    """*plan*, written as it is, with the figures that *problem* gives it now; raises InfeasibleError when a link is not there.

    One with relays was made as if relays were always allowed: its shards leave room for them, now as then.
    """
    stated, spans = _stated(problem, plan), _spans(plan)
    exact = price(stated, spans)
    sent = price(_as_sent(stated, plan.stages), spans) if _loses(plan) else exact
    return replace(plan, stages=_merged(exact, sent, plan.stages), estimate=sent.estimate)


def _stated(problem: Problem, plan: Plan) -> Problem:
    stated = as_chosen(problem, plan.shape)
    return replace(stated, relay=True) if any(stage.is_relay for stage in plan.stages) else stated


def _spans(plan: Plan) -> list[Span]:
    return [Span(stage.node, stage.start, stage.stop) for stage in plan.stages]


def _loses(plan: Plan) -> bool:
    return any(stage.writes is not Codec.RAW for stage in plan.stages)


def _senders(stages: Sequence[Stage]) -> Iterator[int]:
    """Stages that send activations of their own; the last one sends tokens, and a relay writes as what it passes on."""
    return (index for index, stage in enumerate(stages[:-1]) if not stage.is_relay)


def _merged(exact: Priced, sent: Priced, planned: Sequence[Stage]) -> tuple[Stage, ...]:
    """Memory as for exact activations, for a stage keeps what it sent as it made it; times as for what is sent."""
    return tuple(
        replace(kept, send_prefill_s=now.send_prefill_s, send_decode_s=now.send_decode_s, writes=stage.writes)
        for kept, now, stage in zip(exact.stages, sent.stages, planned, strict=True)
    )


def _as_sent(problem: Problem, stages: Sequence[Stage]) -> Problem:
    """With what leaves the last block of each stage as that stage writes it."""
    blocks = list(problem.blocks)
    for stage in stages[:-1]:
        blocks[stage.stop - 1] = _block_as(problem.blocks[stage.stop - 1], stage.writes)
    return replace(problem, blocks=tuple(blocks))


def _block_as(block: BlockSpec, codec: Codec) -> BlockSpec:
    found = next((size for size in block.smaller if size.codec is codec), None)
    if found is None:  # exact, or a codec that another release knows
        return block
    return replace(block, output_bytes_per_token=found.bytes_per_token, output_bytes_fixed=found.bytes_fixed)


def _with_codecs(plan: Plan, looked_at: Sequence[Written]) -> Plan:
    codecs = {one.stage: one.codec for one in looked_at}
    stages, codec = [], Codec.RAW
    for index, stage in enumerate(plan.stages):
        if not stage.is_relay:
            codec = codecs.get(index, Codec.RAW)
        stages.append(replace(stage, writes=codec))
    return replace(plan, stages=tuple(stages))


def _looked_at(
    problem: Problem, stages: Sequence[Stage], spans: Sequence[Span], sender: int, exact_s: float
) -> Written:
    """The codec for the cut behind stage *sender*, all other cuts exact, and why."""
    stop = stages[sender].stop
    block = problem.blocks[stop - 1]
    chosen, kept_s, said = Codec.RAW, 0.0, ""
    for size in block.smaller:
        blocks = (*problem.blocks[: stop - 1], _block_as(block, size.codec), *problem.blocks[stop:])
        saved_s = exact_s - price(replace(problem, blocks=blocks), spans).estimate.latency_s
        more = (saved_s - kept_s) / exact_s if exact_s > 0 else 0.0
        if more < WORTH[size.codec]:
            said = f"{size.codec} would save {_share(more)}{' more' if kept_s else ''}, {_share(WORTH[size.codec])} is asked"
            break
        chosen, kept_s = size.codec, saved_s
    text = _text(chosen, kept_s, exact_s)
    return Written(stage=sender, codec=chosen, saved_s=kept_s, text=f"{text}; {said}" if said else text)


def _text(codec: Codec, saved_s: float, exact_s: float) -> str:
    if codec is Codec.RAW:
        return "exact"
    saved = f"saves {duration(saved_s)} of a request's {duration(exact_s)} ({_share(saved_s / exact_s)})"
    return f"{codec}: {saved} and costs up to {LOSS_NATS[codec]:g} nats a token"


def _share(part: float) -> str:
    return f"{part:.1%}"


def nodes_of(stages: Sequence[Stage], sender: int) -> tuple[NodeId, NodeId]:
    """The two ends of the cut behind stage *sender*, relays between them left out."""
    there = next(stage for stage in stages[sender + 1 :] if not stage.is_relay)
    return stages[sender].node, there.node
