"""The first phase: the model answers, a critic says how the answer breaks a principle and revises it (Bai et al. 2022,
arXiv 2212.08073, section 3.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ftjax.constitutional import requests
from ftjax.constitutional.draws import numbered
from ftjax.constitutional.models import Asked
from ftjax.constitutional.principles import Example, Principle, drawn, shown
from ftjax.evals.judge import text_of
from ftjax.labeling.candidates import short, turns_of
from ftjax.prompts import Prompt
from ftjax.sampling.sampler import Sampling

CHAINS = "chains.jsonl"
SFT = "sft.jsonl"


class Revising(NamedTuple):
    """How answers are revised.

    Attributes:
      rounds: of a critique and a revision, each by another draw of a principle.
      shots: examples that are shown at most.
      temperature: of the answers. critic_temperature: of critiques and revisions.
    """

    constitution: Sequence[Principle]
    examples: Sequence[Example]
    rounds: int = 1
    shots: int = 3
    temperature: float = 1.0
    critic_temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0


def revise(asked: Sequence[Prompt], first: int, model: Asked, critic: Asked, how: Revising) -> list[dict]:
    """The chain of each prompt: {"prompt", "answer", "principles", "critiques", "revisions", "ended", "origin"}.

    The last revision is what is trained on; `ended` says whether it ended by itself. first: the number of the first
    prompt, from which all that is drawn follows.
    """
    prompts = [turns_of(prompt.fields, prompt.origin) for prompt in asked]
    texts = [text_of(prompt) for prompt in asked]
    sampling = Sampling(how.temperature, seed=numbered(how.seed, "answer"))
    written = model.write(prompts, how.max_new_tokens, sampling, first)
    chains = [
        {
            "prompt": short(turns),
            "answer": text.text.strip(),
            "principles": [],
            "critiques": [],
            "revisions": [],
            "ended": text.ended,
            "origin": prompt.origin,
        }
        for turns, text, prompt in zip(prompts, written, asked, strict=True)
    ]
    by_name = {principle.name: principle for principle in how.constitution}
    for round_ in range(how.rounds):
        # Of the order of a row one principle a round, so that it meets another one each time.
        orders = [drawn(how.constitution, how.rounds, how.seed, f"row {first + i}") for i in range(len(asked))]
        chosen = [order[round_ % len(order)] for order in orders]
        cases = []
        for chain, text, principle in zip(chains, texts, chosen, strict=True):
            shots = [(example, by_name[example.principle]) for example in shown(how.examples, principle, how.shots)]
            cases.append((text, (chain["revisions"] or [chain["answer"]])[-1], principle, shots))
        samplings = [
            Sampling(how.critic_temperature, seed=numbered(how.seed, what, str(round_)))
            for what in ("critique", "revision")
        ]
        requested = [requests.critique(*case) for case in cases]
        critiques = critic.write(requested, how.max_new_tokens, samplings[0], first)
        requested = [
            requests.revision(text, latest, critique.text.strip(), *how_asked)
            for (text, latest, *how_asked), critique in zip(cases, critiques, strict=True)
        ]
        revisions = critic.write(requested, how.max_new_tokens, samplings[1], first)
        for chain, principle, critique, revision in zip(chains, chosen, critiques, revisions, strict=True):
            chain["principles"].append(principle.name)
            chain["critiques"].append(critique.text.strip())
            chain["revisions"].append(revision.text.strip())
            chain["ended"] = revision.ended
    return chains


def trained(chains: Sequence[dict]) -> list[dict]:
    """The rows for supervised tuning: each prompt with its last revision, without those that are empty or cut."""
    rows = []
    for chain in chains:
        revision = chain["revisions"][-1]
        if revision and chain["ended"]:
            turns = isinstance(chain["prompt"], list)
            completion = [{"role": "assistant", "content": revision}] if turns else revision
            rows.append({"prompt": chain["prompt"], "completion": completion})
    return rows


def told(chains: Sequence[dict], out: Path, max_new_tokens: int) -> list[str]:
    """What came of it, in sentences."""
    rows = len(trained(chains))
    lines = [f"{len(chains):,} chains of an answer, critiques and revisions are in {out / CHAINS}: read some."]
    empty = sum(not chain["revisions"][-1] for chain in chains)
    cut = len(chains) - rows - empty
    if empty:
        lines.append(f"{empty:,} end with an empty revision and are left out of {SFT}.")
    if cut:
        lines.append(f"{cut:,} revisions are cut at --max_new_tokens={max_new_tokens} and left out of {SFT}.")
    if same := sum(chain["revisions"][-1] == chain["answer"] for chain in chains):
        lines.append(f"{same:,} answers are unchanged.")
    before, after = (
        sum(len(text.split()) for text in texts) / len(chains)
        for texts in ([chain["answer"] for chain in chains], [chain["revisions"][-1] for chain in chains])
    )
    lines.append(f"Words of an answer: {before:.1f} before, {after:.1f} after.")
    lines.append(f"{rows:,} prompts with their last revision are in {out / SFT}: data.train reads it.")
    return lines
