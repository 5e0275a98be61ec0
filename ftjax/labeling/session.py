"""Who is asked about which pair: several labelers at once, and none of them twice or about what another has settled."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ftjax.errors import UserError
from ftjax.labeling.draws import draw
from ftjax.labeling.journal import Journal, Label, now
from ftjax.labeling.pairs import Pair

CHOICES = ("left", "right", "tie", "skip")
_RECENT = 50  # judgements that the speed is measured on
_LONGEST_NAME = 64
_PATIENCE = 1800.0  # seconds after which a pair may go to another: nobody says that they have closed the page


class Stale(Exception):
    """The judgement is about another pair than the one the labeler has now, as from a second window."""


class Shown(NamedTuple):
    """A pair before a labeler's eyes; left: "a" or "b", the answer that stands there."""

    pair: Pair
    left: str

    @property
    def right(self) -> str:
        return "b" if self.left == "a" else "a"


class Progress(NamedTuple):
    """judged, open: pairs of this labeler; per_hour: None before the first judgement; held: open pairs of others."""

    judged: int
    open: int
    per_hour: float | None
    held: int


class Session:
    """Hands pairs out and takes judgements. Not for several threads.

    A share of the pairs, `overlap`, is shown to every labeler, so that their agreement can be measured. Every other
    pair is settled by the first who judges it, and nobody else is asked about it while somebody has it, for half an
    hour at most; a skipped one stays open for the others.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        journal: Journal,
        overlap: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """pairs: in the order in which they are to be asked about."""
        self._pairs, self._journal, self._seed, self._clock = {pair.id: pair for pair in pairs}, journal, seed, clock
        self._shared = {pair.id for pair in pairs if draw(seed, "overlap", pair.id) < overlap}
        self._held: dict[str, tuple[str, float]] = {}  # labeler -> the id of the pair, and since when

    def current(self, labeler: str) -> Shown | None:
        """What the labeler is to judge now, until they do; None where nothing is open for them."""
        if labeler not in self._held:
            free = next((pair for pair in self._pairs if self._is_open(pair, labeler)), None)
            if free is None:
                return None
            self._take(labeler, free)
        pair = self._held[labeler][0]
        return Shown(self._pairs[pair], "a" if draw(self._seed, "left", pair, labeler) < 0.5 else "b")

    def judge(self, labeler: str, pair: str, choice: str) -> None:
        """Records that of `pair`, which the labeler has, "left" or "right" is better, or "tie" or "skip".

        Raises:
          Stale: the labeler has another pair.
        """
        held, since = self._held.get(labeler, ("", 0.0))
        if held != pair:
            raise Stale
        shown = self.current(labeler)
        choice = {"left": shown.left, "right": shown.right}.get(choice, choice)
        self._journal.add(Label(pair, labeler, choice, shown.left, round(self._clock() - since, 1), now()))
        del self._held[labeler]

    def undo(self, labeler: str) -> None:
        """Takes the labeler's last judgement back and shows its pair to them again; nothing where there is none.

        A pair that they skipped may be somebody else's by now, and then stays theirs.
        """
        pair = self._journal.undo(labeler)
        if pair is not None and self._is_open(pair, labeler):
            self._take(labeler, pair)

    def can_undo(self, labeler: str) -> bool:
        return bool(self._journal.history.get(labeler))

    def leave(self, labeler: str) -> None:
        """Frees the pair that the labeler has for others."""
        self._held.pop(labeler, None)

    def progress(self, labeler: str) -> Progress:
        judged = self._journal.history.get(labeler, [])
        unjudged = [pair for pair in self._pairs if not self._is_settled(pair, labeler)]
        mine = self._held.get(labeler, ("",))[0]
        held = len({pair for pair in unjudged if pair != mine and self._is_held(pair)})
        seconds = [self._journal.labels[pair][labeler].seconds for pair in judged[-_RECENT:]]
        per_hour = 3600 / max(statistics.median(seconds), 0.1) if seconds else None
        return Progress(len(judged), len(unjudged) - held, per_hour, held)

    def _is_settled(self, pair: str, labeler: str) -> bool:
        """Whether the labeler need not be asked: they have judged it, or it is enough that somebody else has."""
        labels = self._journal.labels.get(pair, {})
        if labeler in labels:
            return True
        return pair not in self._shared and any(label.choice != "skip" for label in labels.values())

    def _is_open(self, pair: str, labeler: str) -> bool:
        return not self._is_settled(pair, labeler) and not self._is_held(pair)

    def _is_held(self, pair: str) -> bool:
        """Whether somebody has a pair that is for one labeler alone."""
        times = [since for held, since in self._held.values() if held == pair and pair not in self._shared]
        return any(self._clock() - since < _PATIENCE for since in times)

    def _take(self, labeler: str, pair: str) -> None:
        if pair not in self._shared:  # of somebody who has had it for too long
            self._held = {who: its for who, its in self._held.items() if its[0] != pair}
        self._held[labeler] = pair, self._clock()


def name_of(text: object) -> str:
    """A labeler's name as it is recorded; UserError where it is none."""
    name = " ".join(text.split()) if isinstance(text, str) else ""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise UserError(f"a labeler's name must have 1 to {_LONGEST_NAME} printable characters; this is {text!r}")
    return name
