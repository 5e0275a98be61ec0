"""One self-contained HTML page to browse rows: search, filters, colored tokens. It loads nothing.

Rows travel as JSON in a script element that is never executed, with "<", ">" and "&" escaped, and the page's code puts
them in as text, never as markup: a row that holds "</script>" is as harmless as any other. A content security policy
forbids the page every request.
"""

import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from ftjax.data.pipeline import DataSpec
from ftjax.inspection.pieces import Piece
from ftjax.inspection.survey import Epoch, Survey, shares
from ftjax.inspection.terminal import facts_of, histogram, verdict

MAX_ROWS = 3000
MAX_PIECES = 3000  # of one example; the page says that the others are left out
_FLAGS = {"": "", "bos": "b", "eos": "e", "special": "s"}


class PageRow(NamedTuple):
    """A row to browse: its origin, the index of its source, the codes of its findings, its examples as named pieces."""

    origin: str
    source: int
    codes: Sequence[str]
    examples: Sequence[tuple[str, list[Piece]]]


def render(survey: Survey, epoch: Epoch, spec: DataSpec, rows: Sequence[PageRow], checks: str = "on") -> str:
    """The page as text; at most MAX_ROWS of the rows, evenly spread. checks: config.data.checks."""
    shown = rows if len(rows) <= MAX_ROWS else [rows[i * len(rows) // MAX_ROWS] for i in range(MAX_ROWS)]
    embedded = {"sources": [source.name for source in survey.sources], "rows": [_row(row) for row in shown]}
    note = (
        f"This page holds {len(shown):,} of {survey.rows:,} rows: the first with each finding, and others evenly "
        f"spread; of a long example the first {MAX_PIECES:,} tokens."
    )
    parts = {
        "FACTS": "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in facts_of(survey, epoch, spec, None).items()
        ),
        "SOURCES": "".join(
            f"<tr><td>{html.escape(source.name)}</td><td>{source.rows:,}</td><td>{source.weight:g}</td>"
            f"<td>{share:.1%}</td><td>{source.tokens:,}</td></tr>"
            for source, share in zip(survey.sources, shares(survey.sources))
        ),
        "VERDICT": html.escape(f"{(said := verdict(survey, checks))[0].upper()}{said[1:]}."),
        "FINDINGS": "".join(
            f'<li class="{finding.severity}"><b>{finding.severity}</b> {html.escape(finding.message)} '
            f"<code>{html.escape(finding.code)}</code></li>"
            for finding in survey.findings
        ),
        "HISTOGRAM": svg(survey, spec.max_length),
        "NOTE": html.escape(note),
        "ROWS": embed(embedded),
    }
    text = resources.files("ftjax.inspection").joinpath("page.html").read_text(encoding="utf-8")
    # All placeholders in one pass, so that one inside a row is left alone.
    return re.sub(r"{{(\w+)}}", lambda placeholder: parts[placeholder[1]], text)


def embed(value: object) -> str:
    """JSON that is safe inside a script element, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def svg(survey: Survey, max_length: int) -> str:
    """The histogram of lengths as an inline SVG, with a line at max_length."""
    bars, width, height = histogram(survey.lengths), 640, 120
    if not bars:
        return ""
    step, out = width / len(bars), []
    for i, (low, high, count, largest) in enumerate(bars):
        bar = height * count / largest
        title = f"{low:,} to {high - 1:,} tokens: {count:,}"
        out.append(
            f'<rect x="{i * step + 1:.1f}" y="{height - bar:.1f}" width="{step - 2:.1f}" height="{bar:.1f}">'
            f"<title>{title}</title></rect>"
        )
        if low <= max_length < high:
            x = i * step + step * (max_length - low) / (high - low)
            out.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}"><title>max_length</title></line>')
        if i % 2 == 0:
            out.append(f'<text x="{i * step + 1:.1f}" y="{height + 18}">{low:,}</text>')
    return f'<svg viewBox="0 0 {width} {height + 24}" role="img" aria-label="tokens of an example">{"".join(out)}</svg>'


def _row(row: PageRow) -> dict:
    examples = [
        {
            "name": name,
            "text": [piece.text for piece in shown[:MAX_PIECES]],
            "flags": [("t" if piece.trained else "") + _FLAGS[piece.special] for piece in shown[:MAX_PIECES]],
            "tokens": sum(piece.tokens for piece in shown),
            "trained": sum(piece.tokens for piece in shown if piece.trained),
        }
        for name, shown in row.examples
    ]
    return {"origin": row.origin, "source": row.source, "codes": list(row.codes), "examples": examples}
