"""Where two texts differ, word by word."""

import difflib
import re
from collections.abc import Sequence

_MAX_WORDS = 600  # of a text that is compared word by word: the matcher is quadratic
_MIN_ALIKE = 0.3  # texts that have less in common are wholly different; marks between chance matches help nobody

# Characters of scripts without spaces are words of their own. Elsewhere only ASCII punctuation ends a word: a mark that
# combines with the letter before it must not be torn from it. Spaces belong to the word after them.
_WORD = re.compile(
    r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s!-/:-@\[-`{-~\u3040-\u30ff\u3400-\u9fff]+|[!-/:-@\[-`{-~])|\s+"
)

Pieces = list[tuple[str, bool]]  # (text, whether it differs)


def differences(before: str, after: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, which joined give them again."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    first = _alike(old, new)
    last = _alike(old[first:][::-1], new[first:][::-1])
    spans = [("equal", 0, first, 0, first)]
    middle_old, middle_new = old[first : len(old) - last], new[first : len(new) - last]
    if max(len(middle_old), len(middle_new)) <= _MAX_WORDS:
        matcher = difflib.SequenceMatcher(None, middle_old, middle_new, autojunk=False)
        opcodes = matcher.get_opcodes()
        same = first + last + sum(end - start for kind, start, end, *_ in opcodes if kind == "equal")
        alike = 2 * same / max(len(old) + len(new), 1)
    else:
        alike, opcodes = 0.0, []
    if alike < _MIN_ALIKE:
        opcodes = [("replace", 0, len(middle_old), 0, len(middle_new))]
    spans += [(kind, *(first + place for place in places)) for kind, *places in opcodes]
    spans.append(("equal", len(old) - last, len(old), len(new) - last, len(new)))
    return _pieces(old, [(kind, i, j) for kind, i, j, _, _ in spans]), _pieces(
        new, [(kind, i, j) for kind, _, _, i, j in spans]
    )


def _alike(old: Sequence[str], new: Sequence[str]) -> int:
    """How many words at the start are the same."""
    return next((i for i, (one, other) in enumerate(zip(old, new)) if one != other), min(len(old), len(new)))


def _pieces(words: Sequence[str], spans: Sequence[tuple[str, int, int]]) -> Pieces:
    pieces: Pieces = []
    for kind, start, end in spans:
        if start == end:
            continue
        text, differs = "".join(words[start:end]), kind != "equal"
        if pieces and pieces[-1][1] == differs:
            text = pieces.pop()[0] + text
        pieces.append((text, differs))
    return pieces
