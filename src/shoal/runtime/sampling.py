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
from collections.abc import Iterator, Sequence

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
SORTED = 256
"""So few scores are sorted; more go into BINS bins first."""
BINS = 1024
TILE = 16384
"""So many tokens at once: their temporaries stay in a core's cache, those of a vocabulary are fresh megabytes at every step."""
MAX_LOGPROBS = 64
LEAST_TEMPERATURE = 1e-6
"""Below, the draw is the best token anyway, and float32 runs out of numbers."""
MAX_BIAS = 1e30
"""Far beyond any logit, and still finite when two of them meet and are divided by the least temperature."""


def sample(
    logits: Array,
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    position: int,
    allowed: NDArray[np.bool_] | None = None,
) -> SampledToken:
    """Choose the token at *position* from `logits [V]`; *prompt* and *output* are the ids before it.

    Only *allowed* tokens are drawn, as if the vocabulary had no others; their waiting times stay what they are.  Equal scores go
    to the lowest id.  Log-probabilities are the model's own: natural, before bias, penalties, temperature, filters and
    grammar.  Raises ShoalError when a logit is not finite: the model's numbers are broken, not the request.
    """
    scores = np.asarray(logits, dtype=np.float32)
    _check_finite(scores, position)
    adjusted = _adjust(scores, params, prompt, output)
    token = _choose(adjusted, params, position) if allowed is None else _among(adjusted, params, position, allowed)
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
        if token < 0 or (vocabulary and token >= vocabulary) or not abs(bias) <= MAX_BIAS:
            raise InvalidRequestError(
                f"logit_bias {token}: {bias} needs a token id in [0, {vocabulary}) and a bias in [-{MAX_BIAS:g}, {MAX_BIAS:g}]",
                param="logit_bias",
            )


