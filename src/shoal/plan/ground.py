"""What `shoal.plan.vectors` walks on: costs of shards and hops by all figures, who is busy, and what remains at least.

A *slot* counts the seconds that a resource is taken.  Slot 0 is the running maximum over resources that a chain uses once;
each resource that may be used again has a slot of its own.  A *phase* is what the seconds are of: one prompt (needed where
chunks overlap), or all work of a micro-batch (needed for tokens per second).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shoal.plan.arrays import INF, Flags, Floats, Whole
from shoal.plan.chain import relax
from shoal.plan.parts import UNITS, Form, Measure, Parts, mixed, mixed_ends
from shoal.plan.tables import Pass

Mixture = Mapping[Measure, float]
PROMPT, WORK = 0, 1
TIMES = (Measure.LATENCY, Measure.FIRST_TOKEN, Measure.PERIOD)


@dataclass(frozen=True, slots=True)
class Labels:
    """Beginnings of chains with the same set of devices."""

    device: Whole
    cut: Whole
    via: Whole
    """Device that relays the last hop; -1: none."""
    parent: Whole
    """Row among the labels without the last device."""
    sums: Floats
    """[n, 4]"""
    taken_s: Floats
    """[n, slots, phases]"""
    held: Floats
    """[n, 2] bytes and joules of the first shard, where its device may run the last one, too"""

    def __len__(self) -> int:
        return int(self.device.size)

    def rows(self, which: Flags | Whole) -> "Labels":
        """Some of them."""
        return Labels(
            self.device[which], self.cut[which], self.via[which], self.parent[which], self.sums[which],
            self.taken_s[which], self.held[which],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Which measures count, and further weighted sums of them to bound."""

    measures: tuple[Measure, ...]
    mixtures: tuple[Mixture, ...] = ()
    require: int = 0
    forbid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Arrays of one search from *first*."""

    parts: Parts
    ask: Ask
    first: int
    closes: bool
    """*first* may run the last shard as well."""
    phases: tuple[int, ...]
    slots: int
    device_slot: Whole
    """[M]"""
    link_slot: Whole
    """[M, M]"""
    open: Flags
    """[M, N+1, N+1] whether a shard may be"""
    run: Floats
    """[M, N+1, N+1, 4]"""
    hop: tuple[Floats, ...]
    """[M, M, N+1, 4] direct, then through each relay"""
    busy_s: Floats
    """[M, N+1, N+1, phases]"""
    wire_s: Floats
    """[M, M, N+1, phases]"""
    relay_s: Floats
    """[M, phases]"""
    forms: Floats
    """[measures + mixtures, 4]"""
    to_go: Floats
    """[measures + mixtures, N+1, M] the least that remains of each, ends included"""
    busiest_s: Floats
    """[N+1, M] the least that the busiest of what remains is taken by the work of a micro-batch"""
    dominance: Floats
    """[columns, 4] sums by which labels are compared"""

    def lower(self, labels: Labels) -> Floats:
        """[n, measures + mixtures] what a label comes to at least."""
        total = labels.sums @ self.forms.T + self.to_go[:, labels.cut, labels.device].T
        if Measure.PERIOD in self.ask.measures and len(labels):
            column = self.ask.measures.index(Measure.PERIOD)
            taken_s = labels.taken_s[:, :, self.phases.index(WORK)].max(axis=1)
            for least_s in (taken_s, self.busiest_s[labels.cut, labels.device]):
                total[:, column] = np.maximum(total[:, column], least_s)
        return np.asarray(total)

    def keys(self, labels: Labels) -> Floats:
        """[n, columns] by which one label dominates another; sums of equal terms in another order count as equal."""
        columns = [labels.sums @ self.dominance.T, labels.taken_s.reshape(len(labels), -1)]
        values = np.concatenate([*columns, labels.held] if self.closes else columns, axis=1)
        mantissa, exponent = np.frexp(values)
        return np.asarray(np.ldexp(np.round(mantissa * 2.0**42), exponent - 42))

    def pass_on(self, taken_s: Floats, hops: tuple[Whole, int, Whole], relay: int) -> None:
        """Add what frames over hops (from, to, cut) take of links and relays."""
        here, there, cut = hops
        away = np.full(here.size, there)
        if relay < 0:
            occupy(taken_s, self.link_slot[here, away], self.wire_s[here, away, cut])
            return
        middle = np.full(here.size, relay)
        occupy(taken_s, self.link_slot[here, middle], self.wire_s[here, middle, cut])
        occupy(taken_s, self.device_slot[middle], np.broadcast_to(self.relay_s[relay], (here.size, len(self.phases))))
        occupy(taken_s, self.link_slot[middle, away], self.wire_s[middle, away, cut])

    def admits(self, mask: int) -> bool:
        """Whether a chain over exactly these devices may be."""
        return not (self.ask.require & ~mask or self.ask.forbid & mask)

    def counts(self, stages: int) -> bool:
        """Whether a chain may have so many stages."""
        tables = self.parts.tables
        return stages <= tables.max_stages and tables.stages_exactly in {0, stages}

    @property
    def most_shards(self) -> int:
        """How many a chain may have."""
        return self.parts.tables.stages_exactly or self.parts.tables.max_stages

    def values(self, labels: Labels) -> Floats:
        """[n, measures] of labels that are whole chains, their last devices named by `device`."""
        parts, shape = self.parts, self.parts.problem.shape
        home_s, deliver_s = parts.home_s[self.first, labels.device], parts.deliver_s[labels.device]
        through, lap, joules, money = labels.sums.T
        lap_s, between_s = lap + home_s, (through + home_s) / shape.in_flight
        if PROMPT in self.phases:
            prompt_s = labels.taken_s[:, :, self.phases.index(PROMPT)].max(axis=1, initial=0.0)
            between_s = np.maximum(between_s, prompt_s / parts.chunks)
        first_s = parts.entry_s[self.first] + through + (parts.chunks - 1) * between_s + deliver_s
        period_s = (shape.batch * first_s + parts.laps * lap_s) / shape.in_flight
        if WORK in self.phases:
            period_s = np.maximum(period_s, labels.taken_s[:, :, self.phases.index(WORK)].max(axis=1))
        known = {
            Measure.LATENCY: first_s + parts.laps * lap_s, Measure.FIRST_TOKEN: first_s, Measure.PERIOD: period_s,
            Measure.JOULES: joules, Measure.PRICE: money,
        }  # fmt: skip
        reached = np.isfinite(lap_s + first_s)
        return np.stack([np.where(reached, known[measure], INF) for measure in self.ask.measures], axis=1)


def occupy(taken_s: Floats, slot: Whole, seconds: Floats) -> None:
    """Count [n, phases] *seconds* of one resource per row: added up in its own slot, or a running maximum in slot 0."""
    rows = np.arange(slot.size)
    once = (slot == 0)[:, None]
    held = taken_s[rows, slot]
    taken_s[rows, slot] = np.where(once, np.maximum(held, seconds), held + seconds)


def build_ground(parts: Parts, ask: Ask, first: int) -> Ground:
    """Arrays of a search whose first shard is on device *first*."""
    phases = _phases(parts, ask.measures)
    device_slot, link_slot, slots = _slots(parts)
    mixtures = [*({measure: 1.0} for measure in ask.measures), *ask.mixtures]
    hops = [np.stack([parts.hop(form) for form in UNITS], axis=3)]
    for relay in parts.relays:
        hops.append(np.stack([parts.relayed(hops[0][..., i], form, relay) for i, form in enumerate(UNITS)], axis=3))
    busy_s, wire_s, relay_s = _uses(parts, phases)
    return Ground(
        parts=parts,
        ask=ask,
        first=first,
        closes=parts.tables.closing == first,
        phases=phases,
        slots=slots,
        device_slot=device_slot,
        link_slot=link_slot,
        open=np.isfinite(parts.allowed),
        run=np.stack([parts.run(form) for form in UNITS], axis=3),
        hop=tuple(hops),
        busy_s=busy_s,
        wire_s=wire_s,
        relay_s=relay_s,
        forms=np.array([mixed(parts, mixture) for mixture in mixtures]),
        to_go=np.stack([_to_go(parts, mixture, first) for mixture in mixtures]),
        busiest_s=_busiest(parts, first),
        dominance=_dominance(parts, ask.measures),
    )


def _uses(parts: Parts, phases: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """[.., phases] seconds that shards, links and relays are taken."""
    devices, _, size = parts.allowed.shape
    shapes = ((devices, size, size), (devices, devices, size), (devices,))
    busy_s, wire_s, relay_s = (np.zeros((*shape, len(phases))) for shape in shapes)
    for place, phase in enumerate(phases):
        busy_s[..., place], wire_s[..., place] = parts.busy(phase), parts.wire(phase)
        relay_s[..., place] = parts.overhead @ np.array(parts.use_forms[phase])
    return busy_s, wire_s, relay_s


def _phases(parts: Parts, measures: Sequence[Measure]) -> tuple[int, ...]:
    overlapping = parts.chunks > 1 and parts.problem.shape.in_flight > 1
    prompt = overlapping and any(measure in TIMES for measure in measures)
    return (PROMPT,) * prompt + (WORK,) * (Measure.PERIOD in measures)


def _slots(parts: Parts) -> tuple[Whole, Whole, int]:
    """Slots of devices and links, and how many there are."""
    tables, again = parts.tables, bool(parts.relays)
    devices = len(tables.nodes)
    names: dict[object, int] = {}

    def slot(resource: object, *, shared: bool) -> int:
        return names.setdefault(resource, len(names) + 1) if shared else 0

    of_device = [slot(i, shared=again or i == tables.closing) for i in range(devices)]
    of_link = [
        [slot(what, shared=again or _is_medium(what)) if (what := tables.occupies[a][b]) else 0 for b in range(devices)]
        for a in range(devices)
    ]
    return np.array(of_device), np.array(of_link), len(names) + 1


def _is_medium(occupied: object) -> bool:
    return isinstance(occupied, tuple) and occupied[0] == "medium"


def _dominance(parts: Parts, measures: Sequence[Measure]) -> Floats:
    """Where chunks overlap the two sums of time count apart, else as the measures weigh them; none twice."""
    overlapping = parts.chunks > 1 and parts.problem.shape.in_flight > 1
    rows: list[Form] = []
    for measure in measures:
        form = parts.form(measure)
        split = [unit for unit, part in zip(UNITS[:2], form, strict=False) if part] if overlapping else [form]
        rows += split if measure in TIMES else [form]
    unique = dict.fromkeys(_scaled(row) for row in rows)
    return np.array(list(unique), dtype=np.float64).reshape(-1, 4)


def _scaled(form: Form) -> Form:
    whole = max(form) or 1.0
    through, lap, joules, money = (round(part / whole, 12) for part in form)
    return through, lap, joules, money


def _to_go(parts: Parts, mixture: Mixture, first: int) -> Floats:
    """[N+1, M] by the relaxation, whether or not *first* comes back for the last shard."""
    search = one_pass(parts, mixture, first)
    return relax(parts.tables, search).to_go


def one_pass(parts: Parts, mixture: Mixture, first: int, cap_s: float = INF) -> Pass:
    """A search that may end anywhere: good for bounds only, as memory for two shards of *first* is not looked at."""
    form, end = mixed(parts, mixture), mixed_ends(parts, mixture, first)
    run, direct = parts.run(form, cap_s), parts.hop(form, cap_s)
    hop = np.minimum.reduce([direct, *(parts.relayed(direct, form, relay) for relay in parts.relays)])
    close = run[first, :, -1] + end[first] if parts.tables.closing == first else None
    return Pass(
        first=first, start=run[first, 0], run=run, hop=hop, via=np.full(hop.shape, -1, np.int64), end=end, close=close
    )


def _busiest(parts: Parts, first: int) -> Floats:
    """[N+1, M] as `relax`, with the larger of two in place of their sum."""
    busy_s = np.where(np.isfinite(parts.allowed), parts.busy(WORK), INF)
    direct = np.where(np.isfinite(parts.delay_s)[:, :, None], parts.wire(WORK), INF)
    relay_s = parts.overhead @ np.array(parts.use_forms[WORK])
    way_s = direct.copy()
    for relay in parts.relays:
        legs = np.maximum(direct[:, relay, None], direct[None, relay, :])
        way_s = np.minimum(way_s, np.maximum(legs, relay_s[relay]))
    size, devices = busy_s.shape[1], busy_s.shape[0]
    to_go = np.full((size, devices), INF)
    to_go[-1] = 0.0
    for cut in range(size - 2, 0, -1):
        onward = np.maximum(busy_s[:, cut, :], to_go.T).min(axis=1)
        if parts.tables.closing == first:
            onward[first] = busy_s[first, cut, -1]
        to_go[cut] = np.maximum(way_s[:, :, cut], onward).min(axis=1)
    return to_go


def relays_of(chain: Sequence[tuple[int, int, int]], ways: Sequence[int]) -> dict[tuple[int, int, int], int]:
    """Hops that go through a relay, as (from, to, cut) to device."""
    hops = zip(pairwise(chain), ways, strict=True)
    return {(here[0], there[0], here[2]): way for (here, there), way in hops if way >= 0}
