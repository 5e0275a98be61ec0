"""A pair as a person sees it: harmless text, and what differs between the two answers."""

import json
from typing import NamedTuple

from ftjax.data.audit import parts
from ftjax.labeling.session import Shown
from ftjax.reporting.differences import Pieces, differences
from ftjax.reporting.harmless import spelled


class View(NamedTuple):
    """prompt: (role, text) of each turn; left, right: the answers in pieces, (text, whether it differs)."""

    prompt: list[tuple[str, str]]
    left: Pieces
    right: Pieces


def view(shown: Shown) -> View:
    """Without marks where the answers have nothing in common."""
    prompt = [(turn["role"], spelled(parts.content(turn))) for turn in shown.pair.prompt]
    if shown.pair.tools:
        prompt.insert(0, ("tools", spelled(json.dumps(shown.pair.tools, ensure_ascii=False))))
    left, right = (spelled(parts.conversation(getattr(shown.pair, side))) for side in (shown.left, shown.right))
    pieces = differences(left, right)
    if all(differs for side in pieces for _, differs in side):
        pieces = [(left, False)], [(right, False)]
    return View(prompt, *map(_tight, pieces))


def _tight(pieces: Pieces) -> Pieces:
    """With the spaces before what differs left unmarked, where it is more than spaces."""
    tight: Pieces = []
    for text, differs in pieces:
        spaces = text[: len(text) - len(text.lstrip())] if differs and text.strip() else ""
        tight += [(spaces, False)] if spaces else []
        tight.append((text[len(spaces) :], differs))
    return tight
