"""What PPO makes of a learned reward, on SmolLM2 with the support tickets: python scripts/ppo.py

A short supervised run comes first, then what it writes itself: of each prompt several tickets, of which a right one is
preferred to a wrong one, as a labeler would. An ensemble of reward heads learns these pairs, then PPO goes on against
it: with the penalty on the KL divergence and without, with the pretraining mix, and pessimistic. The tickets' own score
on held-out messages, which no reward model has seen, says what a rise of the reward is worth. Forty minutes on two
CPU cores for the first variant, half an hour for each further one. Everything is kept in OUT; the same command again
goes on, and a finished one only prints. With --write the table goes to docs/reinforcement.md.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from pages import write_measured
from preferences import with_interval
from remedies import write_replay

from ftjax import assemble, config_files, export, sharding, train
from ftjax.assemble import Base
from ftjax.atomic import write_rows
from ftjax.data.tokens.chat import render_prompt
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tasks import support_ticket
from ftjax.training import metrics
from ftjax.tree import Tree

TEXTS = 96  # of the pretraining mix: what the base itself answers to general requests
ROUNDS = 3  # of which the first and the last of a curve are means
SAMPLES = 8  # tickets that are written to a prompt for pairs
WRONG = 3  # of these, the most that are compared with a right one
SPARE = 4_000  # messages for the other half of `balanced`, more than it ever takes
HELD_OUT = 6  # a prompt in so many tests the reward model instead of training it; of 5, all would have one issue

VARIANTS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "without the KL penalty": {"objective.kl_coef": 0.0},
    "PPO-ptx": {"objective.ptx_coef": 1.0, "data.ptx_rows": 4},
    "pessimistic": {"rewards": "?std=1"},
}

JUDGE = {"objective.ensemble": 4, "optimizer.learning_rate": 5e-4, "data.batch_size": 4, "steps": 96}


class Sizes(NamedTuple):
    """How much is written, trained and scored; see the flags."""

    prompts: int
    steps: int
    tickets: int


def finished(config: str, changes: Mapping[str, Any], workdir: Path, steps: int) -> Path:
    """The workdir of a run of a config that ships, with these changes; it is finished."""
    its = config_files.load(config)
    its.update_from_flattened_dict(dict(changes) | ({"steps": steps} if steps else {}))
    if status := train.train(its, workdir):
        raise SystemExit(status)
    return workdir


def own_pairs(base: Base, variables: Tree, examples: Sequence[dict]) -> list[list[dict]]:
    """Of each example the pairs of a right and a wrong ticket among SAMPLES that the model writes."""
    prompts = [render_prompt(example["messages"][:-1], base.tokenizer) for example in examples]
    drawn = Sampling(temperature=1.0, seed=2)
    done = generate(base.model, variables, [p for p in prompts for _ in range(SAMPLES)], 48, base.end_tokens, drawn, 64)
    texts = [base.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in done]
    return [pairs_of(example, texts[i * SAMPLES : (i + 1) * SAMPLES]) for i, example in enumerate(examples)]


def balanced(pairs: Sequence[dict], spare: Iterator[dict]) -> list[dict]:
    """`pairs`, each that prefers issue a to b followed by one that prefers b to a, on a spare example where b is right.

    The model's mistakes are not drawn evenly: it writes some issues too often. A reward model then learns that these
    are bad whatever the message says, and PPO drops them everywhere. With every issue as often on either side, the
    message alone tells which one is right.
    """
    by_issue: dict[str, list[dict]] = {}
    found = []
    for pair in pairs:
        found.append(pair)
        good, bad = (issue_of(pair[side]) for side in ("chosen", "rejected"))
        if good == bad or bad not in support_ticket.ISSUES:
            continue
        while not by_issue.get(bad):
            example = next(spare)
            by_issue.setdefault(issue_of(example["messages"][-1:]), []).append(example)
        *prompt, answer = by_issue[bad].pop()["messages"]
        wrong = json.dumps(json.loads(answer["content"]) | {"issue": good}, separators=(",", ":"), ensure_ascii=False)
        found.append({"prompt": prompt, "chosen": [answer], "rejected": [answer | {"content": wrong}]})
    return found


def issue_of(messages: Sequence[dict]) -> str | None:
    """None where the answer is no ticket."""
    try:
        return json.loads(messages[-1]["content"])["issue"]
    except (ValueError, TypeError, KeyError):
        return None


def pairs_of(example: dict, texts: Sequence[str]) -> list[dict]:
    """None where all are right or all are wrong."""
    *prompt, answer = example["messages"]
    right = [text for text in texts if support_ticket.score(text, example)]
    wrong = dict.fromkeys(text for text in texts if text and not support_ticket.score(text, example))
    return [
        {"prompt": prompt, "chosen": [answer | {"content": good}], "rejected": [answer | {"content": bad}]}
        for good, bad in list(zip(right * WRONG, wrong))[:WRONG]
    ]


def prepare(out: Path, sft: Path, prompts: int) -> None:
    """Writes what the supervised run and its base write: pairs, and texts of the pretraining mix."""
    _, base, variables, _ = assemble.load_run(sft)
    first = len(support_ticket.train_examples())  # PPO has those before
    with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
        pairs = own_pairs(base, variables, support_ticket.train_examples(first + prompts)[first:])
        plain = {part: leaves for part, leaves in variables.items() if part != "lora"}
        write_replay(base, plain, out / "texts.jsonl", TEXTS)
    spare = iter(support_ticket.train_examples(first + prompts + SPARE)[first + prompts :])
    held_out = itertools.chain(*pairs[::HELD_OUT])
    trained = itertools.chain(*(its for i, its in enumerate(pairs) if i % HELD_OUT))
    write_rows(out / "held_out.jsonl", balanced(list(held_out), spare))
    write_rows(out / "pairs.jsonl", balanced(list(trained), spare))


def results(out: Path, wanted: Sequence[str], sizes: Sizes) -> dict[str, Path]:
    """{variant: its workdir}, all finished."""
    steps = sizes.steps
    sft = finished("quickstart", {"steps": 16, "data.eval": ()}, out / "sft", steps)
    if not (out / "adapter").exists():
        export.export_peft(sft, None, out / "adapter")
    begun = {"adapter.source": str(out / "adapter")}
    if not (out / "pairs.jsonl").exists():
        prepare(out, sft, sizes.prompts)
    judge = begun | JUDGE | {"data.train": (str(out / "pairs.jsonl"),), "data.eval": (str(out / "held_out.jsonl"),)}
    reward = finished("quickstart_reward", judge, out / "reward", steps)
    found = {}
    for name in wanted:
        changes = begun | {"data.eval": ({"source": "task:support_ticket", "limit": sizes.tickets},)} | VARIANTS[name]
        changes["objective.rewards"] = (f"reward:{reward}{changes.pop('rewards', '')}",)
        if "objective.ptx_coef" in changes:
            changes["data.ptx"] = (str(out / "texts.jsonl"),)
        found[name] = finished("quickstart_ppo", changes, out / name.replace(" ", "-"), 4 * steps)
    return found


def table(runs: Mapping[str, Path]) -> str:
    """Markdown. The tickets of all runs are the same, so that differences are paired."""
    lines = [
        "| | reward | KL | tickets right | against before | general text |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, workdir in runs.items():
        records = metrics.read(workdir / "metrics.jsonl")
        rounds = {record["episode"]: record for record in records if "episode" in record}.values()
        scores, kl = ([its[name] for its in rounds] for name in ("objective/scores", "objective/kl"))
        samples = metrics.read(workdir / "samples.jsonl")
        first, last = ([s["score"] for s in samples if s["step"] == end] for end in (0, records[-1]["step"]))
        general = [r["eval_general/change"] for r in records if "eval_general/change" in r]
        cells = [
            name,
            f"{np.mean(scores[:ROUNDS]):.2f} to {np.mean(scores[-ROUNDS:]):.2f}",
            f"{np.mean(kl[-ROUNDS:]):.1f}",
            f"{np.mean(first):.0%} to {np.mean(last):.0%}",
            with_interval(np.subtract(last, first), "+"),
            f"{general[-1]:+.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ppo-measured"), help="where everything is kept")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="these variants alone")
    parser.add_argument("--steps", type=int, default=0, help="of each training (default: those of the configs)")
    parser.add_argument("--prompts", type=int, default=200, help="on which pairs are written")
    parser.add_argument("--tickets", type=int, default=100, help="how many are scored")
    parser.add_argument("--write", action="store_true", help="also write the table in docs/reinforcement.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = table(
        results(args.out.absolute(), args.only or list(VARIANTS), Sizes(args.prompts, args.steps, args.tickets))
    )
    print(drawn)
    if args.write:
        write_measured("reinforcement.md", drawn)


if __name__ == "__main__":
    main()
