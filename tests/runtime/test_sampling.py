import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError, ShoalError
from shoal.runtime.request import SamplingParams
from shoal.runtime.sampling import MAX_BIAS, check_sampling, sample, uniforms

LOGITS = np.array([0.1, 2.0, -1.0, 1.5, 0.7, -3.0], np.float32)


def floats(count: int) -> st.SearchStrategy[np.ndarray]:
    grid = st.integers(-80, 80).map(lambda i: i / 8)
    return st.lists(grid, min_size=count, max_size=count).map(lambda v: np.array(v, np.float32))


def draws(logits: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    """How often each token is drawn at positions 0..count-1."""
    tokens = [sample(logits, params, position=i).token for i in range(count)]
    return np.bincount(tokens, minlength=logits.size)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_temperature_zero_takes_the_most_likely_token_and_the_lowest_id_of_equals() -> None:
    assert sample(np.array([1, 3, 3, 2], np.float32), SamplingParams(), position=0).token == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    count = 6000

    seen = draws(LOGITS, SamplingParams(temperature=temperature, seed=11), count)

    expected = softmax(LOGITS / temperature) * count
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in 1,000 seeds


@pytest.mark.parametrize("temperature", [1e-320, 1e-60, 1e-46, 1e-40, 1e-9, 1e-6])
def test_a_temperature_too_small_for_the_numbers_of_the_machine_takes_the_most_likely_token(temperature: float) -> None:
    logits = np.linspace(-3, 3, 50, dtype=np.float32)[::-1].copy()
    logits[[0, 20]] = logits[[20, 0]]

    for seed in range(20):
        assert sample(logits, SamplingParams(temperature=temperature, seed=seed), position=3).token == 20


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 100.0])
def test_the_largest_biases_that_are_taken_still_leave_a_choice(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, logit_bias={7: MAX_BIAS, 8: MAX_BIAS, 9: -MAX_BIAS})
    check_sampling(params, 50)
    logits = np.zeros(50, np.float32)

    drawn = {sample(logits, msgspec.structs.replace(params, seed=seed), position=3).token for seed in range(40)}

    assert drawn == {7, 8}


def test_uniforms_are_even_and_uncorrelated_between_positions_and_seeds() -> None:
    ids = np.arange(20_000)
    here, next_position, next_seed = uniforms(5, 9, ids), uniforms(5, 10, ids), uniforms(6, 9, ids)

    assert 0 < here.min() < here.max() < 1
    assert abs(here.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(here, next_position)[0, 1]) < 0.03
    assert abs(np.corrcoef(here, next_seed)[0, 1]) < 0.03


def test_the_hash_is_splitmix64_and_so_can_never_drift_between_releases() -> None:
    # The first three outputs of the published generator for seed 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    assert uniforms(0, 0, np.arange(3)).tolist() == [((x >> 11) + 0.5) * 2.0**-53 for x in published]


@given(floats(12), st.integers(0, 2**64), st.integers(0, 10_000))
def test_the_same_arguments_give_the_same_token(logits: np.ndarray, seed: int, position: int) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=seed)

    assert sample(logits, params, position=position) == sample(logits.copy(), params, position=position)


@given(floats(12), st.integers(0, 1000), st.data())
def test_lowering_a_token_that_did_not_win_changes_nothing(logits: np.ndarray, seed: int, data: st.DataObject) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    winner = sample(logits, params, position=3).token
    loser = data.draw(st.integers(0, 11).filter(lambda i: i != winner))
    # The maximum fixes the scale of rounding; leave it where it is.
    lowered = logits.copy()
    lowered[loser] -= 2.0 if logits[loser] < logits.max() else 0.0

    assert sample(lowered, params, position=3).token == winner


@given(floats(16), st.integers(1, 16), st.integers(0, 500))
def test_top_k_draws_only_from_the_k_best_with_equals_by_id(logits: np.ndarray, k: int, seed: int) -> None:
    best = sorted(range(16), key=lambda i: (-logits[i], i))[:k]

    assert sample(logits, SamplingParams(temperature=3.0, top_k=k, seed=seed), position=0).token in best


