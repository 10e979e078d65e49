"""A front as an SVG picture: one panel for each pair of the first objective and another.  Pure: a front in, text out.

Drawn by hand rather than by a plotting library: points, a staircase and two axes are a hundred lines, and a dependency that
is larger than Shoal is not.  Figures keep their units and directions (tokens per second grow to the right or upwards), so
the corner that plans strive for is named in words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from shoal.cli.front_table import figure_text, placement_text
from shoal.cli.plan_table import Names
from shoal.plan.pareto import Front
from shoal.plan.problem import Estimate, Objective

WIDTH, HEIGHT = 520, 360
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 52, 58
LEGEND_LINE = 18
INK, FAINT, LINE, POINT, KNEE = "#1f2937", "#e5e7eb", "#94a3b8", "#2563eb", "#dc2626"
FONT = 'font-family="system-ui, Helvetica, Arial, sans-serif"'
AXES = {
    Objective.LATENCY: "latency of a request (s), less is better",
    Objective.THROUGHPUT: "throughput (tok/s), more is better",
    Objective.ENERGY: "energy of a request (J), less is better",
    Objective.PRICE: "price of a request, less is better",
}
MOST_LISTED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Where figures of an axis lie."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """Pixels of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def picture(front: Front, names: Names | None = None, title: str = "") -> str:
    """The whole picture."""
    others = front.objectives[1:]
    listed = _listed(front)
    width, height = WIDTH * len(others), HEIGHT + LEGEND_LINE * (len(listed) + 1)
    panels = [_panel(front, (front.objectives[0], other), WIDTH * place) for place, other in enumerate(others)]
    heading = title or f"Plans that no other beats: {_listing(front.objectives)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {FONT}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text((LEFT, 24), heading, size=15, weight="bold"),
        *panels,
        *_legend(front, listed, names or {}),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _listing(objectives: Sequence[Objective]) -> str:
    return f"{', '.join(objectives[:-1])} and {objectives[-1]}"


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within [*low*, *high*]."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    # To 12 digits: 32 x 0.1 is a little more than 3.2, which may be the end of the axis.
    return [float(f"{place * step:.12g}") for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(front: Front, pair: tuple[Objective, Objective], offset: float) -> str:
    figures = [tuple(_figure(objective, plan.estimate) for objective in pair) for plan in front.points]
    x = _scale([f[0] for f in figures], offset + LEFT, offset + WIDTH - RIGHT)
    y = _scale([f[1] for f in figures], HEIGHT - BOTTOM, TOP)
    places = [(x.at(a), y.at(b)) for a, b in figures]
    return "\n".join([*_axes(pair, x, y), _staircase(front, places), *_marks(front, places)])


def _figure(objective: Objective, estimate: Estimate) -> float:
    match objective:
        case Objective.LATENCY:
            return estimate.latency_s
        case Objective.THROUGHPUT:
            return estimate.tokens_per_s
        case Objective.ENERGY:
            return estimate.joules
        case Objective.PRICE:
            return estimate.price


def _scale(values: Sequence[float], start: float, stop: float) -> Scale:
    """The range of the values with some air, from 0 where they start near it."""
    low, high = min(values), max(values)
    air = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Scale(low=0.0 if 0 <= low < (high - low) * 0.25 else low - air, high=high + air, start=start, stop=stop)


def _axes(pair: tuple[Objective, Objective], x: Scale, y: Scale) -> list[str]:
    parts = []
    for value in ticks(x.low, x.high):
        at = x.at(value)
        parts.append(_line((at, TOP), (at, HEIGHT - BOTTOM), FAINT))
        parts.append(_text((at, HEIGHT - BOTTOM + 17), _number(value), anchor="middle", size=11))
    for value in ticks(y.low, y.high):
        at = y.at(value)
        parts.append(_line((x.start, at), (x.stop, at), FAINT))
        parts.append(_text((x.start - 7, at + 4), _number(value), anchor="end", size=11))
    parts += [_line((x.start, TOP), (x.start, HEIGHT - BOTTOM), INK), _line((x.start, y.start), (x.stop, y.start), INK)]
    parts.append(_text(((x.start + x.stop) / 2, HEIGHT - BOTTOM + 38), AXES[pair[0]], anchor="middle"))
    middle = (x.start - 58, (TOP + HEIGHT - BOTTOM) / 2)
    parts.append(_text(middle, AXES[pair[1]], anchor="middle", turn=True))
    return parts


def _staircase(front: Front, places: Sequence[tuple[float, float]]) -> str:
    """The border of what two objectives' points dominate; with more objectives a panel shows a shadow, which has none."""
    if len(front.objectives) != 2 or len(places) < 2:
        return ""
    path = [f"M{places[0][0]:.1f},{places[0][1]:.1f}"]
    for before, after in pairwise(places):
        # Between two plans the worse figure of each is what is sure to be had: corners lie on the dominated side.
        path.append(f"L{after[0]:.1f},{before[1]:.1f} L{after[0]:.1f},{after[1]:.1f}")
    return f'<path d="{" ".join(path)}" fill="none" stroke="{LINE}" stroke-width="1.5" stroke-dasharray="4 3"/>'


def _marks(front: Front, places: Sequence[tuple[float, float]]) -> list[str]:
    """Points, and the numbers of those that the legend tells, the knee's first, as far as they do not cover each other."""
    parts = []
    for index, (x, y) in enumerate(places):
        radius, colour = (6.5, KNEE) if index == front.knee else (4.5, POINT)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" stroke="white" stroke-width="1.2"/>'
        )
    taken: list[tuple[float, float, float]] = []
    for index in sorted(_listed(front), key=lambda i: i != front.knee):
        word = f"{index + 1} knee" if index == front.knee else str(index + 1)
        x, y, width = places[index][0] + 8, places[index][1] - 7, 7.0 * len(word)
        if all(x + width < a or a + wide < x or abs(y - b) > 12 for a, b, wide in taken):
            parts.append(_text((x, y), word, size=11, weight="bold" if index == front.knee else ""))
            taken.append((x, y, width))
    return parts


