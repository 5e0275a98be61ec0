"""The parts of a page in docs/ that scripts write, each between two marks."""

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
END = "<!-- end -->\n"


def write_measured(page: str, drawn: str, what: str = "measured") -> None:
    """Puts what was drawn, whole lines of Markdown, in the place of what is there; what: of several parts of a page."""
    path, begin = DOCS / page, f"<!-- {what} -->\n"
    before, _, after = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(f"{before}{begin}{drawn}{END}{after.partition(END)[2]}", encoding="utf-8")
