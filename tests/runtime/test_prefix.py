"""Prompts that begin like others: what is in a cache is not computed again, and no answer changes."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.effects import StepFailed
from shoal.runtime.frames import ClosedSequence, OpenedSequence, Submit
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.prefix import KEEP_S, LEAST, Cached, KeptSlots, best, common, reusable
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams
from shoal.runtime.slots import SlotTable
from shoal.runtime.stage import advance

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
SYSTEM = tuple((5 * i * i + 3) % 64 for i in range(40))


def computed(pipeline: LocalPipeline, name: str) -> int:
    """Rows of a request's prompt that went through the pipeline."""
    rows = [s for frame in pipeline.sent for s in frame.sequences if s.request == name]
    prompt = next(o.prompt for frame in pipeline.sent for o in frame.opened if o.request == name)
    return sum(s.count for s in rows if s.start < len(prompt))


def held(slot: int, ids: Sequence[int], exact: int = 999) -> Cached:
    return Cached(slot, RequestId(f"h{slot}"), tuple(ids), exact)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_the_common_beginning_is_found(a: list[int], b: list[int]) -> None:
    length = common(tuple(a), tuple(b))

    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def test_a_row_is_left_to_compute_and_two_where_bits_matter() -> None:
    same = held(0, SYSTEM)

    assert reusable(same, SYSTEM, reproducible=False) == 39
    assert reusable(same, SYSTEM, reproducible=True) == 38
    assert reusable(held(0, SYSTEM, exact=20), SYSTEM, reproducible=True) == 20
    assert reusable(held(0, SYSTEM[: LEAST - 1]), SYSTEM, reproducible=False) == 0


def test_a_copy_must_save_more_than_it_costs() -> None:
    prompt = (*SYSTEM, *SYSTEM)
    own, near, far = held(0, prompt[:40]), held(1, prompt[:60]), held(2, prompt[:79])

    assert best(prompt, own, [near], reproducible=False).source == 0  # type: ignore[union-attr]
    assert best(prompt, own, [near, far], reproducible=False).source == 2  # type: ignore[union-attr]
    assert best((9, 9), None, [far], reproducible=False) is None


def test_a_newcomer_gets_the_slot_that_helps_it_else_an_empty_one_else_the_oldest() -> None:
    kept = KeptSlots(
        {s: Cached(s, RequestId(f"h{s}"), tuple(range(s, s + 30)), 30, since_s=9.0 - s) for s in (0, 1, 2)}
    )

    assert kept.choose([0, 1, 2, 3], tuple(range(1, 60)), reproducible=False) == 1
    assert kept.choose([0, 1, 2, 3], (7,) * 30, reproducible=False) == 3
    assert kept.choose([0, 1, 2], (7,) * 30, reproducible=False) == 2


def test_what_nobody_comes_for_is_given_back(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,))
    pipeline.generate(make_request("a", prompt=SYSTEM))
    assert all(machine.slots.kept for machine in pipeline.machines)
    assert all(stage.session.caches for stage in pipeline.stages)  # type: ignore[attr-defined]

    pipeline.wait(KEEP_S + 1)

    assert not any(machine.slots.kept for machine in pipeline.machines)
    assert not any(stage.session.caches for stage in pipeline.stages)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cuts", [(), (2, 4)])
def test_the_next_turn_of_a_chat_begins_behind_the_last(
    make_pipeline: Pipelines, make_request: Requests, cuts: tuple[int, ...]
) -> None:
    pipeline = make_pipeline(cuts)
    answer = pipeline.generate(make_request("a", prompt=SYSTEM))
    turn = (*SYSTEM, *answer, 1, 2, 3)
    cold = make_pipeline(cuts).generate(make_request("b", prompt=turn))

    assert pipeline.generate(make_request("b", prompt=turn)) == cold
    first = next(delta for delta in pipeline.deltas[RequestId("b")] if delta.tokens)
    assert first.cached == len(SYSTEM) + len(answer) - 1
    assert sum(delta.cached for delta in pipeline.deltas[RequestId("b")]) == first.cached