def nucleus(logits: np.ndarray, top_p: float) -> list[int]:
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))
    mass = softmax(logits)[order].cumsum()
    return order[: int((mass < top_p - 1e-6).sum()) + 1]


@given(floats(16), st.floats(0.05, 0.99), st.integers(0, 500))
def test_top_p_draws_only_from_the_smallest_set_that_holds_the_mass(
    logits: np.ndarray, top_p: float, seed: int
) -> None:
    # Rounding may move the edge by one token when the mass falls exactly on it.
    allowed = nucleus(logits, min(1.0, top_p + 1e-5))

    assert sample(logits, SamplingParams(temperature=1.0, top_p=top_p, seed=seed), position=0).token in allowed


@settings(max_examples=20)
@given(st.floats(0.3, 0.9))
def test_top_p_reaches_every_token_of_a_flat_vocabulary_that_it_should(top_p: float) -> None:
    """A nucleus far wider than what is ever sorted is still complete."""
    logits = np.zeros(5000, np.float32)
    params = SamplingParams(temperature=1.0, top_p=top_p)

    tokens = [sample(logits, params, position=i).token for i in range(60)]

    assert max(tokens) < math.ceil(5000 * top_p) + 1
    assert max(tokens) > 5000 * top_p * 0.7


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([0.01, 1.0, 8.0]), st.sampled_from([0, 1, 8]), st.data())
def test_the_winner_of_a_large_vocabulary_is_that_of_a_race_among_its_sorted_tokens(
    seed: int, spread: float, steps: int, data: st.DataObject
) -> None:
    """Filters by sorting everything, as they are defined; steps of 1/8 or 1 make many scores equal."""
    logits = ((uniforms(seed, 0, np.arange(40_000)) - 0.5) * spread).astype(np.float32)
    logits = np.round(logits * steps) / np.float32(steps) if steps else logits
    top_k, top_p = data.draw(st.sampled_from([0, 7, 20_000])), data.draw(st.floats(0.01, 0.99))
    scaled = logits - logits.max()
    order = np.lexsort((np.arange(logits.size), -scaled))[: top_k or None]
    mass = np.exp(scaled[order]).cumsum(dtype=np.float64)
    # Sums in another order may differ in their last bits: an edge as near as that may lie on either side of a token.
    near = [int(mass.searchsorted(top_p * float(mass[-1]) * (1 + off))) + 1 for off in (-1e-9, 0, 1e-9)]
    races = [-np.log(uniforms(seed, 3, order[:n])) / np.exp(scaled[order[:n]]) for n in near]

    token = sample(logits, SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed), position=3).token

    assert token in {int(order[race.argmin()]) for race in races}


def test_a_range_of_scores_too_narrow_to_divide_is_still_a_nucleus() -> None:
    logits = np.zeros(2000, np.float32)
    logits[::2] = np.float32(1e-45)

    tokens = [sample(logits, SamplingParams(temperature=1.0, top_p=0.4, seed=7), position=i).token for i in range(40)]

    assert all(token % 2 == 0 and token < 1602 for token in tokens)


@given(floats(16), st.floats(0.01, 1.0), st.integers(0, 500))
def test_min_p_draws_only_tokens_near_the_best(logits: np.ndarray, min_p: float, seed: int) -> None:
    token = sample(logits, SamplingParams(temperature=1.0, min_p=min_p, seed=seed), position=0).token

    probabilities = softmax(logits)
    assert probabilities[token] >= probabilities.max() * min_p * (1 - 1e-5)


