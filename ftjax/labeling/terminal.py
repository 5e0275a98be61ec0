"""Labeling in the terminal: two answers side by side or one above the other, and one word for each judgement."""

from collections.abc import Callable

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ftjax.labeling.session import Session
from ftjax.labeling.view import View, view
from ftjax.reporting.differences import Pieces

WORDS = {"1": "left", "2": "right", "t": "tie", "s": "skip", "u": "undo", "q": "quit", "?": "help"}
_HELP = "1 or 2: that answer is better; t: tie; s: skip; u: undo; q: quit. What is judged is kept."
_SIDE_BY_SIDE = 100  # characters, from which two answers stand beside each other


def label(session: Session, labeler: str, question: str, out: Console, ask: Callable[[str], str] = input) -> None:
    """Asks until nothing is open, the labeler quits or the input ends."""
    out.print(Text(question, "bold"))
    out.print(_HELP, markup=False)
    while (shown := session.current(labeler)) is not None:
        progress = session.progress(labeler)
        out.print()
        out.rule(Text(f"{progress.judged + 1} of {progress.judged + progress.open}"))
        _print(view(shown), out)
        word = ""
        while word in ("", "help"):
            try:
                typed = ask("1, 2, t, s, u, q or ? > ").strip().lower()
            except EOFError:
                return
            word = WORDS.get(typed[:1], "help")
            if word == "help":
                out.print(_HELP, markup=False)
        if word == "quit":
            return
        if word == "undo":
            if not session.can_undo(labeler):
                out.print("There is nothing to undo.")
            session.undo(labeler)
        else:
            session.judge(labeler, shown.pair.id, word)


def _print(seen: View, out: Console) -> None:
    for role, text in seen.prompt:
        out.print(Text(f"{role}: ", "bold") + Text(text))
    wide = out.width >= _SIDE_BY_SIDE
    panels = [
        Panel(_marked(pieces), title=f"answer {number}", title_align="left", width=out.width // 2 - 1 if wide else None)
        for number, pieces in ((1, seen.left), (2, seen.right))
    ]
    out.print(Columns(panels) if wide else panels[0])
    if not wide:
        out.print(panels[1])


def _marked(pieces: Pieces) -> Text:
    return Text.assemble(*[(text, "underline yellow" if differs else "") for text, differs in pieces])