def _listed(front: Front) -> list[int]:
    """Points that the legend tells: all, or the ends, the knee and an even choice."""
    count = len(front.points)
    if count <= MOST_LISTED:
        return list(range(count))
    even = {round(place * (count - 1) / (MOST_LISTED - 2)) for place in range(MOST_LISTED - 1)}
    return sorted(even | ({front.knee} if front.knee is not None else set()))


def _legend(front: Front, listed: Sequence[int], names: Names) -> list[str]:
    most = int((WIDTH * (len(front.objectives) - 1) - LEFT) / 6.2)
    lines = []
    for row, index in enumerate(listed):
        plan = front.points[index]
        figures = ", ".join(f"{figure_text(o, plan.estimate)}{UNITS[o]}" for o in front.objectives)
        words = f"{index + 1}: {figures}; {placement_text(plan, names)}"
        words = words if len(words) <= most else words[: most - 1] + "\u2026"
        colour = KNEE if index == front.knee else INK
        lines.append(_text((24, HEIGHT + 6 + LEGEND_LINE * row), words, size=11, colour=colour))
    told = f"{front.covers}{', proven' if front.complete else ''}"
    lines.append(_text((24, HEIGHT + 6 + LEGEND_LINE * len(listed)), told, size=11, colour="#6b7280"))
    return lines


UNITS = {Objective.LATENCY: "", Objective.THROUGHPUT: " tok/s", Objective.ENERGY: " J", Objective.PRICE: ""}


def _number(value: float) -> str:
    return f"{value:.6g}"


def _line(start: tuple[float, float], stop: tuple[float, float], colour: str) -> str:
    (x1, y1), (x2, y2) = start, stop
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(
    at: tuple[float, float],
    words: str,
    *,
    size: int = 12,
    anchor: str = "start",
    weight: str = "",
    turn: bool = False,
    colour: str = INK,
) -> str:
    x, y = at
    bold = f' font-weight="{weight}"' if weight else ""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"{bold}{turned}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