def test_filters_apply_after_top_k_so_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two best, the first holds 4/7 = 57 %: top-p 0.5 leaves it alone (of all four it holds only 40 %).
    seen = draws(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.5), 200)

    assert seen.tolist() == [200, 0, 0, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    params = SamplingParams(repetition_penalty=1.5)

    assert sample(logits, params, prompt=[0], position=1).token == 1
    assert sample(logits, params, output=[0], position=1).token == 1
    assert sample(np.array([-1.0, -1.2, -9.0], np.float32), params, prompt=[0], position=1).token == 1


def test_presence_counts_once_and_frequency_counts_each_time_and_neither_sees_the_prompt() -> None:
    logits = np.array([2.0, 1.0], np.float32)

    def chosen(output: list[int], prompt: list[int], **kw: float) -> int:
        return sample(logits, SamplingParams(**kw), prompt=prompt, output=output, position=9).token

    assert chosen([0], [], presence_penalty=1.1) == 1
    assert chosen([0, 0, 0], [], presence_penalty=0.9) == 0
    assert chosen([0, 0, 0], [], frequency_penalty=0.4) == 1
    assert chosen([0], [], frequency_penalty=0.4) == 0
    assert chosen([], [0, 0, 0], frequency_penalty=2.0, presence_penalty=2.0) == 0


def test_bias_moves_a_token_before_everything_else() -> None:
    params = SamplingParams(logit_bias={2: 100.0}, temperature=1.0, top_k=1)

    assert sample(LOGITS, params, position=0).token == 2


def test_logprobs_are_the_models_own_before_bias_and_temperature() -> None:
    params = SamplingParams(temperature=2.0, logit_bias={5: 100.0}, logprobs=2)

    drawn = sample(LOGITS, params, position=0)

    expected = np.log(softmax(LOGITS))
    assert drawn.token == 5
    assert drawn.logprob == pytest.approx(expected[5], abs=1e-5)
    assert [t.token for t in drawn.top] == [1, 3]
    assert [t.logprob for t in drawn.top] == pytest.approx(expected[[1, 3]].tolist(), abs=1e-5)


def test_no_logprobs_are_made_when_none_are_asked_for() -> None:
    assert sample(LOGITS, SamplingParams(), position=0).logprob is None
    assert sample(LOGITS, SamplingParams(logprobs=0), position=0).top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_an_error_that_counts_them(bad: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad

    with pytest.raises(ShoalError, match="1 of 6 logits at position 7"):
        sample(logits, SamplingParams(temperature=1.0), position=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("top_p", 1.5), ("min_p", -1), ("top_k", -1), ("repetition_penalty", 0),
     ("logprobs", 1000), ("logit_bias", {99: 1.0}), ("logit_bias", {1: math.inf}),
     ("logit_bias", {1: 1e39}), ("logit_bias", {1: math.nan})],
)  # fmt: skip
def test_parameters_that_make_no_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_sampling(SamplingParams(**{field: value}), vocabulary=50)

    assert caught.value.param == field


@given(floats(60), st.sets(st.integers(0, 59), min_size=1), st.integers(0, 2**40))
def test_the_draw_among_some_tokens_is_that_of_a_vocabulary_without_the_others(
    logits: np.ndarray, some: set[int], seed: int
) -> None:
    allowed = np.isin(np.arange(60), list(some))
    barred = {token: -MAX_BIAS for token in range(60) if not allowed[token]}
    filtered = SamplingParams(temperature=0.8, top_k=3, top_p=0.7, min_p=0.05, repetition_penalty=1.3, logprobs=2)
    for params in [SamplingParams(), SamplingParams(temperature=1.5, seed=seed), filtered]:
        drawn = sample(logits, params, prompt=(1, 2), position=seed % 999, allowed=allowed)
        assert drawn.token in some
        biased = msgspec.structs.replace(params, logit_bias=barred)
        assert drawn == sample(logits, biased, prompt=(1, 2), position=seed % 999)


def test_a_grammar_that_leaves_no_token_is_an_error() -> None:
    with pytest.raises(ShoalError, match="allows no token at position 4"):
        sample(LOGITS, SamplingParams(), position=4, allowed=np.zeros(LOGITS.size, np.bool_))
