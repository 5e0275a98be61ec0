"""What a comparison says, in words.

The best prompt is the contestant without tuning (the base as it is, with examples, with retrieved ones, or with another
instruction) that has the highest mean score; of equals the one with the shortest prompts. It is chosen on the examples
on which it is compared, which favors it: so tuning is never praised for luck in choosing. "The interval" is that of the
paired differences, tuned less best prompt, at 95 %.

In this order, for scores:

1. Fewer than 10 examples: too few to tell, whatever they say.
2. The interval is above 0: tuning beats the best prompt, by so much, with prompts so much shorter.
3. It is below 0, and the best prompt has retrieved examples: retrieve instead, or tune on retrieved prompts.
4. It is below 0 else: do not tune.
5. It has 0 in it, and the base as it is scores 0.9 or more (where scores go to 1), and its interval to the tuned model
   has 0 in it or is below: do not tune, the base is good already.
6. It has 0 in it, but more of the tuned answers are valid, beyond the interval of that difference: tuning fixes the
   form and not the score.
7. It has 0 in it and ends above -10 points (of other scores: a tenth), and the best prompt is half as long again or
   more: tuning does as well, so tune for cost and latency.
8. It has 0 in it: cannot tell; and how many examples could.

Whoever is neither a prompt nor the tuned model is named where it is beyond the interval above the tuned one.

For losses, tuned less base: below 0, tuning lowers it; above, do not tune; else cannot tell. A loss does not say
whether a prompt would have done.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.evals.intervals import examples_needed, interval

FEWEST = 10  # examples
PROMPTS = ("base", "shots", "retrieved", "instruction")  # the kinds of contestants without tuning
_GOOD = 0.9
_LONGER = 1.5
_MARGIN = 0.1


class Result(NamedTuple):
    """A contestant and how it did on the examples that all share.

    Attributes:
      kind: one of PROMPTS, "tuned" or "other".
      scores: float [n].
      valid: float [n], 1 for an answer of the form that is wanted, or None where none is known.
      prompt_tokens, seconds: means per answer; seconds may be None.
    """

    name: str
    kind: str
    scores: np.ndarray
    valid: np.ndarray | None = None
    prompt_tokens: float = 0.0
    seconds: float | None = None


def best_prompt(results: Sequence[Result]) -> Result | None:
    """The contestant without tuning that scores best, of equals the one with the shortest prompts."""
    prompts = [result for result in results if result.kind in PROMPTS]
    return max(prompts, key=lambda its: (its.scores.mean(), -its.prompt_tokens), default=None)


def of_scores(results: Sequence[Result]) -> str:
    """The verdict on one set; "" where there is no tuned model, or nothing to compare it with."""
    tuned = next((result for result in results if result.kind == "tuned"), None)
    best = best_prompt(results)
    if tuned is None or best is None:
        return ""
    return " ".join([_against_prompts(tuned, best, results), *_better_others(tuned, results)])


def _against_prompts(tuned: Result, best: Result, results: Sequence[Result]) -> str:
    unit = _Unit.of(results)
    named = f"the best prompt ({best.name})"
    if (n := len(tuned.scores)) < FEWEST:
        seen = f"tuned scores {unit.value(tuned.scores.mean())}, {named} {unit.value(best.scores.mean())}"
        return f"Too few examples to tell: {n}, of which {seen}; evaluate on {FEWEST} or more."
    differences = tuned.scores - best.scores
    by, low, high = differences.mean(), *interval(differences)
    if low > 0:
        return f"Tuning beats {named} by {unit.between(by, low, high)}{_shorter(tuned, best)}."
    if high < 0:
        loses = f"{best.name} beats the tuned model by {unit.between(-by, -high, -low)}{_longer(tuned, best)}."
        if best.kind == "retrieved":
            return f"Retrieve instead, or tune on retrieved prompts: {loses}"
        return f"Do not tune: {loses}"
    about = f"{unit.signed(by)} {unit.name}[{unit.number(low)}, {unit.number(high)}]"
    base = next((result for result in results if result.kind == "base"), None)
    if base is not None and unit.is_share and base.scores.mean() >= _GOOD:
        change = tuned.scores - base.scores
        ends = interval(change)
        if ends[0] <= 0:
            by = f"{unit.signed(change.mean())} {unit.name}[{unit.number(ends[0])}, {unit.number(ends[1])}]"
            return f"Do not tune: the base already scores {unit.value(base.scores.mean())} as it is; tuning adds {by}."
    if tuned.valid is not None and best.valid is not None and interval(tuned.valid - best.valid)[0] > 0:
        shares = f"{tuned.valid.mean():.0%} of the tuned model's answers are valid, {best.valid.mean():.0%} of those of"
        return f"Tuning fixes the form, not the score: {shares} {named}, and the scores differ by {about}."
    margin = _MARGIN * (1 if unit.is_share else abs(best.scores.mean()))
    if best.prompt_tokens >= _LONGER * tuned.prompt_tokens and low > -margin:
        return f"Tune for cost and latency, not for quality: it differs from {named} by {about}{_shorter(tuned, best)}."
    if (needed := examples_needed(differences)) is None:
        return f"No difference: tuned and {named} both score {unit.value(tuned.scores.mean())} on {n} examples."
    return f"Cannot tell: tuned and {named} differ by {about}; about {needed:,} examples would be needed, not {n:,}."


def _better_others(tuned: Result, results: Sequence[Result]) -> list[str]:
    """Sentences on the others that are better than the tuned model beyond the interval."""
    out, unit = [], _Unit.of(results)
    for other in results:
        if other.kind == "other" and len(other.scores) >= FEWEST:
            differences = other.scores - tuned.scores
            low, high = interval(differences)
            if low > 0:
                out.append(f"{other.name} beats the tuned model by {unit.between(differences.mean(), low, high)}.")
    return out


def of_losses(tuned: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> str:
    """The verdict on rows that have a loss: their summed losses in nats and their trained tokens, float [n] each."""
    if (n := len(tokens)) < FEWEST:
        return f"Too few rows to tell: {n}; evaluate on {FEWEST} or more."
    by = (tuned - base).sum() / tokens.sum()
    low, high = interval(tuned - base, tokens)
    now = tuned.sum() / tokens.sum()
    if high < 0:
        return (
            f"Tuning lowers the held-out loss by {-by:.3f} nats per token [{-high:.3f}, {-low:.3f}], to {now:.3f}; "
            "whether a prompt would have done, only a score can tell."
        )
    if low > 0:
        return f"Do not tune: it raises the held-out loss by {by:.3f} nats per token [{low:.3f}, {high:.3f}]."
    return f"Cannot tell: the held-out loss changes by {by:+.3f} nats per token [{low:.3f}, {high:.3f}] on {n:,} rows."


def overall(verdicts: dict[str, str]) -> str:
    """One text of the verdicts on all sets, {name: verdict}."""
    said = {name: text for name, text in verdicts.items() if text}
    return " ".join(said.values()) if len(said) < 2 else " ".join(f"{name}: {text}" for name, text in said.items())


class _Unit(NamedTuple):
    """How scores are written: those from 0 to 1 in points and percent, others as they are."""

    is_share: bool

    @classmethod
    def of(cls, results: Sequence[Result]) -> "_Unit":
        return cls(all(((result.scores >= 0) & (result.scores <= 1)).all() for result in results))

    @property
    def name(self) -> str:
        return "points " if self.is_share else ""

    def number(self, value: float) -> str:
        return f"{round(100 * value)}" if self.is_share else f"{value:.3g}"

    def signed(self, value: float) -> str:
        return ("+" if value >= 0 else "") + self.number(value)

    def value(self, value: float) -> str:
        return f"{value:.0%}" if self.is_share else f"{value:.3g}"

    def between(self, value: float, low: float, high: float) -> str:
        return f"{self.number(value)} {self.name}[{self.number(low)}, {self.number(high)}]"


def _shorter(tuned: Result, best: Result) -> str:
    """What tuning saves beside: ", with 92 % fewer prompt tokens and 70 % less time an answer", or ""."""
    saved = []
    if best.prompt_tokens and (share := 1 - tuned.prompt_tokens / best.prompt_tokens) >= 0.1:
        saved.append(f"{share:.0%} fewer prompt tokens")
    if saved and best.seconds and tuned.seconds and (share := 1 - tuned.seconds / best.seconds) >= 0.1:
        saved.append(f"{share:.0%} less time an answer")
    return f", with {' and '.join(saved)}" if saved else ""


def _longer(tuned: Result, best: Result) -> str:
    times = best.prompt_tokens / tuned.prompt_tokens if tuned.prompt_tokens else 1
    return f", with prompts {times:.1f} times as long" if times >= 1.1 else ""
