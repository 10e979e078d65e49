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
_PRIOR = ((16, 0.8), (8, 0.65), (4, 0.45), (0, 0.25))
"""Chance that a guess is right, by how many ids matched where it was found."""
_PREDICTED = 0.8


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What a lap of the pipeline takes without guesses, and each guessed row more."""

    lap_s: float
    row_s: float


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


def kind_of(match: int, *, predicted: bool) -> int:
    """The class of a guess whose place was found by *match* ids, or that the client foretold."""
    return -1 if predicted else next(least for least, _ in _PRIOR if match >= least)


def prior_of(kind: int) -> float:
    """What is assumed of a kind before the first guess."""
    return _PREDICTED if kind < 0 else next(chance for least, chance in _PRIOR if kind >= least)


@dataclass(slots=True)
class Ledger:
    """What laps took, by how many sequences shared them, and what guessing has lost."""

    laps_s: dict[int, float] = field(default_factory=dict)
    row_share: float = _ROW_SHARE
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
        return Prices(lap_s=lap_s, row_s=lap_s * self.row_share)

    def lapped(self, took_s: float, sequences: int, guessed: int, extra: int) -> None:
        """A lap of *sequences* is over: of *guessed* rows *extra* gave a token."""
        self.spent_s += took_s
        if not guessed:
            self.since_plain[sequences] = 0
            self.laps_s[sequences] = _nearer(self.laps_s.get(sequences), took_s)
            return
        self.since_plain[sequences] = self.since_plain.get(sequences, 0) + 1
        lap_s = self.laps_s.get(sequences)
        if not lap_s:
            return
        share = (took_s - lap_s) / (lap_s * guessed)
        self.row_share = _nearer(self.row_share, min(2.0, max(0.0, share)))
        # All sequences of the lap waited for it; the tokens that came more would have taken laps of their own.
        plain_s = lap_s * (1.0 + extra / sequences)
        self.lost_s = max(0.0, self.lost_s + took_s - plain_s)


def _nearer(known: float | None, seen: float) -> float:
    return seen if known is None else known + _NEWEST * (seen - known)
