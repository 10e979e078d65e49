"""Answers that follow a grammar, through whole pipelines of null engines: their logits are as good as random."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.ids import DeploymentId, RequestId
from shoal.model.tokenizer import Tokenizer
from shoal.runtime.backend.guided import GuidedGrammars
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.effects import TokensArrived
from shoal.runtime.frames import Submit, decode_gateway_message, decode_stage_frame, encode
from shoal.runtime.grammar import JSON_OBJECT, Bound, Grammar
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams
from shoal.runtime.settings import StageSettings
from shoal.runtime.speculate.speculator import Speculation

LAYERS = 4
BOUNDED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "boats": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "boats"],
    "additionalProperties": False,
}
CONTEXT = 1024
MOST = 600
END = 1


class Machine:
    """A pipeline over the byte-level tokenizer, cut at *cuts*, and what it answers."""

    def __init__(
        self, tokenizer: Tokenizer, cuts: Sequence[int] = (2,), *, ends: tuple[int, ...] = (END,), guesses: int = 0
    ) -> None:
        self.tokenizer, vocabulary = tokenizer, tokenizer.vocabulary
        stages = []
        for index, (start, stop) in enumerate(pairwise([0, *cuts, LAYERS])):
            last = index == len(cuts)
            shard = null_shard(
                start, stop, embeds=index == 0, vocabulary=vocabulary if last else 0, context_tokens=CONTEXT
            )
            stage = StageSettings(
                plan_epoch=1, index=index, stages=len(cuts) + 1, slots=2, context_tokens=CONTEXT,
                vocabulary=vocabulary, eos_token_ids=ends, speculation=Speculation(most=guesses, adaptive=False),
            )  # fmt: skip
            grammars = GuidedGrammars(lambda: tokenizer, vocabulary, ends) if last else None
            stages.append(LocalStage(stage, NullBackend().load(shard), grammars))
        self.pipeline = LocalPipeline(stages)

    def ask(self, name: str, grammar: Grammar | None, max_tokens: int = MOST, **more: object) -> str:
        """The answer's text."""
        request = GenerateRequest(
            request=RequestId(name), deployment=DeploymentId("m"), prompt=(5, 6, 7), max_tokens=max_tokens,
            sampling=more.pop("sampling", SamplingParams(temperature=1.0, seed=4)), grammar=grammar, **more,
        )  # fmt: skip
        return b"".join(map(self.tokenizer.token_bytes, self.pipeline.generate(request))).decode(errors="replace")

    def end(self, name: str) -> tuple[FinishReason | None, str]:
        delta = self.pipeline.deltas[RequestId(name)][-1]
        return delta.finish, delta.error_code


@pytest.fixture
def make_machine(small_tokenizer: Callable[[str], Tokenizer]) -> Callable[..., Machine]:
    return lambda *cuts, **more: Machine(small_tokenizer("byte_level"), cuts or (2,), **more)


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value))


VALUES = st.one_of(st.text('ab"\\{é水', max_size=4), st.integers(-5, 5), st.none())
SCALARS = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(lambda n, more: {"type": "integer", "minimum": n, "maximum": n + more}, st.integers(-99, 99), st.integers(0, 500)),
    st.builds(lambda n: {"type": "number", "minimum": n, "maximum": n + 3}, st.integers(-9, 9)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"], "maximum": 9, "minimum": 0}]),
    st.builds(lambda v: {"enum": v}, st.lists(VALUES, min_size=1, max_size=4, unique_by=repr)),
    st.builds(lambda v: {"const": v}, st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9), max_size=2)),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{1,3}$"}, {"type": "string", "format": "date"}]),
)  # fmt: skip


def objects(inner: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
    def of(properties: dict[str, object], required: set[str]) -> dict[str, object]:
        wanted = [name for name in properties if name in required]
        return {"type": "object", "properties": properties, "required": wanted, "additionalProperties": False}

    names = st.sampled_from(["name", "a", "b c", "größe", '"q"', "n1"])
    return st.builds(of, st.dictionaries(names, inner, min_size=1, max_size=4), st.sets(names))


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda item, n: {"type": "array", "items": item, "minItems": n, "maxItems": n + 2}, inner, st.integers(0, 2)),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=6,
)  # fmt: skip


@given(
    wanted=SCHEMAS,
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([0.5, 1.0]),
)
@settings(max_examples=60)
def test_whatever_the_logits_say_the_answer_is_json_and_valid(
    small_tokenizer: Callable[[str], Tokenizer], wanted: dict[str, object], seed: int, temperature: float, top_p: float
) -> None:
    machine = Machine(small_tokenizer("byte_level"))

    text = machine.ask("r", schema(wanted), sampling=SamplingParams(temperature=temperature, top_p=top_p, seed=seed))

    if machine.end("r") != (FinishReason.LENGTH, ""):  # a greedy model may write digits without end
        assert machine.end("r") == (FinishReason.STOP, "")
        jsonschema.validate(json.loads(text), wanted)


@pytest.mark.parametrize("cuts", [(), (1,), (1, 3)])
def test_answers_are_the_same_however_the_model_is_cut(
    make_machine: Callable[..., Machine], cuts: tuple[int, ...]
) -> None:
    whole, cut = Machine(make_machine().tokenizer, ()), Machine(make_machine().tokenizer, cuts)

    assert whole.ask("r", schema(BOUNDED)) == cut.ask("r", schema(BOUNDED))


