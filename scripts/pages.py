"""The part of a page in docs/ that a script writes, between two marks."""

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


def write_measured(page: str, drawn: str) -> None:
    """Puts what was drawn, whole lines of Markdown, in the place of what is there."""
    path = DOCS / page
    before, _, after = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(f"{before}{BEGIN}{drawn}{END}{after.partition(END)[2]}", encoding="utf-8")
