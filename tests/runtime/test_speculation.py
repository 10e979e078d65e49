"""Guessed ids change how many laps an answer takes and nothing else."""

from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.effects import Emit, TokensArrived
from shoal.runtime.frames import RequestTokens, TokensFrame
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.request import FinishReason, GenerateRequest, SampledToken, SamplingParams
from shoal.runtime.speculate.draft import Draft
from shoal.runtime.speculate.ngram import NgramDrafter, NgramIndex
from shoal.runtime.speculate.speculator import Speculation
from shoal.runtime.stage import advance

Pipelines = Callable[..., LocalPipeline]
Requests = Callable[..., GenerateRequest]
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1, frequency_penalty=0.3)
FOUR = Speculation(most=4, adaptive=False)


class Oracle:
    """Knows each answer, and is wrong where it is told to be: at every *wrong*th position."""

    def __init__(self, answers: dict[str, Sequence[int]], wrong: int = 0) -> None:
        self.answers = answers
        self.wrong = wrong
        self.known: dict[RequestId, list[int]] = {}

    def open(self, request: GenerateRequest) -> None:
        self.known[request.request] = []
        self.answers.setdefault(request.request, ())
        self.answers[request.request] = (*request.prompt, *self.answers[request.request])

    def learn(self, request: RequestId, ids: Sequence[int]) -> None:
        self.known[request] += ids

    def propose(self, request: RequestId, most: int) -> Draft:
        at = len(self.known[request])
        ids = self.answers[request][at : at + most]
        return Draft(
            ids=tuple((i + 1) % 64 if self.wrong and (at + n) % self.wrong == 0 else i for n, i in enumerate(ids))
        )

    def close(self, request: RequestId) -> None:
        del self.known[request]


@pytest.fixture
def speculating(make_pipeline: Pipelines) -> Callable[..., LocalPipeline]:
    """A pipeline that guesses."""

    def make(cuts: Sequence[int] = (2, 4), speculation: Speculation = FOUR, **more: object) -> LocalPipeline:
        pipeline = make_pipeline(cuts, **more)
        stages = [
            msgspec.structs.replace(s.settings, speculation=speculation) if s.settings.is_first else s.settings
            for s in pipeline.stages
        ]
        rebuilt = [type(s)(settings, s.session) for s, settings in zip(pipeline.stages, stages, strict=True)]
        return LocalPipeline(rebuilt, step_s=pipeline.step_s, hop_s=pipeline.hop_s, drafter=pipeline.drafter)

    return make


def laps(pipeline: LocalPipeline, name: str) -> int:
    return sum(bool(delta.tokens) for delta in pipeline.deltas[RequestId(name)])


@pytest.mark.parametrize("sampling", [SamplingParams(), SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("cuts", [(), (2, 4)])
def test_right_guesses_give_the_same_answer_in_fewer_laps(
    make_pipeline: Pipelines,
    speculating: Pipelines,
    make_request: Requests,
    cuts: tuple[int, ...],
    sampling: SamplingParams,
) -> None:
    request = make_request("a", prompt=9, max_tokens=41, sampling=sampling)
    plain = make_pipeline(cuts).generate(request)

    pipeline = speculating(cuts, drafter=Oracle({"a": plain}))

    assert pipeline.generate(request) == plain
    assert laps(pipeline, "a") == 9  # one by the prompt, then five tokens a lap


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wrong=st.integers(1, 7),
    most=st.integers(1, 9),
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 25)), min_size=1, max_size=5),
    cuts=st.sampled_from([(), (3,), (2, 4)]),
    seeded=st.booleans(),
)
def test_no_guess_right_or_wrong_changes_any_answer(
    make_pipeline: Pipelines,
    speculating: Pipelines,
    make_request: Requests,
    wrong: int,
    most: int,
    lengths: list[tuple[int, int]],
    cuts: tuple[int, ...],
    seeded: bool,
) -> None:
    requests = [
        make_request(f"r{n}", prompt=prompt, max_tokens=tokens, sampling=SEEDED if seeded else SamplingParams())
        for n, (prompt, tokens) in enumerate(lengths)
    ]
    plain = {r.request: make_pipeline(cuts, slots=1).generate(r) for r in requests}
    pipeline = speculating(cuts, Speculation(most=most, adaptive=False), drafter=Oracle(dict(plain), wrong), slots=3)
    for request in requests:
        pipeline.submit(request)
    pipeline.run()

    assert {r.request: pipeline.tokens(r.request) for r in requests} == plain
    assert not pipeline.machines[0].slots.held
    assert not pipeline.machines[0].first.speculator.tracks  # type: ignore[union-attr]


