"""What live times say of a profile: how far it is off by now, and when it has changed.

A sample is a live time over the one that the profile predicts; its logarithm is followed, so that twice and half as fast count
alike.  Two things are made of the samples:

- the factor that corrects the profile: an exponentially weighted mean (Roberts, Control chart tests based on geometric moving
  averages, Technometrics 1, 1959), of all samples alike while there are few.  It follows the mean only by steps of more than
  `step`: with each sample another factor, the same question would get another plan each time;
- a change: a two-sided cumulative sum (Page, Continuous inspection schemes, Biometrika 41, 1954) of what goes beyond `slack`
  around the factor that was last told.  It passes `limit` when a shift is large or lasts; then the mean since the sum was last
  zero, the likeliest time of the change, is the new factor.

False alarms, simulated over 100,000 samples that scatter around what was told: one with a scatter of 15 %, one in 4,000 samples
with 20 %, one in 400 with 25 %.  A device or link twice as slow is noticed after four samples, one a third slower after seven on
average.  A single sample counts for no more than `clip`, however long a step was held up: three of them in a row are no change.

What is below the floors is nobody's concern: times are compared with those added to both.
"""

from math import exp, log

import msgspec


class DriftRule(msgspec.Struct, frozen=True, kw_only=True):
    """When something has changed; logarithms of factors."""

    weight: float = 0.1
    """Of a new sample in the mean, once there are 1 / weight of them."""
    slack: float = 0.13
    """Half of the smallest shift that is worth a new plan: 1.3 times."""
    limit: float = 1.0
    clip: float = 0.45
    step: float = 0.05
    fewest: int = 3
    """Samples before a factor is believed."""


RULE = DriftRule()
STEP_FLOOR_S = 0.001
HOP_FLOOR_S = 0.001
FACTORS = (0.1, 20.0)
"""A profile that is further off needs measuring, not correcting."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one device or link since its last probe; logarithms of live over predicted."""

    samples: int = 0
    mean: float = 0.0
    used: float = 0.0
    """The mean that plans are made by."""
    told: float = 0.0
    """The mean that whoever plans was last told of."""
    rise: float = 0.0
    fall: float = 0.0
    """Cumulative sums; each of the two below is over the samples since its sum was zero."""
    rising: tuple[int, float] = (0, 0.0)
    falling: tuple[int, float] = (0, 0.0)
    changes: int = 0

    @property
    def factor(self) -> float:
        """What the profile's times are to be multiplied by."""
        low, high = FACTORS
        return min(max(low, exp(self.used)), high)


def ratio(live_s: float, predicted_s: float, floor_s: float) -> float:
    """A sample: how many times as long as predicted it took."""
    return max(1e-6, live_s + floor_s) / max(1e-6, predicted_s + floor_s)


def observe(drift: Drift, live_over_predicted: float, rule: DriftRule = RULE) -> Drift:
    """Take one sample; `changes` is one more where it completes a change."""
    value = log(live_over_predicted)
    samples = drift.samples + 1
    mean = drift.mean + max(rule.weight, 1 / samples) * (value - drift.mean)
    off = min(max(-rule.clip, value - drift.told), rule.clip)
    rise, rising = _accumulated(drift.rise, drift.rising, off - rule.slack, value)
    fall, falling = _accumulated(drift.fall, drift.falling, -off - rule.slack, value)
    if max(rise, fall) <= rule.limit:
        return msgspec.structs.replace(
            drift,
            samples=samples,
            mean=mean,
            used=mean if samples >= rule.fewest and abs(mean - drift.used) > rule.step else drift.used,
            rise=rise,
            fall=fall,
            rising=rising,
            falling=falling,
        )
    count, total = rising if rise > fall else falling
    level = total / count
    return Drift(samples=max(count, rule.fewest), mean=level, used=level, told=level, changes=drift.changes + 1)


def corrected_rtt_s(rtt_s: float, factor: float) -> float:
    """A round trip by the factor of samples that had the floor added."""
    return max(0.1 * rtt_s, factor * (rtt_s + HOP_FLOOR_S) - HOP_FLOOR_S)


def _accumulated(before: float, over: tuple[int, float], step: float, value: float) -> tuple[float, tuple[int, float]]:
    total = max(0.0, before + step)
    return total, (over[0] + 1, over[1] + value) if total else (0, 0.0)
