"""Periodic passes as an integer programme: a circuit through the devices that take part, and whole units on each.

Variables: for each link and phase, whether frames go over it there; for each node, its part in the chain (first, in the middle,
last; the phases of its two cuts) and its units.  Everything is linear in them (`shoal.plan.periodic`), cuts inside of a unit
included.  The circuit closes from the last device to the first.  Where the source runs the first and the last stage, its second
shard is a node of its own.

Cut positions as variables (an order by cumulated blocks) were rejected: they make the relaxation weak, and without pins in the
middle of the model nothing needs them.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.plan.arrays import Flags
from shoal.plan.cpsat import IN_COSTS, Programme, Row
from shoal.plan.found import FREE, Choice
from shoal.plan.periodic import Periodic


@dataclass(frozen=True, slots=True)
class Role:
    """One part that a node may have; a phase is None where the stage begins or ends the model."""

    node: int
    device: int
    enters: int | None
    leaves: int | None
    least: int
    room: int
    variable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """For throughput: what keeps devices and links busy, for a circuit that minimises max(T, L / in flight)."""

    busy: Periodic
    """Hops are seconds on the link."""
    occupies: tuple[tuple[object, ...], ...]
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a circuit is drawn for."""

    form: Periodic
    stages: tuple[int, int]
    choice: Choice = FREE
    load: Load | None = None
    keep: Flags | None = None
    """[M, M] links that may be used; None: all."""


@dataclass(slots=True)
class Drawing:
    """A programme, and what its variables mean."""

    task: Task
    programme: Programme = field(default_factory=Programme)
    roles: list[Role] = field(default_factory=list)
    links: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(from, to, phase)"""
    wraps: dict[tuple[int, int], int] = field(default_factory=dict)
    """(last, first)"""
    units: dict[int, int] = field(default_factory=dict)
    off: dict[int, int] = field(default_factory=dict)

    @property
    def again(self) -> int | None:
        """The node of the first device's second shard."""
        form = self.task.form
        return len(form.opening) if form.ends[0].again is not None else None

    def device(self, node: int) -> int:
        return self.task.form.ends[0].device if node == self.again else node


def draw(task: Task) -> Drawing:
    """The programme of chains of two stages or more."""
    drawing = Drawing(task)
    drawing.roles.extend(_roles(drawing))
    _draw_links(drawing)
    _draw_wraps(drawing)
    _draw_devices(drawing)
    _draw_joint(drawing)
    _draw_counts(drawing)
    if task.load:
        _draw_load(drawing, task.load)
    return drawing


def _roles(drawing: Drawing) -> Iterator[Role]:
    form, programme, again = drawing.task.form, drawing.programme, drawing.again
    phases, tail = range(form.rhythm.period), int(not form.rhythm.last)

    def role(node: int, enters: int | None, leaves: int | None, limits: tuple[int, int], cost: float) -> Iterator[Role]:
        device = drawing.device(node)
        cost += form.opening[device]
        cost += form.part[device, leaves] if leaves is not None else form.after[device]
        cost += form.before[device] if enters is None else -form.part[device, enters]
        if limits[0] <= limits[1]:
            yield Role(node, device, enters, leaves, *limits, programme.variable(1, cost))

    for ends in form.ends:
        for b in phases:
            least = int(b == 0 and not form.rhythm.first)
            yield from role(ends.device, None, b, (least, int(ends.room[b])), ends.entry)
    for device in _middle(drawing):
        for a in phases:
            for b in phases:
                yield from role(device, a, b, (int(a >= b), int(form.room[device, a, b])), 0.0)
            if again is None:
                yield from role(device, a, None, (max(tail, int(a > 0)), int(form.room_last[device, a])), 0.0)
    if again is not None:
        for a in phases:
            yield from role(again, a, None, (max(tail, int(a > 0)), form.rhythm.units), 0.0)


def _middle(drawing: Drawing) -> list[int]:
    """Devices that need not be first."""
    form, forbid = drawing.task.form, drawing.task.choice.forbid
    first = form.ends[0].device if len(form.ends) == 1 else None
    return [device for device in range(len(form.opening)) if device != first and not forbid >> device & 1]


def _draw_links(drawing: Drawing) -> None:
    form, programme, again = drawing.task.form, drawing.programme, drawing.again
    leaving = {(role.node, role.leaves) for role in drawing.roles if role.leaves is not None}
    entering = defaultdict(set)
    for role in drawing.roles:
        if role.enters is not None:
            entering[role.enters].add(role.node)
    keep = drawing.task.keep
    for here, phase in sorted(leaving):
        costs = form.hop[here, :, phase]
        for there in sorted(entering[phase]):
            cost = float(costs[drawing.device(there)])
            if here == there or not math.isfinite(cost) or (there == again and here == drawing.device(there)):
                continue
            if keep is not None and not keep[here, drawing.device(there)]:
                continue
            variable = programme.variable(1, cost)
            drawing.links[here, there, phase] = variable
            programme.arcs.append((here, there, variable))


