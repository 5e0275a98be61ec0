"""Pairs to label, and sessions over them."""

import json
from pathlib import Path

from ftjax.labeling import candidates, journal
from ftjax.labeling.pairs import Pair, pairs_of
from ftjax.labeling.session import Session

EVIL = "Sent. <script>document.title = 'evil'</script><img src=x onerror=alert(1)> \u202e \x1b[31m &amp; {{ token }}"


def write_candidates(path: Path, prompts: int = 3, answers: int = 2) -> Path:
    """Answers 0, 1, ... to each prompt; the first prompt's first answer is hostile."""
    rows = [
        {"prompt": f"Where is order {i}?", "answers": [f"Order {i} was sent on day {k}." for k in range(answers)]}
        for i in range(prompts)
    ]
    rows[0]["answers"][0] = EVIL
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_pairs(root: Path, prompts: int = 3, answers: int = 2) -> list[Pair]:
    return pairs_of(candidates.of_file(str(write_candidates(root / "given.jsonl", prompts, answers))))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def session_of(root: Path, pairs: list[Pair], **options) -> tuple[Session, journal.Journal]:
    """A session over the journal in `root`, as a command that is started again opens it."""
    kept = journal.Journal(root / journal.FILE, [pair.id for pair in pairs])
    return Session(pairs, kept, **options), kept