def test_requests_with_the_same_system_prompt_copy_it_while_the_first_runs(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    prompts = {f"r{n}": (*SYSTEM, *SYSTEM, n, 7, 9) for n in range(3)}
    cold = {name: make_pipeline((3,)).generate(make_request(name, prompt=p)) for name, p in prompts.items()}
    pipeline = make_pipeline((3,), slots=3)
    pipeline.submit(make_request("r0", prompt=prompts["r0"]))
    while not pipeline.tokens(RequestId("r0")):
        pipeline.turn()
    for name in ("r1", "r2"):
        pipeline.submit(make_request(name, prompt=prompts[name]))
    pipeline.run()

    assert {name: pipeline.tokens(RequestId(name)) for name in prompts} == cold
    assert [computed(pipeline, name) for name in prompts] == [83, 3, 3]


def test_a_stage_that_does_not_hold_it_costs_a_new_beginning_and_nothing_else(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    cold = make_pipeline((2, 4)).generate(make_request("b", prompt=(*SYSTEM, 1)))
    pipeline = make_pipeline((2, 4))
    pipeline.generate(make_request("a", prompt=SYSTEM))
    pipeline.machines[1].slots.kept.clear()

    assert pipeline.generate(make_request("b", prompt=(*SYSTEM, 1))) == cold
    assert pipeline.deltas[RequestId("b")][-1].finish is FinishReason.LENGTH
    assert not any(machine.slots.held for machine in pipeline.machines)


def test_a_request_that_failed_keeps_nothing(make_pipeline: Pipelines, make_request: Requests) -> None:
    pipeline = make_pipeline((3,))
    pipeline.submit(make_request("a", prompt=SYSTEM))
    while not pipeline.tokens(RequestId("a")):
        pipeline.turn()
    pipeline.machines[1].slots.held.clear()
    pipeline.run()

    assert pipeline.deltas[RequestId("a")][-1].finish is FinishReason.ERROR
    assert not pipeline.machines[0].slots.kept
    assert not pipeline.machines[0].first.kept.held  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(1, 12), st.booleans()), min_size=1, max_size=8
    ),
    slots=st.integers(1, 3),
    chunk=st.integers(3, 40),
    together=st.integers(1, 4),
    cuts=st.sampled_from([(), (3,), (2, 4)]),
    forget=st.integers(0, 7),
)
def test_no_answer_depends_on_what_was_answered_before(
    make_pipeline: Pipelines,
    make_request: Requests,
    prompts: list[tuple[int, int, int, bool]],
    slots: int,
    chunk: int,
    together: int,
    cuts: tuple[int, ...],
    forget: int,
) -> None:
    """Prompts of three families that share beginnings; some are cancelled, and a stage forgets what it kept."""
    sampling = SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.2)
    requests = [
        make_request(
            f"r{n}",
            prompt=(*tuple((family * 17 + 3 * i) % 64 for i in range(20 + length)), n % 5),
            max_tokens=tokens,
            sampling=sampling,
            reproducible=n % 2 == 0,
        )
        for n, (family, length, tokens, _) in enumerate(prompts)
    ]
    cold = {r.request: make_pipeline(cuts, slots=1).generate(r) for r in requests}
    pipeline = make_pipeline(cuts, slots=slots, chunk=chunk)
    gone = set()
    for n, request in enumerate(requests):
        pipeline.submit(request)
        if prompts[n][3]:
            for _ in range(n + 3):
                pipeline.turn()
            pipeline.cancel(request.request)
            gone.add(request.request)
        if n == forget:
            pipeline.run()
            pipeline.machines[-1].slots.kept.clear()
        if n % together == 0:
            pipeline.run()
    pipeline.run()

    for request, answer in cold.items():
        tokens = pipeline.tokens(request)
        assert tokens == answer[: len(tokens)]
        assert request in gone or tokens == answer
    for machine in pipeline.machines:
        assert not machine.slots.held


def test_a_request_that_goes_before_anybody_heard_of_it_leaves_its_slot_as_it_was(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline((3,), slots=1)
    answer = pipeline.generate(make_request("a", prompt=SYSTEM))
    before = [dict(machine.slots.kept) for machine in pipeline.machines]
    first = pipeline.machines[0].first
    assert first is not None
    first.submit(Submit(request=make_request("b", prompt=(*SYSTEM, 1))))  # it has the slot, and no frame yet
    first.cancel(RequestId("b"))

    assert not first.closing
    assert [machine.slots.kept for machine in pipeline.machines] == before
    pipeline.generate(make_request("c", prompt=(*SYSTEM, *answer, 1)))
    assert sum(delta.cached for delta in pipeline.deltas[RequestId("c")]) == len(SYSTEM) + len(answer) - 1


def test_a_row_that_was_computed_alone_is_not_begun_behind_where_bits_matter(
    make_pipeline: Pipelines, make_request: Requests
) -> None:
    pipeline = make_pipeline()
    pipeline.generate(make_request("a", prompt=SYSTEM[:-1], max_tokens=1))
    pipeline.generate(make_request("b", prompt=SYSTEM, max_tokens=1))  # its last row is all that is left of it
    reuse = pipeline.deltas[RequestId("b")][0].cached
    pipeline.generate(make_request("c", prompt=(*SYSTEM, 1, 2, 3), max_tokens=1, reproducible=True))

    assert reuse == len(SYSTEM) - 1
    assert pipeline.deltas[RequestId("c")][0].cached == len(SYSTEM) - 1


def test_rows_whose_step_failed_are_not_begun_behind(make_pipeline: Pipelines, make_request: Requests) -> None:
    """The client has gone when its rows fail on the last stage: what is kept there ends before them."""
    cold = make_pipeline((3,)).generate(make_request("b", prompt=(*SYSTEM, 1)))
    pipeline = make_pipeline((3,))
    pipeline.submit(make_request("a", prompt=SYSTEM))
    while not pipeline.machines[1].running:
        pipeline.turn()
    pipeline.cancel(RequestId("a"))
    frame, _ = pipeline.machines[1].running
    pipeline.stages[1].session.caches.clear()  # type: ignore[attr-defined]
    _, effects = advance(pipeline.machines[1], StepFailed(code="internal_error", text="the engine failed"))
    pipeline.machines[1].running = None
    pipeline.run()

    assert frame.sequences
    assert effects
    assert pipeline.generate(make_request("b", prompt=(*SYSTEM, 1))) == cold


def test_a_table_gives_only_what_it_holds() -> None:
    table = SlotTable(2)
    opened = OpenedSequence(request=RequestId("a"), slot=0, prompt=(1,))
    table.open(opened)
    table.extend(0, 30)
    table.close(ClosedSequence(request=RequestId("a"), slot=0, keep=40))

    def behind(count: int, of: str = "a", slot: int = 1) -> bool:
        return table.open(
            OpenedSequence(request=RequestId("b"), slot=slot, prompt=(1,), reuse=count, source=0, of=RequestId(of))
        )

    assert table.kept[0].length == 30  # as many as are there, whatever is to be kept
    assert not behind(31)
    assert not behind(10, of="c")
    assert behind(30)
    assert table.covers(1, RequestId("b"), 30)
    assert behind(20, slot=0)
    assert not table.kept
