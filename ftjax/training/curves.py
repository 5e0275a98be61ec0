"""Curves of a run in a terminal or a log: lines of braille characters, each a grid of 2 x 4 dots."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, _CURVE, _LABEL = 80, 56, 9  # characters of a line, of the curve in it, and of the numbers beside it
_ROWS = {"reward": 5, "loss": 5, "learning_rate": 2}  # characters high; what else there is has 3
_FEWEST = 5  # records that make a curve
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a character, from the top


def draw(records: Iterable[Mapping[str, Any]], deciding: Mapping[int, float], name: str | None) -> str:
    """Loss, or reward where there is one, what decides which step is best, and the learning rate over the steps; ""
    where there is too little.

    records: of metrics.jsonl; deciding: {step: value} of what is called `name`.
    """
    records = list(records)
    curves = {metric: {one["step"]: one[metric] for one in records if metric in one} for metric in _ROWS}
    told = "reward" if curves["reward"] else "loss"
    first, rate = curves[told], curves["learning_rate"]
    if len(first) < _FEWEST:
        return ""
    lines, ends = [], (min(first), max(first))
    for metric, points in ((told, first), (name, deciding), ("learning_rate", rate)):
        finite = {step: value for step, value in points.items() if np.isfinite(value)}
        if metric and len(finite) >= min(_FEWEST, 3):
            lines += _curve(metric, finite, ends, _ROWS.get(metric, 3))
    first, last = (f"step {step}" for step in ends)
    return "\n".join([*lines, " " * (WIDTH - _CURVE) + f"{first}{last:>{_CURVE - len(first)}}"])


def _curve(name: str, points: Mapping[int, float], ends: tuple[int, int], rows: int) -> list[str]:
    """A curve with its name, and its largest and smallest value beside the first and the last line."""
    low, high = min(points.values()), max(points.values())
    drawn = _braille(_resampled(points, ends, 2 * _CURVE), low, high, rows)
    labels = [f"{high:.3g}", *[""] * (rows - 2), f"{low:.3g}"]
    width = WIDTH - _CURVE - _LABEL - 1
    names = [name[width * row : width * (row + 1)] for row in range(rows)]
    lines = zip(names, labels, drawn, strict=True)
    return [f"{name:<{width}}{label:>{_LABEL}} {line}".rstrip(" \u2800") for name, label, line in lines]


def _resampled(points: Mapping[int, float], ends: tuple[int, int], count: int) -> np.ndarray:
    """[count] values over the steps from `ends[0]` to `ends[1]`: means of the points near, or between two of them.

    NaN before the first point and after the last.
    """
    steps, values = np.array(sorted(points), float), np.array([points[step] for step in sorted(points)], float)
    between = np.interp(np.linspace(*ends, count), steps, values, left=np.nan, right=np.nan)
    inside = (steps >= ends[0]) & (steps <= ends[1])
    nearest = np.rint((steps[inside] - ends[0]) / (ends[1] - ends[0]) * (count - 1)).astype(int)
    counts, sums = (np.bincount(nearest, weights, minlength=count) for weights in (None, values[inside]))
    return np.where(counts > 0, sums / np.maximum(counts, 1), between)


def _braille(values: np.ndarray, low: float, high: float, rows: int) -> Sequence[str]:
    """`rows` lines of len(values) / 2 characters; neighbors are joined by dots between them."""
    height = 4 * rows
    level = (values - low) / (high - low or 1.0) * (height - 1)
    grid = np.zeros((height, len(values)), bool)
    before = None
    for column, value in enumerate(level):
        if np.isnan(value):
            before = None
            continue
        dot = round(float(value))
        first = dot if before is None else before + np.sign(dot - before)
        grid[min(first, dot) : max(first, dot) + 1, column] = True
        before = dot
    cells = grid[::-1].reshape(rows, 4, -1, 2).transpose(0, 2, 1, 3)
    return ["".join(chr(0x2800 + int(cell)) for cell in row) for row in (cells * _DOTS).sum((2, 3))]