def test_an_answer_ends_at_a_stop_token_that_was_guessed(
    make_pipeline: Pipelines, speculating: Pipelines, make_request: Requests
) -> None:
    plain = make_pipeline().generate(make_request("a", prompt=9, max_tokens=20))
    stop = next(t for t in plain[3:] if plain.index(t) >= 3)
    request = make_request("a", prompt=9, max_tokens=20, stop_token_ids=(stop,))
    pipeline = speculating((), Speculation(most=16, adaptive=False), drafter=Oracle({"a": plain}))

    assert pipeline.generate(request) == plain[: plain.index(stop)]
    assert pipeline.deltas[RequestId("a")][-1].finish is FinishReason.STOP


def test_a_lost_frame_with_guesses_ends_its_requests_and_leaks_nothing(
    speculating: Pipelines, make_request: Requests
) -> None:
    pipeline = speculating(drafter=Oracle({"a": [1] * 40}))
    pipeline.submit(make_request("a", prompt=9, max_tokens=40))
    for _ in range(14):
        pipeline.turn()
    pipeline.passes = lambda source, target: (source, target) != (0, 1)
    pipeline.wait(1.0)
    pipeline.passes = lambda source, target: True
    pipeline.wait(60.0)

    assert pipeline.deltas[RequestId("a")][-1].finish in (FinishReason.ERROR, FinishReason.LENGTH)
    assert all(not machine.slots.held for machine in pipeline.machines)


def test_tokens_beyond_a_wrong_guess_are_not_believed(speculating: Pipelines, make_request: Requests) -> None:
    """A last stage of a version that knows no guesses samples all rows."""
    pipeline = speculating(drafter=Oracle({"a": [1, 2, 3, 4, 5, 6, 7, 8]}))
    pipeline.submit(make_request("a", prompt=9, max_tokens=20))
    while not any(f.drafts for f in pipeline.sent):
        pipeline.turn()
    frame = pipeline.sent[-1]
    draft = frame.drafts[RequestId("a")]
    drawn = [SampledToken(token=t, position=10 + n) for n, t in enumerate((draft[0], 60, draft[2], draft[3], 61))]
    answer = TokensFrame(
        plan_epoch=3, step=frame.step, tokens=(RequestTokens(request=RequestId("a"), tokens=tuple(drawn)),)
    )

    before = pipeline.tokens(RequestId("a"))
    _, effects = advance(pipeline.machines[0], TokensArrived(frame=answer))
    (delta,) = [e.delta for e in effects if isinstance(e, Emit)]

    assert len(before) == 1
    assert [t.token for t in delta.tokens] == [draft[0], 60]
    assert (delta.drafted, delta.accepted) == (4, 1)


def test_a_reproducible_request_is_not_guessed_for_while_the_number_adapts(
    speculating: Pipelines, make_request: Requests
) -> None:
    oracle = Oracle({"a": [1] * 40})
    pipeline = speculating((), Speculation(most=4), drafter=oracle)
    pipeline.generate(make_request("a", prompt=9, max_tokens=20, reproducible=True))

    assert sum(delta.drafted for delta in pipeline.deltas[RequestId("a")]) == 0
    assert not oracle.known


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_an_index_proposes_what_followed_the_newest_ids_before(ids: list[int], most: int) -> None:
    index = NgramIndex()
    index.learn(ids)
    draft = index.find(ids, most)

    if draft.ids:
        assert draft.match >= 2
        assert len(draft.ids) == most
        tail = ids[-draft.match :]
        places = [at for at in range(draft.match, len(ids)) if ids[at - draft.match : at] == tail]
        assert draft.ids[0] in [ids[at] for at in places]
    else:
        assert all(ids[at - 2 : at] != ids[-2:] for at in range(2, len(ids)))


def told(make_request: Requests, prompt: Sequence[int], predicted: Sequence[int]) -> NgramDrafter:
    drafter = NgramDrafter()
    drafter.open(make_request("a", prompt=prompt, predicted=tuple(predicted)))
    drafter.learn(RequestId("a"), prompt)
    return drafter


def test_an_answer_that_was_predicted_is_drafted_from_its_first_token(make_request: Requests) -> None:
    drafter = told(make_request, [50, 51], [1, 2, 3, 4, 5])
    drafter.learn(RequestId("a"), [1])

    assert drafter.propose(RequestId("a"), 3) == Draft(ids=(2, 3, 4), match=1, predicted=True)


def test_an_answer_that_left_its_prediction_finds_back_to_it(make_request: Requests) -> None:
    drafter = told(make_request, [50, 51], [1, 2, 3, 4, 5, 6])
    drafter.learn(RequestId("a"), [1, 2, 9])
    lost = drafter.propose(RequestId("a"), 3)
    drafter.learn(RequestId("a"), [4, 5])

    assert lost == Draft()
    assert drafter.propose(RequestId("a"), 3) == Draft(ids=(6,), match=0, predicted=True)
