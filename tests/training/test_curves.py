"""Curves in characters: what is drawn where, in lines that fit a terminal."""

import math

import numpy as np

from ftjax.training import curves
from ftjax.training.display import Display

LINE = {step: {"step": step, "loss": float(100 - step), "learning_rate": 1e-4} for step in range(1, 101)}


def dots(line):
    """[4, 2 * characters]: the dots of a line of braille, by the bits of Unicode's table of patterns."""
    bits = ((0, 3), (1, 4), (2, 5), (6, 7))
    codes = [ord(character) - 0x2800 for character in line]
    return np.array([[code >> bit & 1 for code in codes for bit in row] for row in bits])


def curve(lines):
    return np.vstack([dots(line[24:].ljust(56, "\u2800")) for line in lines])


def test_a_line_is_a_line_from_corner_to_corner():
    lines = curves.draw(LINE.values(), {}, None).splitlines()
    grid = curve(lines[:5])
    assert grid.shape == (20, 112)
    rows = np.linspace(0, 19, 112)
    for column, row in enumerate(rows):
        lit = np.flatnonzero(grid[:, column])
        assert abs(lit - row).max() <= 1, column
    assert lines[0].split()[:2] == ["loss", "99"]
    assert lines[4].split()[0] == "0"


def test_its_lines_fit_and_say_what_they_are():
    scores = {0: 0.0, 50: math.nan, 60: 0.5, 100: 0.25}
    lines = curves.draw(LINE.values(), scores, "eval_support_ticket/score").splitlines()
    assert len(lines) == 5 + 3 + 2 + 1
    assert max(map(len, lines)) <= curves.WIDTH
    assert (lines[5][:14], lines[6][:14].rstrip()) == ("eval_support_t", "icket/score")
    assert lines[5].split()[1] == "0.5"
    assert lines[8].startswith("learning_rate    0.0001")
    assert lines[-1].split() == ["step", "1", "step", "100"]
    grid = curve(lines[5:8])
    peak = 2 * 56 * (60 - 1) / 99
    assert abs(np.flatnonzero(grid[0]).mean() - peak) < 2


def test_what_is_too_little_or_cannot_be_printed_is_not_drawn(capsys, monkeypatch):
    assert curves.draw([LINE[1], LINE[2], {"step": 2, "eval_loss": 1.0}], {2: 1.0}, "eval_loss") == ""
    text = curves.draw(LINE.values(), {}, None)
    Display(1).draw(text)
    assert text.splitlines()[0] in capsys.readouterr().out
    Display(1, quiet=True).draw(text)
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    Display(1).draw(text)
    assert capsys.readouterr().out == ""
