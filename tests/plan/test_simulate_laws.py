"""The cost model before its judge: what it predicts of any chain, and what happens when the chain is run."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.plan.cost import Span, price
from shoal.plan.problem import BatchTimes, BlockSpec, DeviceSpec, LinkSpec, Problem, RequestShape
from shoal.plan.simulate import simulate
from shoal.plan.simulated import Load

LAWS = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])

times = st.integers(0, 40).map(lambda value: value / 1000)
some_times = st.integers(1, 40).map(lambda value: value / 1000)
Case = tuple[Problem, list[Span]]


@st.composite
def chains(draw: st.DrawFn, shapes: st.SearchStrategy[RequestShape], *, visit: bool = False, air: bool = True) -> Case:
    """A problem and a chain of it, relays included; every pair has a link.  *visit*: prompts may enter elsewhere.

    *air*: some links may share a medium.
    """
    blocks = draw(st.integers(1, 6))
    nodes = [NodeId(name) for name in "abcd"]
    count = draw(st.integers(1, min(blocks, 4)))
    cuts = (
        sorted(draw(st.sets(st.integers(1, blocks - 1), min_size=count - 1, max_size=count - 1))) if count > 1 else []
    )
    edges = [0, *cuts, blocks]
    spans = [Span(nodes[i], edges[i], edges[i + 1]) for i in range(count)]
    if count in {2, 3} and draw(st.booleans()):
        spans.insert(1, Span(nodes[3], spans[0].stop, spans[0].stop))
    source = draw(st.sampled_from(nodes)) if visit else nodes[0]
    shape = draw(shapes)
    problem = Problem(
        blocks=tuple(
            BlockSpec(
                name=f"block {index}",
                weights_bytes=1,
                output_bytes_per_token=draw(st.integers(1000, 9000)),
                output_bytes_fixed=draw(st.sampled_from([0, 500])),
            )
            for index in range(blocks)
        ),
        devices=tuple(draw(_device(node, blocks, shape)) for node in nodes),
        links=tuple(
            LinkSpec(
                source=a,
                target=b,
                latency_s=draw(times),
                bytes_per_s=draw(st.sampled_from([2e5, 1e6, 1e9])),
                medium="" if visit or not air else draw(st.sampled_from(["", "", "", "air"])),
            )
            for a in nodes
            for b in nodes
            if a != b
        ),
        shape=shape,
        source=source,
        pin_first=not visit,
    )
    return problem, spans


def _device(node: NodeId, blocks: int, shape: RequestShape) -> st.SearchStrategy[DeviceSpec]:
    several = st.builds(BatchTimes, batch=st.just(4), decode_s=st.tuples(*[some_times] * blocks))

    @st.composite
    def build(draw: st.DrawFn) -> DeviceSpec:
        decode_s = draw(st.tuples(*[some_times] * blocks))
        # A prompt of one row is a step like others.
        prefill_s = decode_s if shape.tokens_in == 1 else draw(st.tuples(*[some_times] * blocks))
        return DeviceSpec(
            node=node,
            memory_budget_bytes=1,
            step_overhead_s=draw(times),
            decode_s=decode_s,
            prefill_s=prefill_s,
            batched=tuple(draw(st.lists(several, max_size=1))),
        )

    return build()


def shape(
    *, streams: st.SearchStrategy[int], rows: int = 9, batch: int = 3, chunk: int = 0
) -> st.SearchStrategy[RequestShape]:
    """Chunks of *chunk* rows, or of any."""
    return st.builds(
        RequestShape,
        tokens_in=st.integers(1, rows),
        tokens_out=st.integers(2, 9),
        context_tokens=st.just(0),
        slots=st.just(64),
        in_flight=streams,
        batch=st.integers(1, batch),
        prefill_chunk_tokens=st.just(chunk) if chunk else st.integers(1, 5),
    )


@LAWS
@given(chains(shape(streams=st.just(1))) | chains(shape(streams=st.just(1), batch=1), visit=True))
def test_a_single_stream_takes_exactly_what_was_predicted(case: Case) -> None:
    problem, spans = case
    predicted = price(problem, spans).estimate

    seen = simulate(problem, spans, Load(streams=1, requests=4))

    assert seen.time_per_output_token_s == pytest.approx(predicted.time_per_output_token_s, rel=1e-9)
    assert seen.time_to_first_token_s >= predicted.time_to_first_token_s * (1 - 1e-9)
    if not _meets_the_last_request(problem, spans):
        assert seen.time_to_first_token_s == pytest.approx(predicted.time_to_first_token_s, rel=1e-9)
        assert seen.tokens_per_s == pytest.approx(predicted.tokens_per_s, rel=1e-9)


def _meets_the_last_request(problem: Problem, spans: list[Span]) -> bool:
    """Whether a stream's next prompt can meet its last token, on the way or at the first stage: it waits, as nobody predicts."""
    wires = {(link.source, link.target): link for link in problem.links}

    def sent_s(source: NodeId, target: NodeId, size: int) -> float:
        return 0.0 if source == target else wires[source, target].latency_s + size / wires[source, target].bytes_per_s

    first, last = spans[0].node, spans[-1].node
    there_and_back_s = sent_s(last, problem.source, 64) + sent_s(
        problem.source, first, 64 + 4 * problem.shape.tokens_in
    )
    return problem.source == last != first or there_and_back_s < sent_s(last, first, 64)


@LAWS
@given(chains(shape(streams=st.integers(2, 6), chunk=9)))
def test_no_load_gets_more_out_of_a_chain_than_was_predicted(case: Case) -> None:
    problem, spans = case
    predicted = price(problem, spans).estimate

    seen = simulate(problem, spans, Load(streams=problem.shape.in_flight, requests=40))

    assert seen.tokens / seen.duration_s <= predicted.tokens_per_s * (1 + 1e-9)


@LAWS
@given(chains(shape(streams=st.integers(2, 6), rows=1, batch=1), air=False))
def test_steps_of_one_kind_come_as_fast_as_the_closed_loop_law_says(case: Case) -> None:
    problem, spans = case
    predicted = price(problem, spans).estimate

    seen = simulate(problem, spans, Load(streams=problem.shape.in_flight, requests=60))

    assert seen.tokens_per_s == pytest.approx(predicted.tokens_per_s, rel=0.01)


@LAWS
@given(chains(shape(streams=st.integers(2, 6), batch=1)))
def test_chunks_that_overlap_bring_the_first_token_no_later_than_predicted(case: Case) -> None:
    problem, spans = case
    shape = problem.shape
    equal = shape.tokens_in % shape.prefill_chunk_tokens == 0
    predicted_s = price(problem, spans).estimate.time_to_first_token_s

    seen_s = simulate(problem, spans, Load(streams=1, requests=4)).time_to_first_token_s

    if equal and not any(link.medium for link in problem.links):
        assert seen_s <= predicted_s * (1 + 1e-3)
    if shape.tokens_in <= shape.prefill_chunk_tokens:
        assert seen_s == pytest.approx(predicted_s, rel=1e-9)