def test_json_mode_gives_an_object(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    soon = {machine.tokenizer.encode(text, add_special=False)[0]: 8.0 for text in '"}'}  # else it may go on for ever

    text = machine.ask("r", JSON_OBJECT, sampling=SamplingParams(temperature=1.0, seed=3, logit_bias=soon))

    assert isinstance(json.loads(text), dict)


def test_the_whole_answer_ends_without_another_lap(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()

    machine.ask("r", schema({"const": "boat"}))

    rows = [s for frame in machine.pipeline.sent for s in frame.sequences]
    tokens = machine.pipeline.tokens(RequestId("r"))
    assert sum(s.logits for s in rows) == len(tokens)


def test_a_model_without_an_end_token_ends_where_its_grammar_does(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(ends=())

    assert json.loads(machine.ask("r", schema({"enum": [1, 2]}))) in (1, 2)
    assert machine.end("r") == (FinishReason.STOP, "")


def test_max_tokens_may_cut_the_answer_short_and_the_finish_says_so(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()

    text = machine.ask("r", schema({"const": "a long constant"}), max_tokens=3)

    assert '"a long constant"'.startswith(text)
    assert machine.end("r") == (FinishReason.LENGTH, "")


def test_an_answer_that_is_whole_at_its_last_token_stops_rather_than_runs_out(
    make_machine: Callable[..., Machine],
) -> None:
    tokens = len(make_machine().tokenizer.encode('"ab"', add_special=False))
    machine = make_machine()

    assert machine.ask("r", schema({"const": "ab"}), max_tokens=tokens) == '"ab"'
    assert machine.end("r") == (FinishReason.STOP, "")


def test_log_probabilities_are_the_models_own(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()

    machine.ask("r", schema({"const": 7}), sampling=SamplingParams(logprobs=2))

    token = machine.pipeline.deltas[RequestId("r")][0].tokens[0]
    assert token.token not in {t.token for t in token.top}  # what the model wanted was not allowed
    assert token.logprob < token.top[0].logprob


def test_neighbours_without_a_grammar_are_not_touched_by_one(make_machine: Callable[..., Machine]) -> None:
    alone, beside = make_machine(), make_machine()
    free = alone.ask("free", None, max_tokens=20)
    beside.pipeline.submit(msgspec.structs.replace(_request("json"), grammar=JSON_OBJECT))

    assert beside.ask("free", None, max_tokens=20) == free
    assert not any(d.constrained for d in beside.pipeline.deltas[RequestId("free")])
    assert all(d.constrained for d in beside.pipeline.deltas[RequestId("json")] if d.tokens)


def test_a_wrong_schema_fails_its_request_alone(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()

    machine.ask("bad", schema({"not": {}}))

    assert machine.end("bad") == (FinishReason.ERROR, InvalidRequestError.code)
    assert json.loads(machine.ask("good", schema(BOUNDED)))["name"] is not None


def test_ignoring_the_end_and_following_a_grammar_contradict_each_other(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()

    machine.ask("r", JSON_OBJECT, ignore_eos=True)

    assert machine.end("r") == (FinishReason.ERROR, InvalidRequestError.code)


def test_a_last_stage_that_knows_no_grammars_is_found_out(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    pipeline = machine.pipeline
    pipeline.submit(_request("r"))
    while not any(isinstance(given, TokensArrived) for *_, given in pipeline._queue):
        pipeline.turn()
    pipeline._queue = [
        (at_s, n, stage, _as_of_old(given) if isinstance(given, TokensArrived) else given)
        for at_s, n, stage, given in pipeline._queue
    ]

    pipeline.run()

    assert machine.end("r") == (FinishReason.ERROR, "unsupported_version")
    assert "older version" in pipeline.deltas[RequestId("r")][-1].error


def test_a_grammar_survives_the_wire_and_travels_once(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    machine.ask("r", JSON_OBJECT)

    opening = [frame for frame in machine.pipeline.sent if frame.opened]
    assert [o.grammar for frame in opening for o in frame.opened] == [JSON_OBJECT]
    assert decode_stage_frame(encode(opening[0])) == opening[0]
    submit = Submit(request=_request("r"))
    assert decode_gateway_message(encode(submit)) == submit


def _request(name: str) -> GenerateRequest:
    return GenerateRequest(
        request=RequestId(name), deployment=DeploymentId("m"), prompt=(5, 6, 7), max_tokens=40, grammar=JSON_OBJECT
    )


def _as_of_old(given: TokensArrived) -> TokensArrived:
    """As a stage sends it that was there before grammars."""
    entries = tuple(msgspec.structs.replace(entry, bound=Bound.FREE) for entry in given.frame.tokens)
    return msgspec.structs.replace(given, frame=msgspec.structs.replace(given.frame, tokens=entries))


@pytest.mark.parametrize("off_by", [0, 1], ids=["right", "now and then wrong"])
def test_guesses_change_no_answer_that_follows_a_grammar(make_machine: Callable[..., Machine], off_by: int) -> None:
    plain, guessing = make_machine(), make_machine(guesses=6)
    answer = plain.ask("a", schema(BOUNDED))
    ids = plain.pipeline.tokens(RequestId("a"))
    foretold = tuple(i + off_by * (n % 5 == 4) for n, i in enumerate(ids))

    assert guessing.ask("a", schema(BOUNDED), predicted=foretold) == answer
    deltas = guessing.pipeline.deltas[RequestId("a")]
    assert guessing.end("a") == plain.end("a")
    assert sum(d.accepted for d in deltas) > 0
    assert sum(bool(d.tokens) for d in deltas) < len(ids)
