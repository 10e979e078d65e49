"""What a simulation is asked and what it says, as values; and noise for it that needs no generator."""

from collections.abc import Callable

import msgspec

from shoal.errors import InvalidRequestError

Noise = Callable[[int, int], float]
"""The factor by which use number *count* of device or link number *server* takes longer or shorter than described."""

_MASK = (1 << 64) - 1


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop: a stream asks again as soon as its micro-batch is answered."""

    streams: int
    """Micro-batches that circulate."""
    requests: int = 64
    """Measured at least, after two rounds of every stream to get into step."""


class Busy(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the measured time a device, a link's direction or a medium was occupied."""

    name: str
    share: float


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen at the source.  None: nothing to see (a second token where one is asked for)."""

    requests: int
    tokens: int
    duration_s: float
    """All of it, the first rounds included."""
    tokens_per_s: float
    """Of all streams together in the measured part; 0 when no time passed."""
    time_to_first_token_s: float
    """Median; from sending the prompt, waiting included."""
    time_to_first_token_p95_s: float
    time_per_output_token_s: float | None
    """Median of what lies between two tokens of a sequence."""
    time_per_output_token_p95_s: float | None
    latency_s: float
    """Median of a request: from sending its prompt to its last token."""
    devices: tuple[Busy, ...]
    links: tuple[Busy, ...]


def exactly(_server: int, _count: int) -> float:
    """No noise: everything takes as long as described."""
    return 1.0


def jitter(spread: float, seed: int) -> Noise:
    """Factors spread evenly over 1 - *spread* to 1 + *spread*; the same for the same seed, in whatever order they are asked for.

    The hash is SplitMix64's finaliser (Steele, Lea and Flood, 2014) of the place in the sequence.
    """
    if not 0 <= spread < 1:
        raise InvalidRequestError(
            f"a jitter of {spread} would make times negative or absurd; it is a share from 0 to below 1", param="jitter"
        )

    def factor(server: int, count: int) -> float:
        mixed = _mix(_mix(_mix(seed) ^ server) ^ count)
        return 1 + spread * (2 * (mixed >> 11) / (1 << 53) - 1)

    return factor


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
