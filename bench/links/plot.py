"""Pictures of the grid, drawn by hand as SVG: lines over a factor, bars for what is not a scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 66, 52
INK, FAINT = "#1f2937", "#e5e7eb"
COLOURS = ("#2563eb", "#16a34a", "#dc2626", "#f59e0b", "#7c3aed")
FONT = 'font-family="system-ui, Helvetica, Arial, sans-serif"'
LEGEND_LINE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Values by series over places that stand side by side; None where nothing was measured."""

    title: str
    places: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    unit: str
    bars: bool = False

    @property
    def top(self) -> float:
        return max((value for values in self.series.values() for value in values if value is not None), default=1.0)


def picture(panels: Sequence[Panel], heading: str) -> str:
    """Panels side by side, with one legend below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    width, height = WIDTH * len(panels), HEIGHT + LEGEND_LINE + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {FONT}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text((LEFT, 24), heading, size=15, weight="bold"),
        *(part for n, panel in enumerate(panels) for part in _panel(panel, colours, WIDTH * n)),
        *_legend(colours, HEIGHT + 10),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, colours: Mapping[str, str], offset: float) -> list[str]:
    left, right, low, high = offset + LEFT, offset + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    step = tick_step(panel.top)
    most = step * -(-panel.top // step)
    parts = [_text((left, high - 14), f"{panel.title} ({panel.unit})", size=12)]
    for n in range(round(most / step) + 1):
        at = low - (low - high) * n * step / most
        parts.append(f'<line x1="{left:.1f}" y1="{at:.1f}" x2="{right:.1f}" y2="{at:.1f}" stroke="{FAINT}"/>')
        parts.append(_text((left - 6, at + 4), f"{n * step:g}", size=10, anchor="end"))
    room = (right - left) / len(panel.places)
    middles = [left + room * (n + 0.5) for n in range(len(panel.places))]
    parts += [
        _text((at, low + 16), place, size=10, anchor="middle") for at, place in zip(middles, panel.places, strict=True)
    ]
    for number, (name, values) in enumerate(panel.series.items()):
        points = [
            (at, low - (low - high) * value / most, value)
            for at, value in zip(middles, values, strict=True)
            if value is not None
        ]
        if panel.bars:
            thick = 0.8 * room / len(panel.series)
            shift = (number - len(panel.series) / 2) * thick
            parts += [
                _bar((at + shift, up), (thick, low - up), colours[name], f"{name}: {value:.3g}")
                for at, up, value in points
            ]
        else:
            parts += _line(points, colours[name], name)
    return parts


def tick_step(top: float) -> float:
    """A round number of which four to eight make *top*."""
    power = 1.0
    while power * 10 <= top / 4:
        power *= 10
    while power > top / 4:
        power /= 10
    return next(power * factor for factor in (5, 2.5, 2, 1) if power * factor <= top / 4 or factor == 1)


def _line(points: Sequence[tuple[float, float, float]], colour: str, name: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'] if points else []
    return parts + [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(name)}: {value:.3g}</title></circle>'
        for x, y, value in points
    ]


def _bar(corner: tuple[float, float], size: tuple[float, float], colour: str, title: str) -> str:
    (x, y), (width, height) = corner, size
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _legend(colours: Mapping[str, str], top: float) -> list[str]:
    parts, at = [], float(LEFT)
    for name, colour in colours.items():
        parts.append(f'<rect x="{at:.1f}" y="{top:.1f}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text((at + 18, top + 10), name, size=12))
        at += 40 + 6.6 * len(name)
    return parts


def _text(at: tuple[float, float], text: str, *, size: int, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{INK}">{escape(text)}</text>'
    )