def _draw_wraps(drawing: Drawing) -> None:
    programme, again, ends = drawing.programme, drawing.again, drawing.task.form.ends
    if again is not None:
        programme.arcs.append((again, ends[0].device, _certain(programme)))
        return
    lasts = sorted({role.node for role in drawing.roles if role.leaves is None})
    for end in ends:
        for last in lasts:
            if last != end.device and math.isfinite(end.end[last]):
                variable = programme.variable(1, float(end.end[last]))
                drawing.wraps[last, end.device] = variable
                programme.arcs.append((last, end.device, variable))
    programme.rows.append(Row([(variable, 1) for variable in drawing.wraps.values()], lower=1, upper=1))


def _certain(programme: Programme) -> int:
    variable = programme.variable()
    programme.rows.append(Row([(variable, 1)], lower=1))
    return variable


def _draw_devices(drawing: Drawing) -> None:
    """A node has one role or none, enters and leaves by links of its phases, and holds units within its role's limits."""
    form, programme = drawing.task.form, drawing.programme
    mine: dict[int, list[Role]] = defaultdict(list)
    for role in drawing.roles:
        mine[role.node].append(role)
    sole = {form.ends[0].device} if len(form.ends) == 1 else set()
    for node, roles in mine.items():
        picked = [(role.variable, 1.0) for role in roles]
        if node not in sole and node != drawing.again:
            drawing.off[node] = programme.variable()
            programme.arcs.append((node, node, drawing.off[node]))
            picked.append((drawing.off[node], 1.0))
        programme.rows.append(Row(picked, lower=1, upper=1))
        units = programme.variable(max(role.room for role in roles), float(form.unit[drawing.device(node)]))
        drawing.units[node] = units
        programme.rows.append(Row([(units, 1), *((r.variable, -r.room) for r in roles)], upper=0))
        programme.rows.append(Row([(units, 1), *((r.variable, -r.least) for r in roles)], lower=0))
    _draw_flow(drawing)


def _draw_flow(drawing: Drawing) -> None:
    flows: dict[tuple[str, int, int | None], list[tuple[int, float]]] = defaultdict(list)
    for role in drawing.roles:
        flows["in", role.node, role.enters].append((role.variable, -1))
        flows["out", role.node, role.leaves].append((role.variable, -1))
    for (here, there, phase), variable in drawing.links.items():
        flows["out", here, phase].append((variable, 1))
        flows["in", there, phase].append((variable, 1))
    for (last, first), variable in drawing.wraps.items():
        flows["out", last, None].append((variable, 1))
        flows["in", first, None].append((variable, 1))
    for (_, _, through), terms in flows.items():
        if through is not None or drawing.again is None:  # the arc from the second shard to the first is certain
            drawing.programme.rows.append(Row(terms, lower=0, upper=0))


def _draw_joint(drawing: Drawing) -> None:
    """The first and the last stage of one device share its memory."""
    ends, again, programme = drawing.task.form.ends[0], drawing.again, drawing.programme
    if again is None or ends.again is None:
        return
    for first in (role for role in drawing.roles if role.node == ends.device):
        for last in (role for role in drawing.roles if role.node == again):
            room = int(ends.again[first.leaves or 0, last.enters or 0])
            both = [(drawing.units[ends.device], 1.0), (drawing.units[again], 1.0)]
            pair = (first.variable, last.variable) if drawing.task.form.rhythm.period > 1 else ()
            programme.rows.append(Row(both, upper=room, when=pair))


def _draw_counts(drawing: Drawing) -> None:
    form, programme, (least, most) = drawing.task.form, drawing.programme, drawing.task.stages
    programme.rows.append(
        Row([(units, 1) for units in drawing.units.values()], lower=form.rhythm.units, upper=form.rhythm.units)
    )
    off, nodes = [(variable, 1.0) for variable in drawing.off.values()], len(drawing.units)
    if least > 2 or most < nodes:
        programme.rows.append(Row(off, lower=nodes - most, upper=nodes - least))
    required = drawing.task.choice.require
    for device in range(len(form.opening)):
        if required >> device & 1:
            here = [(role.variable, 1.0) for role in drawing.roles if role.node == device]
            programme.rows.append(Row(here, lower=1))


def _draw_load(drawing: Drawing, load: Load) -> None:
    """Costs become limits of one variable, the period."""
    programme, busy = drawing.programme, load.busy
    lap = [(variable, cost) for variable, cost in enumerate(programme.costs) if cost]
    programme.costs = [0.0] * len(programme.costs)
    period = programme.variable(IN_COSTS)
    programme.limited.append((lap, period, load.in_flight))
    work: dict[object, list[tuple[int, float]]] = defaultdict(list)
    for role in drawing.roles:
        seconds = float(busy.opening[role.device])
        seconds += float(busy.part[role.device, role.leaves] if role.leaves is not None else busy.after[role.device])
        seconds += float(busy.before[role.device] if role.enters is None else -busy.part[role.device, role.enters])
        work["device", role.device].append((role.variable, seconds))
    for node, units in drawing.units.items():
        work["device", drawing.device(node)].append((units, float(busy.unit[drawing.device(node)])))
    for (here, there, phase), variable in drawing.links.items():
        target = drawing.device(there)
        what = load.occupies[here][target]
        shared = what if isinstance(what, tuple) and what[0] == "medium" else ("from", here)
        work[shared].append((variable, float(busy.hop[here, target, phase])))
    programme.limited.extend((terms, period, 1) for terms in work.values())
