"""Curves as inline SVG, drawn without a script: colors by CSS class, a title for each point, a table as alternative."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 8, 24
COLORS = 8  # classes c0 ... c7
_DOTS = 40  # a series of more points is a line without dots
_HOVERED = 25  # columns of which each has titles to hover over
_ROWS = 12  # of the table beside a chart

Points = Sequence[tuple[float, float]]  # (step, value), ascending, finite


class Series(NamedTuple):
    name: str
    points: Points


class Chart(NamedTuple):
    title: str
    series: Sequence[Series]
    share: bool = False  # values are from 0 to 1 and shown as percentages

    def shown(self, value: float) -> str:
        return share(value) if self.share else figure(value)


def figure(value: float) -> str:
    """Such as 1,234,567 or 0.05788: four digits, and no exponent where there need not be one."""
    if abs(value) >= 1000 and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4g}"


def share(value: float) -> str:
    """Such as 90.5 %."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def thin(points: Points, columns: int) -> list[tuple[float, float]]:
    """At most four points of each column of the width: the first, lowest, highest and last, so that no spike is lost.

    M4 aggregation (Jugel et al., VLDB 2014): the line drawn is pixel for pixel that of all points.
    """
    if len(points) <= 4 * columns:
        return list(points)
    low, high = points[0][0], points[-1][0]
    kept: list[tuple[float, float]] = []
    start = 0
    for column in range(columns):
        limit = low + (high - low) * (column + 1) / columns
        end = start
        while end < len(points) and (points[end][0] <= limit or column == columns - 1):
            end += 1
        if end > start:
            lowest = min(range(start, end), key=lambda i: points[i][1])
            highest = max(range(start, end), key=lambda i: points[i][1])
            kept += [points[i] for i in sorted({start, lowest, highest, end - 1})]
        start = end
    return kept


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two, which differ."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def svg(chart: Chart) -> str:
    """The chart, without its title and legend."""
    drawn = [series.points for series in chart.series if series.points]
    left, right = _spread(min(points[0][0] for points in drawn), max(points[-1][0] for points in drawn))
    values = [value for points in drawn for _, value in points]
    bottom, top = _spread(min(values), max(values))

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - left) / (right - left)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (value - bottom) / (top - bottom)

    out = []
    for value in ticks(bottom, top, 4):
        at = f"{y(value):.1f}"
        label = html.escape(_tick(value, chart.share))
        out.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        out.append(f'<text class="y" x="{_LEFT - 5}" y="{y(value) + 3.5:.1f}">{label}</text>')
    for step in ticks(left, right, 4):
        if step == int(step):
            out.append(f'<text class="x" x="{x(step):.1f}" y="{HEIGHT - 7}">{_tick(step, False)}</text>')
    for number, series in enumerate(chart.series):
        place = [(x(step), y(value)) for step, value in thin(series.points, WIDTH - _LEFT - _RIGHT)]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in place)
        group = [f'<polyline points="{line}"/>']
        dots = "" if len(series.points) <= _DOTS else ' class="hidden"'
        for step, value in thin(series.points, _HOVERED):
            title = f"{series.name}, step {figure(step)}: {chart.shown(value)}"
            group.append(
                f'<circle{dots} cx="{x(step):.1f}" cy="{y(value):.1f}" r="{2.5 if not dots else 5}">'
                f"<title>{html.escape(title)}</title></circle>"
            )
        out.append(f'<g class="c{number % COLORS}{" dashed" if number >= COLORS else ""}">{"".join(group)}</g>')
    label = f"{chart.title} by step. " + ". ".join(
        f"{series.name}: {summary(chart, series)}" for series in chart.series
    )
    body = "".join(out)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{body}</svg>'


def whisker(value: float, interval: Sequence[float] | None, top: float) -> str:
    """A bar from 0 to a value, with its interval, of a row that ends at `top`."""
    scale = 100 / top if top > 0 else 0.0
    parts = [f'<rect x="0" y="3" width="{max(value, 0) * scale:.1f}" height="8"/>']
    if interval:
        low, high = (max(end, 0) * scale for end in interval)
        parts.append(f'<path d="M{low:.1f} 3v8M{high:.1f} 3v8M{low:.1f} 7H{high:.1f}"/>')
    return f'<svg class="whisker" viewBox="0 0 100 14" aria-hidden="true">{"".join(parts)}</svg>'


def summary(chart: Chart, series: Series) -> str:
    """Such as "1.362 at step 1, 0.05 at step 81; lowest 0.04 at step 70"."""
    if not series.points:
        return "no values"
    if len(series.points) == 1:
        return f"{chart.shown(series.points[0][1])} at step {figure(series.points[0][0])}"
    first, last = series.points[0], series.points[-1]
    text = ", ".join(f"{chart.shown(value)} at step {figure(step)}" for step, value in (first, last))
    lowest, highest = (pick(series.points, key=lambda point: point[1]) for pick in (min, max))
    for word, (step, value) in (("lowest", lowest), ("highest", highest)):
        if value not in (first[1], last[1]):
            text += f"; {word} {chart.shown(value)} at step {figure(step)}"
    return text


def table(chart: Chart) -> list[list[str]]:
    """Rows [step, a value of each series or ""] of some steps, evenly spread, and of all where a series has few."""
    values = [dict(series.points) for series in chart.series]
    steps = sorted(set().union(*values))
    count = min(_ROWS, len(steps))
    chosen = {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}
    chosen |= {step for points in values if len(points) <= _ROWS for step in points}
    shown = [[chart.shown(points[step]) if step in points else "" for points in values] for step in sorted(chosen)]
    return [[figure(step), *row] for step, row in zip(sorted(chosen), shown)]


def _tick(value: float, is_share: bool) -> str:
    if is_share:
        return share(value).replace(" ", "")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (size > 1e3 and abs(value) >= size):
            return f"{value / size:g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def _spread(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis; apart, even where there is one value."""
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, low + margin
