"""From logits to a token: a pure function of (logits, parameters, history, position) (ADR 8).

The draw is an exponential race (the Gumbel-max trick without its second logarithm): every token that survives the filters
gets an exponential waiting time with rate p, and the first to arrive wins; its probability is p.  The waiting time comes from a
counter-based hash of (seed, position, token): there is no generator state to move between stages, a replay draws the
same token, and changing the probability of a token that would not have won does not change the winner.  Inverse-CDF sampling
was rejected for that last reason: it shifts every token behind the changed one, so that a last-bit difference
between two engines flips answers far more often.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) indexed by the token:
`u = mix(start + (token + 1) * GOLDEN)`, `start = mix(mix(seed) + position * GOLDEN)`, all modulo 2**64; the upper 53 bits
plus one half give a uniform number strictly between 0 and 1.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidRequestError, ShoalError
from shoal.runtime.request import Array, SampledToken, SamplingParams, TokenLogprob

Logits = NDArray[np.float32]
Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
FIRST_RANKED = 64
MAX_LOGPROBS = 64


def sample(
    logits: Array, params: SamplingParams, *, prompt: Sequence[int] = (), output: Sequence[int] = (), position: int
) -> SampledToken:
    """Choose the token at *position* from `logits [V]`; *prompt* and *output* are the ids before it.

    Equal scores go to the lowest id.  Log-probabilities are the model's own: natural, before bias, penalties, temperature and
    filters.  Raises ShoalError when a logit is not finite: the model's numbers are broken, not the request.
    """
    scores = np.asarray(logits, dtype=np.float32)
    _check_finite(scores, position)
    adjusted = _adjust(scores, params, prompt, output)
    token = int(adjusted.argmax()) if params.temperature == 0 else _draw(adjusted, params, position)
    if params.logprobs is None:
        return SampledToken(token=token, position=position)
    logprob, top = _logprobs(scores, token, params.logprobs)
    return SampledToken(token=token, position=position, logprob=logprob, top=top)


def check_sampling(params: SamplingParams, vocabulary: int) -> None:
    """Raise InvalidRequestError, naming the field, unless *params* make sense for a model of *vocabulary* ids (0: unknown)."""
    bounds = {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (0.01, 100.0),
        "presence_penalty": (-100.0, 100.0),
        "frequency_penalty": (-100.0, 100.0),
        "top_k": (0, MASK64),
        "logprobs": (0, MAX_LOGPROBS),
    }
    for name, (low, high) in bounds.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            raise InvalidRequestError(f"{name} is {value}, outside [{low}, {high}]", param=name)
    for token, bias in params.logit_bias.items():
        if token < 0 or (vocabulary and token >= vocabulary) or not math.isfinite(bias):
            raise InvalidRequestError(
                f"logit_bias {token}: {bias} needs a token id in [0, {vocabulary}) and a finite bias",
                param="logit_bias",
            )


def uniforms(seed: int, position: int, tokens: Ids) -> Floats:
    """One number in (0, 1) per token id: a pure function of its three arguments."""
    start = _mix_int((_mix_int(seed & MASK64) + position * GOLDEN) & MASK64)
    # Wrapping is the point of the arithmetic; numpy stays silent about it for arrays.
    x = np.uint64(start) + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & MASK64
    x = ((x ^ (x >> 27)) * MIX_2) & MASK64
    return x ^ (x >> 31)


def _check_finite(logits: Logits, position: int) -> None:
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).sum())
        raise ShoalError(
            f"{bad} of {logits.size} logits at position {position} are NaN or infinite",
            hint="the model's numbers overflowed: import it again with float32 activations, or check its file",
        )


def _adjust(logits: Logits, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Logits:
    """Bias, then repetition penalty (Keskar et al. 2019), then presence and frequency penalties (OpenAI API reference)."""
    repeats = params.repetition_penalty != 1.0
    counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    if not (params.logit_bias or repeats or counts):
        return logits
    adjusted = logits.copy()
    if params.logit_bias:
        adjusted[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if repeats and (prompt or output):
        seen = np.unique(np.array([*prompt, *output], np.int64))
        old = adjusted[seen]
        adjusted[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if counts and output:
        said, times = np.unique(np.array(output, np.int64), return_counts=True)
        adjusted[said] -= (params.presence_penalty + params.frequency_penalty * times).astype(np.float32)
    return adjusted


def _draw(adjusted: Logits, params: SamplingParams, position: int) -> int:
    scaled = (adjusted - adjusted.max()) / np.float32(params.temperature)
    kept = _support(scaled, params)
    waiting = -np.log(uniforms(params.seed, position, kept))
    # A weight that underflows to 0 waits forever; the largest is exp(0), so the minimum is finite.
    with np.errstate(divide="ignore", over="ignore"):
        return int(kept[(waiting / np.exp(scaled[kept])).argmin()])


def _support(scaled: Logits, params: SamplingParams) -> Ids:
    """Ids that survive top-k, top-p and min-p, ascending; *scaled* has its maximum at 0."""
    ids = np.arange(scaled.size, dtype=np.int64)
    if params.top_k or params.top_p < 1.0:
        ids = np.sort(_ranked_support(scaled, params))
    if params.min_p > 0:
        ids = ids[scaled[ids] >= math.log(params.min_p)]
    return ids


def _ranked_support(scaled: Logits, params: SamplingParams) -> Ids:
    limit = min(params.top_k or scaled.size, scaled.size)
    if params.top_p >= 1.0:
        return _ranked(scaled, limit)
    # Sorting a vocabulary costs milliseconds and nearly all mass lies in a few tokens: rank more only while it does not.
    count = limit if params.top_k else min(FIRST_RANKED, limit)
    total = None if params.top_k else float(np.exp(scaled).sum(dtype=np.float64))
    while True:
        ranked = _ranked(scaled, count)
        mass = np.exp(scaled[ranked]).cumsum(dtype=np.float64)
        goal = params.top_p * (mass[-1] if total is None else total)
        if mass[-1] >= goal or count == limit:
            return ranked[: int(mass.searchsorted(goal, side="left")) + 1]
        count = limit if count > FIRST_RANKED else min(count * 64, limit)


def _ranked(scores: Logits, count: int) -> Ids:
    """The *count* best ids, best first, equal scores by ascending id."""
    count = min(count, scores.size)
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: count - above.size]
    ids = np.concatenate([above, level])
    return ids[np.lexsort((ids, -scores[ids]))]


def _logprobs(logits: Logits, token: int, count: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    highest = logits.max()
    log_total = float(highest) + math.log(np.exp(logits - highest).sum(dtype=np.float64))
    top = tuple(TokenLogprob(token=int(i), logprob=float(logits[i]) - log_total) for i in _ranked(logits, count))
    return float(logits[token]) - log_total, top
