"""A cache that is smaller than its slots would fill: whoever is let in never runs out of room, and nobody waits for ever."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.ids import DeploymentId, RequestId
from shoal.model.cache import STEP_TOKENS, cache_tokens, committed_tokens
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.effects import FollowerMet, StepFailed
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.ports import SequenceStep, Session
from shoal.runtime.prefix import KEEP_S
from shoal.runtime.request import Array, FinishReason, GenerateRequest, Priority
from shoal.runtime.room import CacheRoom
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import StageSettings
from shoal.runtime.speculate.speculator import Speculation

SLOTS, CONTEXT, TOTAL = 4, 512, 800
SYSTEM = tuple((5 * i * i + 3) % 64 for i in range(100))


@dataclass
class Metered:
    """A session that counts what each slot has committed since it was released: as pages, it does not shrink by itself."""

    session: Session
    context_tokens: int
    guesses: bool
    """Then what they touch behind a sequence takes the place of what pages are shared with the head before."""
    touched: dict[int, int] = field(default_factory=dict)
    most: int = 0

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        for rows in sequences:
            self._touch(rows.slot, rows.start + rows.count)
        return self.session.step(sequences, tensors)

    def copy(self, source: int, target: int, count: int) -> None:
        self._touch(target, count)
        self.session.copy(source, target, count)

    def release(self, slot: int) -> None:
        self.touched.pop(slot, None)
        self.session.release(slot)

    def close(self) -> None:
        self.session.close()

    def committed(self) -> int:
        steps = [-(-length // STEP_TOKENS) + (not self.guesses) for length in self.touched.values()]
        return sum(min(self.context_tokens, count * STEP_TOKENS) for count in steps)

    def _touch(self, slot: int, stop: int) -> None:
        self.touched[slot] = max(self.touched.get(slot, 0), stop)
        self.most = max(self.most, self.committed())


def pipeline_of(cut: int, *, total: int = TOTAL, guesses: int = 8) -> LocalPipeline:
    """Two stages with four slots, which share room for *total* positions."""
    edges = [0, cut, 6]
    stages = []
    for index in range(2):
        vocabulary = 64 if index else 0
        shard = null_shard(
            edges[index],
            edges[index + 1],
            embeds=not index,
            vocabulary=vocabulary,
            slots=SLOTS,
            context_tokens=CONTEXT,
        )
        told = StageSettings(
            plan_epoch=3,
            index=index,
            stages=2,
            slots=SLOTS,
            context_tokens=CONTEXT,
            cache_tokens=total,
            vocabulary=64,
            scheduler=SchedulerSettings(in_flight=3, chunk_rows=64),
            speculation=Speculation(most=guesses, adaptive=False),
        )
        stages.append(LocalStage(told, Metered(NullBackend().load(shard), CONTEXT, guesses > 0)))
    return LocalPipeline(stages)


def asking(name: str, prompt: Sequence[int], max_tokens: int, **more: object) -> GenerateRequest:
    return GenerateRequest(
        request=RequestId(name), deployment=DeploymentId("m"), prompt=tuple(prompt), max_tokens=max_tokens, **more
    )


def most_committed(pipeline: LocalPipeline) -> int:
    return max(stage.session.most for stage in pipeline.stages)  # type: ignore[attr-defined]


def test_requests_that_fit_together_run_together_and_the_next_waits_until_one_has_ended() -> None:
    pipeline = pipeline_of(3)
    for name in "abcde":
        pipeline.submit(asking(name, range(60), 100))
    pipeline.turn()
    first = pipeline.machines[0].first
    assert first is not None
    while len(first.live) + len(first.waiting) < 5:
        pipeline.turn()

    assert sorted(first.live) == ["a", "b"], "each may come to 160 positions, which count as 256"
    pipeline.run()

    assert all(pipeline.deltas[RequestId(n)][-1].finish is FinishReason.LENGTH for n in "abcde")
    assert most_committed(pipeline) <= TOTAL


def test_a_long_request_is_not_overtaken_for_ever_by_short_ones() -> None:
    pipeline = pipeline_of(3)
    pipeline.submit(asking("running", range(60), 200))
    pipeline.submit(asking("long", range(40), 400))
    for n in range(20):
        pipeline.submit(asking(f"short-{n}", range(20), 10))
    pipeline.run()

    ended = [name for name, deltas in pipeline.deltas.items() if deltas[-1].finish is FinishReason.LENGTH]
    assert len(ended) == 22
    first_token_s = [next(i for i, f in enumerate(pipeline.sent) for o in f.opened if o.request == n) for n in ended]
    order = [name for _, name in sorted(zip(first_token_s, ended, strict=True))]
    assert order[:2] == ["running", "long"]


def test_old_caches_are_forgotten_for_whoever_needs_the_room_the_oldest_first() -> None:
    pipeline = pipeline_of(3)
    for n, name in enumerate("abc"):
        pipeline.generate(asking(name, [n, *SYSTEM], 20))
        pipeline.wait(1.0)
    kept = pipeline.machines[0].slots.kept
    assert [kept[slot].request for slot in sorted(kept)] == ["a", "b", "c"]

    pipeline.generate(asking("d", range(9), 300))

    left = {held.request for held in pipeline.machines[1].slots.kept.values()}
    assert left == {"c", "d"}, "a and b have made room; c may still serve somebody"
    assert most_committed(pipeline) <= TOTAL


def test_a_whole_context_fits_however_little_there_is_and_no_limit_is_no_limit() -> None:
    assert cache_tokens(512, 4, 0) == 4 * 512
    assert cache_tokens(512, 4, 10**9) == 4 * 512
    assert cache_tokens(512, 4, 512) == 512 + 3 * STEP_TOKENS
    assert not CacheRoom(4, 512, cache_tokens(512, 4, 0)).scarce
    assert CacheRoom(4, 512, cache_tokens(512, 4, 512)).fits(0, 10**6)


def test_what_a_longer_sequence_has_committed_stays_until_the_slot_is_released() -> None:
    room = CacheRoom(SLOTS, CONTEXT, TOTAL)
    room.promise(0, 400)
    room.end(0, 400)
    room.promise(0, 50)
    room.end(0, 50)

    assert room.used() == 512 + 3 * STEP_TOKENS
    room.release(0)
    assert room.used() == 4 * STEP_TOKENS


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_another_run_has_overtaken_leaves_nothing_in_its_slots(fails: bool) -> None:
    pipeline = pipeline_of(3)
    pipeline.generate(asking("kept", SYSTEM, 20))
    machine, session = pipeline.machines[0], pipeline.stages[0].session
    assert isinstance(session, Metered)
    pipeline.step_s = lambda *_: 0.1
    pipeline.submit(asking("running", [n % 64 for n in range(300)], 20))
    while machine.running is None:
        pipeline.turn()

    for birth in (1, 2):
        pipeline.give(0, FollowerMet(birth=birth))
        pipeline.turn()
    assert list(session.touched) == [rows.slot for rows in machine.running[0].sequences], "what runs keeps its cache"
    if fails:
        pipeline._queue[:] = []
        pipeline.give(0, StepFailed(code="x", text="y"))
    pipeline.run()

    assert session.touched == {}


@given(st.integers(0, 5000), st.integers(1, 4096))
def test_a_sequence_counts_as_what_it_touches_and_never_as_more_than_a_context(length: int, context: int) -> None:
    counted = committed_tokens(length, context)

    assert counted <= context
    assert counted == context or length + STEP_TOKENS <= counted < length + 2 * STEP_TOKENS


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(0, 10**6))
def test_what_slots_share_is_between_one_context_and_all_of_them(context: int, slots: int, shared: int) -> None:
    total = cache_tokens(context, slots, shared)

    assert context <= total <= context * slots
    assert total >= min(shared, context * slots)
    assert CacheRoom(slots, context, total).ever_fits(0, context)


class SharedCache(RuleBasedStateMachine):
    """Requests come and go, begin behind each other's prompts, are cancelled, and survive a stage that is started anew."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline = pipeline_of(3)
        self.asked: list[RequestId] = []

    @initialize(cut=st.integers(1, 5), guesses=st.sampled_from([0, 8]))
    def begin(self, cut: int, guesses: int) -> None:
        self.pipeline = pipeline_of(cut, guesses=guesses)

    @rule(
        length=st.integers(1, 400),
        shared=st.booleans(),
        answer=st.integers(1, 500),
        batch=st.booleans(),
        exact=st.booleans(),
    )
    def ask(self, length: int, shared: bool, answer: int, batch: bool, exact: bool) -> None:
        prompt = (SYSTEM + SYSTEM * 4)[:length] if shared else tuple((7 * i + length) % 64 for i in range(length))
        request = asking(
            f"r{len(self.asked)}",
            prompt,
            min(answer, CONTEXT - len(prompt)),
            priority=Priority.BATCH if batch else Priority.INTERACTIVE,
            reproducible=exact,
        )
        self.asked.append(request.request)
        self.pipeline.submit(request)

    @rule(turns=st.integers(1, 60))
    def work(self, turns: int) -> None:
        for _ in range(turns):
            self.pipeline.turn()

    @rule(at=st.integers(0, 100))
    def cancel(self, at: int) -> None:
        if self.asked:
            self.pipeline.cancel(self.asked[at % len(self.asked)])

    @rule(seconds=st.sampled_from([1.0, KEEP_S + 1.0]))
    def wait(self, seconds: float) -> None:
        self.pipeline.wait(min(seconds, 5.0))
        self.pipeline.clock.advance(max(0.0, seconds - 5.0))

    @rule(birth=st.integers(1, 9))
    def a_worker_is_started_anew_behind(self, birth: int) -> None:
        self.pipeline.give(0, FollowerMet(birth=birth))

    @rule()
    def all_are_answered_in_the_end(self) -> None:
        self.pipeline.run()
        self.pipeline.wait(20.0)
        self.pipeline.run()
        first = self.pipeline.machines[0].first
        assert first is not None
        assert not first.live
        assert not len(first.waiting)
        assert all(self.pipeline.deltas[name][-1].finish is not None for name in self.asked)

    @invariant()
    def no_stage_commits_more_than_the_slots_share(self) -> None:
        assert most_committed(self.pipeline) <= TOTAL


SharedCache.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSharedCache = SharedCache.TestCase


@pytest.mark.parametrize("total", [0, SLOTS * CONTEXT])
def test_where_each_slot_has_a_whole_context_nothing_is_forgotten_and_nobody_waits(total: int) -> None:
    pipeline = pipeline_of(3, total=total)
    for name in "abcd":
        pipeline.submit(asking(name, [ord(name) % 64, *SYSTEM], 400))
    pipeline.turn()
    first = pipeline.machines[0].first
    assert first is not None
    while len(first.live) + len(first.waiting) < 4:
        pipeline.turn()

    assert len(first.live) == 4
