"""A call's cost is told apart from the work of the blocks in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.model.frontier import Block, BlockTensor
from shoal.profile.calls import RUN_BLOCKS, SampleSpan, apportion, sample_spans
from shoal.profile.fleet import BlockTrial

KINDS = ("attention", "feed_forward")


def block(index: int, kind: str, weights_bytes: int) -> Block:
    return Block(
        index=index, kind=kind, node_start=index, node_stop=index + 1, inputs=(), outputs=(), flops_per_token=0,
        kv_bytes_per_token=0, tensors=(BlockTensor(name=f"w{index}", size_bytes=weights_bytes),),
    )  # fmt: skip


def model(layers: int, ends_bytes: int = 30, inner_bytes: int = 1) -> list[Block]:
    inner = [KINDS[i % 2] for i in range(2 * layers)]
    sizes = [ends_bytes, *(inner_bytes for _ in inner), ends_bytes]
    return [block(i, kind, size) for i, (kind, size) in enumerate(zip(["embed", *inner, "head"], sizes, strict=True))]


def trial(kind: str, time_s: float, rows: int = 1, context: int = 16, batch: int = 1) -> BlockTrial:
    return BlockTrial(kind=kind, rows=rows, batch=batch, context=context, time_s=time_s, spread_s=0.0)


times = st.floats(1e-4, 1.0)


@given(st.tuples(times, times), st.floats(0.0, 1.0), st.integers(1, 8))
def test_a_call_and_its_blocks_are_found_from_blocks_alone_and_a_run(
    work_s: tuple[float, float], call_s: float, layers: int
) -> None:
    alone = [trial(kind, call_s + s) for kind, s in zip(KINDS, work_s, strict=True)]
    run = [trial("", call_s + layers * sum(work_s))]

    found = apportion(alone, run, KINDS * layers)

    # Below a twentieth of what was timed, work is not told from the call any more.
    if all(s >= 0.06 * (s + call_s) for s in work_s):
        assert found.step_overhead_s == pytest.approx(call_s, rel=1e-6, abs=1e-9)
        assert [t.time_s for t in found.trials] == pytest.approx(work_s, rel=1e-6)


@given(st.tuples(times, times), times, times, st.integers(1, 8))
def test_a_stage_like_the_run_costs_what_the_run_was_timed_at(
    alone_s: tuple[float, float], off: float, prefill_s: float, layers: int
) -> None:
    """Whatever the blocks alone say: also where their times, in a quiet moment, were off by something."""
    shapes = {(1, 16): 1.0, (16, 0): prefill_s + 1.0}
    alone = [
        trial(kind, s * scale, rows, context)
        for (rows, context), scale in shapes.items()
        for kind, s in zip(KINDS, alone_s, strict=True)
    ]
    run = [
        trial("", layers * sum(alone_s) * scale * (1 - off / 4), rows, context)
        for (rows, context), scale in shapes.items()
    ]

    found = apportion(alone, run, KINDS * layers)

    for timed in run:
        blocks_s = layers * sum(t.time_s for t in found.trials if t.rows == timed.rows)
        assert found.step_overhead_s + blocks_s == pytest.approx(timed.time_s, rel=0.05)


def test_what_is_not_in_the_run_loses_the_call_and_no_more() -> None:
    """Also at a shape where the run took twice what its blocks say."""
    alone = [
        trial(kind, time_s, rows=rows)
        for kind, time_s in (("attention", 3.0), ("head", 9.0), ("embed", 1.5))
        for rows in (1, 16)
    ]

    found = apportion(alone, [trial("", 5.0), trial("", 8.0, rows=16)], ("attention", "attention", "attention"))

    assert found.step_overhead_s == pytest.approx(2.0)
    by_shape = {(t.kind, t.rows): t.time_s for t in found.trials}
    assert by_shape["head", 1] == by_shape["head", 16] == pytest.approx(7.0)
    assert by_shape["attention", 16] == pytest.approx(2 * by_shape["attention", 1])
    assert all(time_s > 0 for time_s in by_shape.values())


def test_longer_contexts_are_scaled_like_the_shape_next_to_them() -> None:
    alone = [trial("attention", 1.0), trial("attention", 2.0, context=512)]

    found = apportion(alone, [trial("", 1.0)], ("attention", "attention"))

    short, long = found.trials
    assert found.step_overhead_s + 2 * short.time_s == pytest.approx(1.0, rel=0.1)
    assert long.time_s > short.time_s


def test_without_a_run_blocks_are_taken_as_they_were_timed() -> None:
    alone = [trial("only", 2.0)]

    assert apportion(alone, [], ()).trials == tuple(alone)
    assert apportion(alone, [], ()).step_overhead_s == 0.0


def test_the_run_is_long_and_light_and_single_blocks_are_taken_from_it() -> None:
    run, *singles = sample_spans(model(20), run_bytes=48, most_bytes=100)

    assert run == SampleSpan(start=1, stop=1 + RUN_BLOCKS)
    assert [(s.kind, s.start) for s in singles] == [("embed", 0), ("attention", 1), ("feed_forward", 2), ("head", 41)]


def test_blocks_that_exceed_the_bound_are_run_in_a_pair_or_alone() -> None:
    heavy = model(4, ends_bytes=300, inner_bytes=100)

    assert sample_spans(heavy, run_bytes=48, most_bytes=250)[0] == SampleSpan(start=1, stop=3)
    assert all(span.kind for span in sample_spans(heavy, run_bytes=48, most_bytes=150))
    assert sample_spans(heavy[:1], run_bytes=48, most_bytes=999) == (SampleSpan(start=0, stop=1, kind="embed"),)
