"""Charts: small SVG pictures that follow the page's light or dark colours and stay sharp at any size."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34  # margins, where the numbers stand


class Series(NamedTuple):
    """A line, or points only: its colour is that of a class of the page, such as "g3" for the fourth group."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "s0"
    dashed: bool = False
    stairs: bool = False  # each value holds until the next
    line: bool = True
    labels: Sequence[str] = ()  # beside the points


def figure(
    title: str,
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    cuts: Iterable[float] = (),
    log: bool = False,
    from_zero: bool = True,
    legend: bool = True,
) -> str:
    """A chart with its title and a legend; ``cuts`` are dotted vertical lines."""
    points = [point for each in series for point in each.points]
    if not points:
        return ""
    values = [max(value, 1e-12) if log else value for _, value in points]
    along = [at for at, _ in points]
    if not any(each.line for each in series):  # single points keep away from the edges
        room = 0.1 * (max(along) - min(along))
        along += [min(along) - room, max(along) + room]
        room = 0.1 * (max(values) - min(values))
        values += [min(values) - room, max(values) + room]
    y_ticks = decades(min(values), max(values)) if log else around(min([0.0] * from_zero + values), max(values))
    x_ticks = ticks(min(along), max(along))
    plane = Plane(*ends(x_ticks, along), *ends(y_ticks, values), log)
    marks = "".join(f'<path class="cut" d="M{plane.x(at):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for at in cuts)
    drawn = "".join(drawing(each, plane) for each in series)
    names = [
        f'<li><b class="key {each.colour}{" dashed" * each.dashed}"></b>{escape(each.name)}'
        for each in series
        if each.name and each.line
    ]
    below = f'<ul class="legend">{"".join(names)}</ul>' if legend and len(names) > 1 else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{axes(plane, x_ticks, y_ticks, x, y)}{marks}{drawn}</svg>{below}</figure>"
    )


class Plane(NamedTuple):
    """Where numbers stand in a chart."""

    left: float
    right: float
    bottom: float
    top: float
    log: bool

    def x(self, value: float) -> float:
        """From the left edge."""
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the top edge."""
        if self.log:
            low, high, value = math.log10(self.bottom), math.log10(self.top), math.log10(max(value, self.bottom))
        else:
            low, high = self.bottom, self.top
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def ends(marks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The range that ticks and values take; never empty."""
    low, high = min(*marks, *values), max(*marks, *values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def drawing(series: Series, plane: Plane) -> str:
    """The line and the points of a series."""
    places = [(plane.x(at), plane.y(value)) for at, value in series.points]
    style = f'class="line {series.colour}{" dashed" * series.dashed}"'
    path = ""
    if series.line and len(places) > 1:
        join = "H{0:.1f}V{1:.1f}" if series.stairs else "L{0:.1f} {1:.1f}"
        first, *rest = places
        path = f'<path {style} d="M{first[0]:.1f} {first[1]:.1f}{"".join(join.format(*each) for each in rest)}"/>'
    few = not series.line or len(places) <= 60
    radius = 2.5 if series.line else 5
    dots = "".join(
        f'<circle class="point {series.colour}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in places if few
    )
    words = "".join(
        f'<text x="{a + (6 if a < WIDTH * 0.7 else -6):.1f}" y="{max(b - 6, TOP):.1f}" '
        f'text-anchor="{"start" if a < WIDTH * 0.7 else "end"}">{escape(label)}</text>'
        for (a, b), label in zip(places, series.labels, strict=False)
    )
    return path + dots + words


def axes(plane: Plane, x_ticks: Sequence[float], y_ticks: Sequence[float], x: str, y: str) -> str:
    """Lines, numbers and names of both axes."""
    low = HEIGHT - BOTTOM
    across = "".join(
        f'<path class="grid" d="M{LEFT} {plane.y(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 5}" y="{plane.y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in y_ticks
    )
    along = "".join(
        f'<text x="{plane.x(tick):.1f}" y="{low + 14}" text-anchor="middle">{number(tick)}</text>' for tick in x_ticks
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'{across}<path class="axis" d="M{LEFT} {low}H{WIDTH - RIGHT}"/>{along}'
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x)}</text>'
        f'<text transform="translate(10 {(TOP + low) / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)] or [low]


def around(low: float, high: float) -> list[float]:
    """Round numbers of which the first is not above ``low``, the last not below ``high``."""
    found = ticks(low, high)
    step = found[1] - found[0] if len(found) > 1 else abs(high - low) or abs(low) or 1.0
    before = [found[0] - step] if found[0] > low + 1e-9 * step else []
    after = [found[-1] + step] if found[-1] < high - 1e-9 * step else []
    return [round(each, 12) for each in before + found + after]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten around the range; of many decades only some."""
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    step = -(-(last - first) // 6)
    return [10.0**at for at in range(first, last + step, step)]


def number(value: float) -> str:
    """A number on an axis."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"
