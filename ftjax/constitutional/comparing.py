"""The second phase: which of two answers is better, as the probability that a critic gives to (A) and (B) (Bai et al.
2022, arXiv 2212.08073, section 4.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax.constitutional import requests
from ftjax.constitutional.draws import numbered
from ftjax.constitutional.models import Asked
from ftjax.constitutional.principles import Example, Principle, drawn, shown
from ftjax.evals.judge import text_of
from ftjax.labeling.candidates import short, turns_of
from ftjax.prompts import Prompt
from ftjax.sampling.sampler import Sampling

COMPARISONS = "comparisons.jsonl"
PREFERENCES = "preferences.jsonl"
CLAMP = (0.4, 0.6)  # of probabilities after thoughts, which else are nearly 0 or 1 (section 4.1)


class Comparing(NamedTuple):
    """How answers are compared.

    Attributes:
      principles: how many, drawn for each pair, whose probabilities are averaged.
      think: let the critic think before it chooses.
      temperature: of the answers. critic_temperature: of the thoughts.
    """

    constitution: Sequence[Principle]
    examples: Sequence[Example]
    principles: int = 4
    shots: int = 3
    think: bool = False
    temperature: float = 1.0
    critic_temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0


def compare(asked: Sequence[Prompt], first: int, model: Asked, critic: Asked, how: Comparing) -> list[dict]:
    """Of each prompt {"prompt", "answers": [2], "ended": [2], "feedback", "probability", "origin"}.

    `probability` is that of the first answer being the better one: the mean over `feedback`, which has for each
    principle {"principle", "in_order", "reversed", "thoughts"?}. These are the same probability, asked with the first
    answer as (A) and as (B).

    first: the number of the first prompt, from which all that is drawn follows.
    """
    prompts = [turns_of(prompt.fields, prompt.origin) for prompt in asked]
    sampling = Sampling(how.temperature, seed=numbered(how.seed, "pair"))
    written = model.write([turns for turns in prompts for _ in range(2)], how.max_new_tokens, sampling, 2 * first)
    rows = [
        {
            "prompt": short(turns),
            "answers": [text.text.strip() for text in both],
            "ended": [text.ended for text in both],
            "feedback": [],
            "probability": None,
            "origin": prompt.origin,
        }
        for turns, both, prompt in zip(prompts, zip(written[::2], written[1::2], strict=True), asked, strict=True)
    ]
    by_name = {principle.name: principle for principle in how.constitution}
    places, questions = [], []
    for number, (row, prompt) in enumerate(zip(rows, asked, strict=True), first):
        for principle in drawn(how.constitution, how.principles, how.seed, f"pair {number}"):
            shots = [(example, by_name[example.principle]) for example in shown(how.examples, principle, how.shots)]
            places.append((row, principle.name))
            for answers in (row["answers"], row["answers"][::-1]):
                questions.append(requests.comparison(text_of(prompt), *answers, principle, shots, how.think))
    thoughts = []
    if how.think:
        sampling = Sampling(how.critic_temperature, seed=numbered(how.seed, "thought"))
        each = len(questions) // len(rows)
        thoughts = [text.text.strip() for text in critic.write(questions, how.max_new_tokens, sampling, first * each)]
        pairs = zip(questions, thoughts, strict=True)
        questions = [requests.decision(question, thought or "Both are alike.") for question, thought in pairs]
    first_is_a = critic.choose(questions)
    if how.think:
        first_is_a = np.clip(first_is_a, *CLAMP)
    for i, (row, name) in enumerate(places):
        found = {"principle": name, "in_order": float(first_is_a[2 * i]), "reversed": 1 - float(first_is_a[2 * i + 1])}
        row["feedback"].append(found | ({"thoughts": thoughts[2 * i : 2 * i + 2]} if how.think else {}))
    for row in rows:
        row["probability"] = float(np.mean([[one["in_order"], one["reversed"]] for one in row["feedback"]]))
    return rows


def preferences(rows: Sequence[dict], least: float) -> list[dict]:
    """The pairs for training: {"prompt", "chosen", "rejected", "probability"}, the last that of chosen being better.

    least: where it is lower, the pair is left out. So is one with the same answers, an empty one, or as likely ones.
    """
    pairs = []
    for row in rows:
        if row["answers"][0] == row["answers"][1] or not all(row["answers"]) or row["probability"] == 0.5:
            continue
        better = int(row["probability"] < 0.5)
        probability = (row["probability"], 1 - row["probability"])[better]
        if probability < least:
            continue
        turns = isinstance(row["prompt"], list)
        sides = [[{"role": "assistant", "content": text}] if turns else text for text in row["answers"]]
        pairs.append(
            {
                "prompt": row["prompt"],
                "chosen": sides[better],
                "rejected": sides[1 - better],
                "probability": probability,
            }
        )
    return pairs


def told(rows: Sequence[dict], out: Path, least: float, max_new_tokens: int) -> list[str]:
    """What came of it, in sentences."""
    pairs = preferences(rows, least)
    lines = [f"{len(rows):,} pairs of answers with what the critic says of them are in {out / COMPARISONS}."]
    feedback = [one for row in rows for one in row["feedback"]]
    if same := sum(row["answers"][0] == row["answers"][1] for row in rows):
        lines.append(f"{same:,} pairs have the same answer twice; raise --temperature for others.")
    if cut := sum(not ended for row in rows for ended in row["ended"]):
        lines.append(f"{cut:,} answers are cut at --max_new_tokens={max_new_tokens}.")
    as_a = np.array([[one["in_order"], 1 - one["reversed"]] for one in feedback])
    agree = np.mean([(one["in_order"] > 0.5) == (one["reversed"] > 0.5) for one in feedback])
    lines.append(
        f"The critic gives (A) {as_a.mean():.0%}, whichever answer it is, and prefers the same answer in both orders "
        f"in {agree:.0%} of {len(feedback):,} comparisons."
    )
    if pairs:
        mean = np.mean([pair["probability"] for pair in pairs])
        lines.append(f"The preferred answer is better with a probability of {mean:.2f} on average.")
        lines.append(f"{len(pairs):,} preferences are in {out / PREFERENCES}: data.train reads it.")
    else:
        lines.append(f"No pair has a preferred answer with a probability of at least {least:g}.")
    return lines
