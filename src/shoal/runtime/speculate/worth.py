"""Whether guessing pays, and how many ids: a forecast from what laps took and guesses were worth, with a bound on what it may lose.

A lap with k guessed rows gives 1 + p + p^2 + ... + p^k tokens on the mean when each guess is right with chance p (Leviathan et al.,
"Fast Inference from Transformers via Speculative Decoding", 2023, equation 1), and takes the plain lap and k times the
price of a row.  Over a thin link the lap is long and a row cheap; in one process it is the other way round.  Both are measured
here and never assumed: the first guesses are few, and every `REFRESH`th lap of a kind goes without, so that the plain lap
stays known.

Forecasts err, so losses are counted: a lap that took longer than plain laps would have for its tokens adds to `lost_s`, one
that took less takes away, and there is no guessing while more than `MOST_LOST` of all time is lost.
"""

from dataclasses import dataclass, field

import msgspec

MOST_LOST = 0.02
"""Share of the time of all laps; with one lap that errs it stays below the twentieth that is promised."""
REFRESH = 24
LEAST_GAIN = 1.05
"""Bets on less are not worth what forecasts err."""
_NEWEST = 0.15
_ROW_SHARE = 0.25
"""The price of a row as a share of a lap, before any is known."""
_TRIES = 6.0
"""So many guesses weigh as much as what is assumed before them."""
_FORGET = 0.97
_FADE = 0.9
_PRIOR = ((16, 0.8), (8, 0.65), (4, 0.45), (0, 0.25))
"""Chance that a guess is right, by how many ids matched where it was found."""
_PREDICTED = 0.8
PREDICTED, DRAFTED = -1, -2
"""Kinds of guesses that no match was found for: what the client foretold, and what a draft model says."""
_DRAFTED = 0.7
_AHEAD_SHARE = 0.05
"""What a draft model at work adds to a lap, as a share of it, before that is known."""


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What a lap of the pipeline takes without guesses, and each guessed row more, and a draft model that runs beside it."""

    lap_s: float
    row_s: float
    ahead_s: float = 0.0


def expected_tokens(chance: float, guesses: int) -> float:
    """Tokens of one lap with *guesses* rows behind the known one."""
    return 1.0 + sum(chance**i for i in range(1, guesses + 1))


def best_length(chance: float, prices: Prices, most: int, *, others: int = 0) -> int:
    """How many ids to guess for one sequence while *others* share its frame and wait for its rows; 0 where none pay."""
    if prices.lap_s <= 0:
        return 0

    def rate(guesses: int) -> float:
        return (others + expected_tokens(chance, guesses)) / (prices.lap_s + guesses * prices.row_s)

    best = max(range(most + 1), key=rate)
    return best if rate(best) > LEAST_GAIN * rate(0) else 0


def ahead_tokens(chance: float, guesses: int) -> float:
    """Tokens of a lap on the mean where a draft model runs ahead (`ahead`): guesses are there if all before them were right."""
    guessed = guessed_laps(chance, guesses)
    return 1.0 - guessed + guessed * expected_tokens(chance, guesses)


def guessed_laps(chance: float, guesses: int) -> float:
    """Share of laps that have guesses: they follow a lap whose token was foretold, all of its own guesses being right."""
    return chance / (1.0 + chance - chance ** (guesses + 1))


def ahead_length(chance: float, prices: Prices, most: int, *, others: int = 0) -> int:
    """How many ids a draft model should foretell for one sequence; 0 where it does not pay to ask it."""
    if prices.lap_s <= 0:
        return 0

    def rate(guesses: int) -> float:
        rows = guesses * guessed_laps(chance, guesses)
        return (others + ahead_tokens(chance, guesses)) / (prices.lap_s + prices.ahead_s + rows * prices.row_s)

    plain = (others + 1.0) / prices.lap_s
    best = max(range(1, most + 1), key=rate, default=0)
    return best if best and rate(best) > LEAST_GAIN * plain else 0


@dataclass(slots=True)
class Chances:
    """How often guesses of a kind were right.  A kind is a class of matches: long ones are seldom wrong."""

    tried: dict[int, float] = field(default_factory=dict)
    right: dict[int, float] = field(default_factory=dict)

    def chance(self, kind: int, prior: float) -> float:
        """That the next guess is right, if those before it were; *prior* is what to assume of a kind that was not tried."""
        return (self.right.get(kind, 0.0) + _TRIES * prior) / (self.tried.get(kind, 0.0) + _TRIES)

    def judged(self, kind: int, right: int, guessed: int) -> None:
        """Of *guessed* ids the first *right* were so; what comes after a wrong one says nothing."""
        self.tried[kind] = _FORGET * self.tried.get(kind, 0.0) + right + (right < guessed)
        self.right[kind] = _FORGET * self.right.get(kind, 0.0) + right

    def fade(self, kind: int) -> None:
        """Believe a little less of what is known of a kind."""
        self.tried[kind] = _FADE * self.tried.get(kind, 0.0)
        self.right[kind] = _FADE * self.right.get(kind, 0.0)


def kind_of(match: int, *, predicted: bool) -> int:
    """The class of a guess whose place was found by *match* ids, or that the client foretold."""
    return PREDICTED if predicted else next(least for least, _ in _PRIOR if match >= least)


def prior_of(kind: int) -> float:
    """What is assumed of a kind before the first guess."""
    if kind < 0:
        return _PREDICTED if kind == PREDICTED else _DRAFTED
    return next(chance for least, chance in _PRIOR if kind >= least)


@dataclass(slots=True)
class Ledger:
    """What laps took, by how many sequences shared them, and what guessing has lost."""

    laps_s: dict[int, float] = field(default_factory=dict)
    row_share: float = _ROW_SHARE
    ahead_share: float = _AHEAD_SHARE
    lost_s: float = 0.0
    spent_s: float = 0.0
    since_plain: dict[int, int] = field(default_factory=dict)

    def prices(self, sequences: int) -> Prices | None:
        """Of a lap that so many share; None while it must be learned, or learned anew, by one without guesses."""
        lap_s = self.laps_s.get(sequences)
        if lap_s is None or self.since_plain.get(sequences, 0) >= REFRESH:
            return None
        if self.lost_s > MOST_LOST * self.spent_s:
            return None
        return Prices(lap_s=lap_s, row_s=lap_s * self.row_share, ahead_s=lap_s * self.ahead_share)

    def lapped(self, took_s: float, sequences: int, guessed: int, extra: int, *, assisted: bool = False) -> None:
        """A lap of *sequences* is over: of *guessed* rows *extra* gave a token; *assisted*: a draft model ran beside it."""
        self.spent_s += took_s
        if not guessed and not assisted:
            self.since_plain[sequences] = 0
            self.laps_s[sequences] = _nearer(self.laps_s.get(sequences), took_s)
            return
        self.since_plain[sequences] = self.since_plain.get(sequences, 0) + 1
        lap_s = self.laps_s.get(sequences)
        if not lap_s:
            return
        if assisted:
            share = took_s / lap_s - 1.0 - guessed * self.row_share
            self.ahead_share = _nearer(self.ahead_share, min(2.0, max(0.0, share)))
        else:
            share = (took_s - lap_s) / (lap_s * guessed)
            self.row_share = _nearer(self.row_share, min(2.0, max(0.0, share)))
        # All sequences of the lap waited for it; the tokens that came more would have taken laps of their own.
        plain_s = lap_s * (1.0 + extra / sequences)
        self.lost_s = max(0.0, self.lost_s + took_s - plain_s)


def _nearer(known: float | None, seen: float) -> float:
    return seen if known is None else known + _NEWEST * (seen - known)