def uniforms(seed: int, position: int, tokens: Ids) -> Floats:
    """One number in (0, 1) per token id: a pure function of its three arguments."""
    start = _mix_int((_mix_int(seed & MASK64) + position * GOLDEN) & MASK64)
    # Wrapping is the point of the arithmetic; numpy stays silent about it for arrays.  In place: a vocabulary is megabytes.
    x = tokens.astype(np.uint64)
    x *= np.uint64(GOLDEN)
    x += np.uint64((start + GOLDEN) & MASK64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(MIX_2)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(11)
    u = x.view(np.int64).astype(np.float64)  # signed integers convert several times as fast
    u += 0.5
    u *= 2.0**-53
    return u


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & MASK64
    x = ((x ^ (x >> 27)) * MIX_2) & MASK64
    return x ^ (x >> 31)


def _check_finite(logits: Logits, position: int) -> None:
    # Where the least and the greatest are finite all are; both find NaN first.  Cheaper than an answer for each.
    if logits.size and not (math.isfinite(logits[logits.argmin()]) and math.isfinite(logits[logits.argmax()])):
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


def _choose(adjusted: Logits, params: SamplingParams, position: int, names: Ids | None = None) -> int:
    """Index of the token; *names* are the ids where *adjusted* holds only some of the vocabulary."""
    if params.temperature < LEAST_TEMPERATURE:
        return int(adjusted.argmax())
    return _draw(adjusted, params, position, names)


def _among(adjusted: Logits, params: SamplingParams, position: int, allowed: NDArray[np.bool_]) -> int:
    """Choose among the *allowed* alone: filters would stumble over infinities, and mostly few are left."""
    names = np.flatnonzero(allowed[: adjusted.size])
    if not names.size:
        raise ShoalError(
            f"the grammar allows no token at position {position} that this model has",
            hint="its vocabulary cannot write what the grammar wants: loosen the grammar",
        )
    return int(names[0 if names.size == 1 else _choose(adjusted[names], params, position, names)])


def _draw(adjusted: Logits, params: SamplingParams, position: int, names: Ids | None = None) -> int:
    scaled = (adjusted - adjusted.max()) / np.float32(params.temperature)
    floor, last_tie = _cutoff(scaled, params)
    first, winner = math.inf, 0
    for start, part in _tiles(scaled):
        ids = start + np.flatnonzero(part >= floor)
        if ids.size and last_tie < ids[-1]:
            ids = ids[(scaled[ids] > floor) | (ids <= last_tie)]
        # A weight that underflows to 0 waits forever; the largest is exp(0), so the least wait is finite.
        with np.errstate(divide="ignore", over="ignore"):
            tokens = ids if names is None else names[ids]
            waiting = -np.log(uniforms(params.seed, position, tokens)) / np.exp(scaled[ids])
        if (soonest := waiting.min(initial=math.inf)) < first:
            first, winner = float(soonest), int(ids[waiting.argmin()])
    return winner


def _tiles(values: Logits) -> Iterator[tuple[int, Logits]]:
    for start in range(0, values.size, TILE):
        yield start, values[start : start + TILE]


def _cutoff(scaled: Logits, params: SamplingParams) -> tuple[float, int]:
    """Score and id of the last token that survives top-k, top-p and min-p; *scaled* has its maximum at 0.

    Better scores survive, and equal ones with lower ids.
    """
    last = _last_of(scaled, params.top_k) if 0 < params.top_k < scaled.size else None
    if params.top_p < 1.0:
        ids = None if last is None else np.flatnonzero(_survives(scaled, last))
        border = _nucleus(scaled if ids is None else scaled[ids], params.top_p)
        last = border if ids is None else int(ids[border])
    floor = -math.inf if last is None else float(scaled[last])
    least = float(np.float32(math.log(params.min_p))) if params.min_p > 0 else -math.inf
    return (floor, scaled.size if last is None else last) if floor >= least else (least, scaled.size)


def _nucleus(scores: Logits, top_p: float) -> int:
    """Index of the last of the fewest best scores whose mass reaches *top_p* of the whole.

    Sorting a large and flat vocabulary takes tens of milliseconds, and only the border matters: sum the mass in bins by
    score, go on with the bin that holds the border, and sort what is left of it.
    """
    ids, above, goal = np.empty(0, np.int64), 0.0, -1.0
    values, size = scores, 0
    while values.size != size:
        size = values.size
        bins = _Bins(values)
        sums = above + bins.mass().cumsum()
        goal = top_p * float(sums[-1]) if goal < 0 else goal
        found = min(int(sums.searchsorted(goal)), int(sums.searchsorted(sums[-1])))
        above = float(sums[found - 1]) if found else above
        inside = bins.members(found)
        ids = ids[inside] if ids.size else inside
        values = scores[ids]
        if ids.size <= SORTED:
            break
    order = np.argsort(-values, kind="stable")
    sums = above + np.exp(values[order]).cumsum(dtype=np.float64)
    return int(ids[order[min(int(sums.searchsorted(goal)), ids.size - 1)]])


class _Bins:
    """Values in BINS equal ranges, the highest in bin 0; a higher value is never in a later bin."""

    def __init__(self, values: Logits) -> None:
        self._values = values
        self._high = values.max()
        span = float(self._high - values.min())
        # So narrow a range that the factor overflows leaves all in one bin.
        self._factor = np.float32(min((BINS - 1) / span, float(np.finfo(np.float32).max)) if span else 0.0)

    def mass(self) -> Floats:
        """exp(value), summed per bin."""
        mass = np.zeros(BINS)
        for _, part in _tiles(self._values):
            mass += np.bincount(self._of(part), weights=np.exp(part), minlength=BINS)
        return mass

    def members(self, found: int) -> Ids:
        """Indices of the values in one bin, ascending."""
        return np.concatenate([start + np.flatnonzero(self._of(part) == found) for start, part in _tiles(self._values)])

    def _of(self, part: Logits) -> Ids:
        return np.asarray((self._high - part) * self._factor, dtype=np.int64)


def _last_of(scores: Logits, count: int) -> int:
    """Id of the last of the *count* > 0 best scores; of equal ones those with lower ids are better."""
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    better = int(np.count_nonzero(scores > threshold))
    return int(np.flatnonzero(scores == threshold)[count - better - 1])


def _survives(scores: Logits, last: int) -> NDArray[np.bool_]:
    """Which scores are as good as that of the id *last* or better."""
    kept: NDArray[np.bool_] = scores > scores[last]
    kept[np.flatnonzero(scores[: last + 1] == scores[last])] = True
    return kept


def _ranked(scores: Logits, count: int) -> Ids:
    """The *count* best ids, best first, equal scores by ascending id."""
    count = min(count, scores.size)
    if count == 0:
        return np.empty(0, np.int64)
    ids = np.flatnonzero(_survives(scores, _last_of(scores, count)))
    return ids[np.argsort(-scores[ids], kind="stable")]


def _logprobs(logits: Logits, token: int, count: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    highest = logits.max()
    log_total = float(highest) + math.log(np.exp(logits - highest).sum(dtype=np.float64))
    top = tuple(TokenLogprob(token=int(i), logprob=float(logits[i]) - log_total) for i in _ranked(logits, count))
    return float(logits[token]) - log_total, top
