"""A draft model beside the first stage: guesses that come from it, or do not, change how many laps an answer takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.backend.null import NullBackend, NullSession, null_shard
from shoal.runtime.effects import AskDraft, DraftDone
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.request import GenerateRequest, SamplingParams
from shoal.runtime.speculate.ahead import CHUNK
from shoal.runtime.speculate.draft_model import go_on
from shoal.runtime.speculate.speculator import Speculation

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
LAYERS, CONTEXT, SLOTS = 6, 256, 3
FOUR = Speculation(most=4, adaptive=False)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1)
STEP_S, HOP_S = 0.001, 0.010


def twin(layers: int = LAYERS) -> NullSession:
    """A null model of so many layers; with as many as the pipeline has, it says at temperature 0 what that says."""
    return NullBackend().load(null_shard(0, layers, slots=SLOTS, context_tokens=CONTEXT))


@dataclass
class Script:
    """A draft model that behaves as it is told, request after request: the last way goes on for ever."""

    ways: Sequence[str] = ("right",)
    session: NullSession = field(default_factory=twin)
    asked: list[AskDraft] = field(default_factory=list)

    @property
    def way(self) -> str:
        return self.ways[min(len(self.asked), len(self.ways)) - 1]

    def foretell(self, ask: AskDraft) -> DraftDone | None:
        self.asked.append(ask)
        done = go_on(self.session, ask)
        match self.way:
            case "never":
                return None
            case "failed":
                return DraftDone(number=ask.number, failed=True)
            case "wrong":
                return DraftDone(number=ask.number, ids=tuple((i + 1) % 64 for i in done.ids))
            case "senseless":
                return DraftDone(number=ask.number, ids=(-1, 99))
            case _:
                return done

    def seconds(self, _ask: AskDraft) -> float:
        return {"late": 0.15, "very late": 9.0}.get(self.way, 0.004)


@pytest.fixture
def drafted(make_pipeline: Pipelines) -> Callable[..., LocalPipeline]:
    """A pipeline with a draft model; its n-grams find nothing unless *found* is given."""

    def make(
        script: Script, cuts: Sequence[int] = (3,), speculation: Speculation = FOUR, tokens: int = CONTEXT
    ) -> LocalPipeline:
        plain = make_pipeline(cuts, slots=SLOTS, context=CONTEXT)
        stages = [
            type(s)(msgspec.structs.replace(s.settings, speculation=speculation, draft_tokens=tokens), s.session)
            if s.settings.is_first
            else s
            for s in plain.stages
        ]
        return LocalPipeline(
            stages,
            step_s=lambda _stage, _sequences: STEP_S,
            hop_s=lambda *_: HOP_S,
            foretell=script.foretell,
            foretell_s=script.seconds,
        )

    return make


def laps(pipeline: LocalPipeline, name: str) -> int:
    return sum(bool(delta.tokens) for delta in pipeline.deltas[RequestId(name)])


def accepted(pipeline: LocalPipeline, name: str) -> tuple[int, int]:
    deltas = pipeline.deltas[RequestId(name)]
    return sum(d.accepted for d in deltas), sum(d.drafted for d in deltas)


def test_a_draft_model_that_is_right_divides_the_laps_by_the_tokens_of_each(
    make_pipeline: Pipelines, drafted: Pipelines, make_request: Requests
) -> None:
    request = make_request("a", prompt=9, max_tokens=42)
    plain = make_pipeline((3,)).generate(request)
    pipeline = drafted(Script())

    assert pipeline.generate(request) == plain
    # One by the prompt, one while the draft model is told of it, then five tokens a lap.
    assert laps(pipeline, "a") == 2 + 8
    right, guessed = accepted(pipeline, "a")
    assert right == guessed


def test_a_draft_model_that_is_wrong_costs_no_guessed_row(
    make_pipeline: Pipelines, drafted: Pipelines, make_request: Requests
) -> None:
    """What it says of a lap that is under way is compared with what comes: only then do guesses go out."""
    request = make_request("a", prompt=9, max_tokens=30)
    plain = make_pipeline((3,)).generate(request)
    pipeline = drafted(Script(session=twin(LAYERS - 1)))

    assert pipeline.generate(request) == plain
    assert laps(pipeline, "a") == 30
    assert accepted(pipeline, "a") == (0, 0)


WAYS = st.sampled_from(["right", "right", "wrong", "late", "very late", "never", "failed", "senseless"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ways=st.lists(WAYS, min_size=1, max_size=12),
    most=st.integers(1, 9),
    adaptive=st.booleans(),
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 30)), min_size=1, max_size=6),
    cuts=st.sampled_from([(), (3,), (2, 4)]),
    tokens=st.sampled_from([40, CONTEXT]),
    seeded=st.booleans(),
    gone=st.integers(0, 5),
)
def test_whatever_a_draft_model_does_no_answer_changes_and_nothing_is_left_behind(
    make_pipeline: Pipelines,
    drafted: Pipelines,
    make_request: Requests,
    ways: list[str],
    most: int,
    adaptive: bool,
    lengths: list[tuple[int, int]],
    cuts: tuple[int, ...],
    tokens: int,
    seeded: bool,
    gone: int,
) -> None:
    requests = [
        make_request(f"r{n}", prompt=prompt, max_tokens=count, sampling=SEEDED if seeded else SamplingParams())
        for n, (prompt, count) in enumerate(lengths)
    ]
    plain = {r.request: make_pipeline(cuts, slots=1).generate(r) for r in requests}
    script = Script(ways)
    pipeline = drafted(script, cuts, Speculation(most=most, adaptive=adaptive), tokens)
    for request in requests:
        pipeline.submit(request)
    for _ in range(60):
        pipeline.turn()
    left = RequestId(f"r{gone}")
    pipeline.cancel(left)
    pipeline.run()

    for name, answer in plain.items():
        got = pipeline.tokens(name)
        assert got == (answer[: len(got)] if name == left else answer)
    first = pipeline.machines[0].first
    assert first is not None
    assert not pipeline.machines[0].slots.held
    assert not first.speculator.tracks
    assert not first.speculator.ahead.outlooks
    assert len(first.speculator.ahead.out) <= SLOTS
    assert all(a.start + len(a.ids) + max(0, a.count - 1) <= tokens for a in script.asked)
    assert all(len(a.ids) <= max(CHUNK, 2 * most + 1) for a in script.asked)


def test_a_draft_model_that_never_answers_is_asked_once_per_slot_and_slows_nobody(
    drafted: Pipelines, make_request: Requests
) -> None:
    script = Script(["never"])
    pipeline = drafted(script)
    for n in range(20):
        pipeline.generate(make_request(f"r{n}", prompt=9, max_tokens=10))

    assert len(script.asked) == SLOTS
    assert all(laps(pipeline, f"r{n}") == 10 for n in range(20))


def test_an_answer_to_a_sequence_that_has_ended_is_nothing_to_the_next_one_in_its_slot(
    make_pipeline: Pipelines, drafted: Pipelines, make_request: Requests
) -> None:
    first, second = (make_request(name, prompt=n, max_tokens=30) for name, n in (("a", 9), ("b", 12)))
    plain = make_pipeline((3,), slots=1).generate(second)
    pipeline = drafted(Script(["late", "right"]))
    pipeline.submit(first)
    for _ in range(24):
        pipeline.turn()
    pipeline.cancel(RequestId("a"))

    assert pipeline.generate(second) == plain
    right, guessed = accepted(pipeline, "b")
    assert right == guessed > 0


def test_a_long_prompt_is_told_in_chunks_one_per_lap(drafted: Pipelines, make_request: Requests) -> None:
    script = Script()
    drafted(script).generate(make_request("a", prompt=200, max_tokens=20))

    assert [(a.start, len(a.ids), a.count) for a in script.asked[:2]] == [(0, CHUNK, 0), (CHUNK, 200 - CHUNK + 2, 5)]


def test_a_reproducible_request_has_no_guesses_that_depend_on_time(drafted: Pipelines, make_request: Requests) -> None:
    script = Script()
    drafted(script).generate(make_request("a", prompt=9, max_tokens=20, reproducible=True))

    assert not script.asked


def test_a_draft_model_is_asked_only_where_looking_up_finds_nothing(drafted: Pipelines, make_request: Requests) -> None:
    script = Script()
    pipeline = drafted(script)
    foretold = tuple(drafted(Script(["never"])).generate(make_request("a", prompt=9, max_tokens=40)))
    pipeline.generate(make_request("a", prompt=9, max_tokens=40, predicted=foretold))

    assert not script.asked


def test_a_draft_model_that_does_not_pay_is_not_asked_any_more(drafted: Pipelines, make_request: Requests) -> None:
    script = Script(session=twin(LAYERS - 1))
    pipeline = drafted(script, (3,), Speculation(most=4))
    pipeline.generate(make_request("a", prompt=9, max_tokens=200))

    assert 0 < len(script.asked) < 20


def test_what_is_right_and_late_is_built_upon(
    make_pipeline: Pipelines, drafted: Pipelines, make_request: Requests
) -> None:
    """The draft model was not told its own last id: the next request begins with it."""
    request = make_request("a", prompt=9, max_tokens=40)
    plain = make_pipeline((3,)).generate(request)
    script = Script(["late"])

    assert drafted(script).generate(request) == plain
    ends = [a.start + len(a.ids) + a.count - 1 for a in script.asked]
    assert [a.start for a in script.asked[1:]] == ends[:-1]
