"""What every matcher keeps, over every kind of tokenizer that we read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from shoal.errors import InvalidRequestError, RequestTooLargeError, ShoalError, UnsupportedVersionError
from shoal.model.tokenizer import Tokenizer, tokenizer_files_from_gguf
from shoal.runtime.backend.guided import GuidedGrammars, validate
from shoal.runtime.grammar import JSON_OBJECT, MAX_GRAMMAR_CHARS, Grammar, Matcher, NoGrammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "boats": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "boats"],
    "additionalProperties": False,
}
KINDS = ["byte_level", "prefix", "bare"]


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value))


def regex(pattern: str) -> Grammar:
    return Grammar(kind="regex", text=pattern)


class Model:
    """A tokenizer with its grammars; its logits have five entries more than it has tokens, as in padded models."""

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.vocabulary = tokenizer.vocabulary + 5
        self.grammars = GuidedGrammars(lambda: tokenizer, self.vocabulary, ends)

    def walk(self, matcher: Matcher, random: Random, most: int = 400) -> list[int]:
        """Draw allowed tokens until the answer is complete."""
        output: list[int] = []
        while not matcher.complete(output):
            ids = np.flatnonzero(matcher.allowed(output))
            assert ids.size
            output.append(int(random.choice(ids)))
            assert len(output) < most, "the answer does not end"
        return output

    def text(self, output: list[int]) -> str:
        return b"".join(map(self.tokenizer.token_bytes, output)).decode()


@pytest.fixture(params=[(kind, ends) for kind in KINDS for ends in [(1,), (1, 0), ()]], ids=str)
def model(request: pytest.FixtureRequest, small_tokenizer: Callable[[str], Tokenizer]) -> Model:
    kind, ends = request.param
    return Model(small_tokenizer(kind), ends)


def test_whatever_is_drawn_is_what_the_schema_says(model: Model) -> None:
    for seed in range(10):
        output = model.walk(model.grammars.matcher(schema(PERSON)), Random(seed))

        person = json.loads(model.text(output))
        assert list(person) == ["name", "boats"]  # in the order of the schema
        assert len(person["name"]) <= 8
        assert 0 <= person["boats"] <= 99


@pytest.mark.parametrize("pattern", ["(boat|ship)s?", r"[0-9]{2}:[0-9]{2}", "æ°´|水ü{2,3}"])
def test_whatever_is_drawn_matches_the_expression(model: Model, pattern: str) -> None:
    for seed in range(5):
        output = model.walk(model.grammars.matcher(regex(pattern)), Random(seed))

        assert re.fullmatch(pattern, model.text(output))


def test_whatever_is_drawn_is_of_the_language(model: Model) -> None:
    lark = 'start: "Boat" (" " NUMBER)+ "."\nNUMBER: /[0-9]{1,3}/'

    output = model.walk(model.grammars.matcher(Grammar(kind="lark", text=lark)), Random(3))

    assert re.fullmatch(r"Boat( [0-9]{1,3})+\.", model.text(output))


def test_what_is_allowed_depends_on_the_output_alone(model: Model) -> None:
    whole = model.walk(model.grammars.matcher(schema(PERSON)), Random(5))
    other = model.walk(model.grammars.matcher(schema(PERSON)), Random(6))
    used = model.grammars.matcher(schema(PERSON))
    random = Random(7)

    for _ in range(30):  # to and fro, and over to another answer and back, as after rejected drafts
        output = random.choice([whole, other])[: random.randrange(len(whole))]
        fresh = model.grammars.matcher(schema(PERSON))
        assert used.complete(output) == fresh.complete(output)
        if not used.complete(output):
            assert (used.allowed(output) == fresh.allowed(output)).all()


def test_a_whole_answer_is_complete_and_nothing_before_it_is(model: Model) -> None:
    matcher = model.grammars.matcher(schema(PERSON))
    whole = model.walk(matcher, Random(8))

    assert [matcher.complete(whole[:n]) for n in range(len(whole) + 1)] == [False] * len(whole) + [True]


def test_an_answer_that_may_end_or_go_on_is_ended_by_an_end_token(small_tokenizer: Callable[[str], Tokenizer]) -> None:
    model = Model(small_tokenizer("byte_level"), (1, 0))
    matcher = model.grammars.matcher(regex("a+"))
    a = model.tokenizer.encode("a", add_special=False)[0]

    assert set(np.flatnonzero(matcher.allowed([a]))) >= {0, 1, a}
    assert not matcher.allowed([])[[0, 1]].any()
    assert not matcher.complete([a])
    assert matcher.complete([a, 1])
    assert matcher.complete([a, 0])


def test_tokens_beyond_the_tokenizer_and_special_ones_are_never_allowed_in_a_text(model: Model) -> None:
    allowed = model.grammars.matcher(regex("(.|\n)+")).allowed([])

    assert allowed.shape == (model.vocabulary,)
    assert not allowed[model.tokenizer.vocabulary :].any()
    assert not allowed[sorted(model.tokenizer.special.values())].any()


def test_an_output_that_breaks_the_grammar_is_an_error_and_the_next_question_is_answered(model: Model) -> None:
    matcher = model.grammars.matcher(schema(PERSON))
    a = model.tokenizer.encode("a", add_special=False)[-1]

    with pytest.raises(ShoalError, match="does not follow its grammar"):
        matcher.allowed([a])

    assert matcher.allowed([]).any()


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (schema({"type": "object", "not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (schema({"type": "objekt"}), "Invalid type: objekt"),
        (schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (schema({"$ref": "https://example.com/x"}), "https://example.com/x"),
        (schema({"type": "integer", "minimum": 5, "maximum": 2}), "minimum \\(5\\) is greater than maximum \\(2\\)"),
        (schema([1]), "must be an object or true"),
        (schema(False), "must be an object or true"),
        (Grammar(kind="json_schema", text="{"), "not JSON"),
        (Grammar(kind="json_schema", text='{"type":"object"}}], "x": [{}'), "not JSON"),
        (regex("(a"), "unclosed group"),
        (Grammar(kind="lark", text="start: foo"), 'unknown name: "foo"'),
    ],
)
def test_a_grammar_that_nothing_can_follow_is_named_at_the_door_and_at_the_last_stage(
    small_tokenizer: Callable[[str], Tokenizer], grammar: Grammar, reason: str
) -> None:
    matcher = Model(small_tokenizer("byte_level"), (1,)).grammars.matcher(grammar)

    with pytest.raises(InvalidRequestError, match=reason) as at_the_door:
        validate(grammar)
    with pytest.raises(InvalidRequestError, match=reason):
        matcher.allowed([])
    assert at_the_door.value.param == "response_format"


def test_a_grammar_that_is_too_long_is_refused_with_the_numbers() -> None:
    with pytest.raises(RequestTooLargeError, match=r"262,145 characters, 262,144"):
        validate(regex("a" * (MAX_GRAMMAR_CHARS + 1)))


def test_a_kind_of_a_later_version_is_refused(small_tokenizer: Callable[[str], Tokenizer]) -> None:
    matcher = Model(small_tokenizer("byte_level"), (1,)).grammars.matcher(Grammar(kind="poem", text="haiku"))

    with pytest.raises(UnsupportedVersionError, match="poem"):
        matcher.allowed([])


def test_a_model_without_a_tokenizer_refuses_when_it_is_asked() -> None:
    matcher = NoGrammars().matcher(JSON_OBJECT)

    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        matcher.allowed([])
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        matcher.complete([])


@pytest.mark.model
def test_a_real_vocabulary_draws_json_objects(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer.from_files(tokenizer_files_from_gguf(smollm2_gguf))
    model = Model(tokenizer, (tokenizer.special["<|im_end|>"],))
    for seed in range(5):
        output = model.walk(model.grammars.matcher(schema(PERSON)), Random(seed))

        assert set(json.loads(model.text(output))) == {"name", "boats"}


@pytest.mark.model
def test_where_the_grammar_leaves_no_choice_the_models_own_token_is_taken(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer.from_files(tokenizer_files_from_gguf(smollm2_gguf))
    model = Model(tokenizer, (tokenizer.special["<|im_end|>"],))

    output = model.walk(model.grammars.matcher(regex("The weather in Lisbon is")), Random(1))

    assert output == tokenizer.encode("The weather in Lisbon is", add_special=False)
