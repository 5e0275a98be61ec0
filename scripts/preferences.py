"""What methods make of preferences, on SmolLM2 with the support tickets: python scripts/preferences.py

A short supervised run comes first, a fifth of the quickstart, so that there is room to rise. Each method goes on from
its adapter with the config that ships, and all are measured on the same held-out prompts: how often the better answer
is the likelier one, the score of written tickets, general text. An hour and more on two CPU cores. Results are kept in
OUT/results.jsonl; the same command again goes on, and a finished one only prints. With --write the table goes to
docs/preferences.md.
"""

import argparse
import json
import os
import re
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from pages import write_measured

from ftjax import assemble, config_files, export, rewards, sharding, train
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.atomic import write_rows
from ftjax.data.format.example import Document
from ftjax.data.format.formats import check_row
from ftjax.data.tokens.chat import render_prompt
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.evals import forgetting, general
from ftjax.evals.general import Text
from ftjax.evals.intervals import interval
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.method import method_of
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tasks import support_preference, support_ticket
from ftjax.training import metrics
from ftjax.tree import Tree

LONGEST, GENERAL = 64, 2560  # tokens of a general text, and of all of them
START = "SFT"  # the run whose adapter all others go on from
OWN, OWN_HELD_OUT = "own.jsonl", "own_held_out.jsonl"  # in OUT: pairs of right answers and of what START wrote instead
CHOSEN = {"source": "task:support_preference", "format": "prompt_completion", "columns": {"completion": "chosen"}}


class Variant(NamedTuple):
    """A run: a config that ships, what is changed in it, and in words what it learns from."""

    config: str
    data: str
    changes: Mapping[str, Any] = types.MappingProxyType({})


def _of_pairs(data: str = "96 pairs", **changes: Any) -> Variant:
    """As the config of DPO but for the objective."""
    return Variant("quickstart_dpo", data, {"objective.loss": ()} | changes)


VARIANTS: dict[str, Variant] = {
    START: Variant("quickstart", "128 tickets", {"steps": 16}),
    "SFT, the chosen answers": _of_pairs("192 tickets", **{"objective.name": "sft", "data.train": (CHOSEN,)}),
    "DPO + SFT": Variant("quickstart_dpo", "96 pairs"),
    "DPO + SFT, beta 0.5": Variant("quickstart_dpo", "96 pairs", {"objective.beta": 0.5}),
    "DPO": _of_pairs(**{"objective.loss": ("sigmoid",)}),
    "IPO": _of_pairs(**{"objective.loss": ("ipo",)}),
    "APO-zero": _of_pairs(**{"objective.loss": ("apo_zero",)}),
    "CPO": _of_pairs(**{"objective.name": "cpo"}),
    "SimPO": _of_pairs(**{"objective.name": "simpo", "objective.beta": 2.0}),
    "ORPO": _of_pairs(**{"objective.name": "orpo"}),
    "DPO + SFT, its own mistakes": Variant("quickstart_dpo", "96 pairs", {"data.train": (OWN,)}),
    "KTO": Variant("quickstart_kto", "192 labels"),
    "KTO, beta 0.5": Variant("quickstart_kto", "192 labels", {"objective.beta": 0.5}),
    "KTO, a quarter of the rate": Variant("quickstart_kto", "192 labels", {"optimizer.learning_rate": 5e-5}),
    "reward model": Variant("quickstart_reward", "192 pairs"),
}


class Sizes(NamedTuple):
    """How much is measured, and trained at most; smaller ones only show that it runs."""

    pairs: int = 100
    tickets: int = 100
    own: int = 300  # prompts on which START may make mistakes
    steps: int = 0  # of a run; 0: those of its config


class Held(NamedTuple):
    """What all are measured on.

    Attributes:
      answers: chosen and rejected of the first pair, of the second ...
      own: the same of pairs of the right answer and what START wrote instead.
    """

    answers: list[Document]
    own: list[Document]
    tickets: list[dict]
    texts: list[Text]


def held_out(base: Base, sizes: Sizes, own: list[dict]) -> Held:
    answers = documents(support_preference.test_examples(sizes.pairs), base)
    texts = general.within(general.read([{"source": configs.SHIPPED}], base.tokenizer, LONGEST), GENERAL, LONGEST)
    return Held(answers, documents(own, base), support_ticket.test_examples(sizes.tickets), texts)


def documents(pairs: Sequence[dict], base: Base) -> list[Document]:
    """Chosen and rejected of each."""
    out, tokenize = [], ROW_KINDS["ranked"].tokenize
    for number, pair in enumerate(pairs):
        (sides,) = tokenize(check_row(pair, f"pair {number}"), base.tokenizer, None, "assistant")
        out += [sides["chosen"], sides["rejected"]]
    return out


def mistakes(base: Base, variables: Tree, examples: Sequence[dict]) -> list[dict]:
    """Pairs of the right answer and the likeliest one, of the examples where that is another and no right one."""
    pairs = []
    for example, text in zip(examples, written(base, variables, examples)):
        *prompt, answer = example["messages"]
        if text.strip() and not support_ticket.score(text, example):
            pairs.append({"prompt": prompt, "chosen": [answer], "rejected": [answer | {"content": text.strip()}]})
    return pairs


def written(base: Base, variables: Tree, examples: Sequence[dict]) -> list[str]:
    """What the model answers, as likely as it can."""
    prompts = [render_prompt(example["messages"][:-1], base.tokenizer) for example in examples]
    done = generate(base.model, variables, prompts, 48, base.end_tokens, Sampling(), 50)
    return [base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in done]


def item(document: Document) -> Item:
    """An answer, which is what is trained, after its prompt."""
    (trained,) = np.nonzero(document.trained)
    return Item(document.tokens[: trained[0]], document.tokens[trained[0] : trained[-1] + 1])


def config_of(variant: Variant, out: Path, sizes: Sizes) -> ConfigDict:
    config = config_files.load(variant.config)
    changes = {"data.eval": (), **variant.changes}  # it is measured here
    if config.objective.name != "sft":
        changes["adapter.source"] = str(out / "adapter")
    if changes.get("data.train") == (OWN,):
        changes["data.train"] = (str(out / OWN),)
    if sizes.steps:
        changes["steps"] = sizes.steps
    config.update_from_flattened_dict(changes)
    return config


def results(out: Path, sizes: Sizes, wanted: Sequence[str]) -> Iterator[dict]:
    """Of the run that all start from, and of each wanted variant that OUT/results.jsonl lacks."""
    have = {record["name"] for record in metrics.read(out / "results.jsonl")}
    held = None
    for name in dict.fromkeys((START, *wanted)):
        if name in have:
            continue
        print(name, flush=True)
        workdir = out / re.sub(r"\W+", "-", name)
        began, used = time.time(), time.process_time()
        if status := train.train(config_of(VARIANTS[name], out, sizes), workdir):
            raise SystemExit(status)
        how = {"name": name, "seconds": round(time.time() - began), "cpu_seconds": round(time.process_time() - used)}
        config, base, variables, how["steps"] = assemble.load_run(workdir)
        with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
            if name == START and not (out / OWN).exists():
                write_rows(out / OWN_HELD_OUT, mistakes(base, variables, support_ticket.test_examples(sizes.tickets)))
                first = len(support_ticket.train_examples())
                more = support_ticket.train_examples(first + sizes.own)[first:]
                write_rows(out / OWN, mistakes(base, variables, more))
            held = held or held_out(base, sizes, metrics.read(out / OWN_HELD_OUT))
            how |= measured(base, variables, held) if method_of(config).generates else ranked(workdir, held)
            if name == START:
                plain = {part: leaves for part, leaves in variables.items() if part != "lora"}
                how["general_before"], how["where"] = nats(base, plain, held), where(workdir)
                if not (out / "adapter").exists():
                    export.export_peft(workdir, None, out / "adapter")
        yield how


def where(workdir: Path) -> str:
    """The hardware and versions of a run."""
    run = json.loads((workdir / "environment.json").read_text())["starts"][-1]
    devices, versions = run["devices"], run["versions"]
    names = ("ftjax", "jax", "flax", "optax")
    words = [f"{name} {versions[name]}" for name in names]
    return ", ".join([f"{devices['count']} x {devices['kind']} of {os.cpu_count()} cores", *words])


def ranked(workdir: Path, held: Held) -> dict[str, list[float]]:
    """What the reward model of a run says of both answers of each held-out pair."""
    found = rewards.load(str(workdir)).scores_of([answer.tokens for answer in held.answers]).mean(-1)
    return {"chosen": found[::2].round(4).tolist(), "rejected": found[1::2].round(4).tolist()}


def measured(base: Base, variables: Tree, held: Held) -> dict[str, list[float]]:
    """Of each held-out example: log p of both answers of a pair, the score of a ticket, nats of a text."""
    items = list(map(item, [*held.answers, *held.own]))
    totals = [round(found.total, 4) for found in log_likelihoods(base.model, variables, items)]
    pairs, own = totals[: len(held.answers)], totals[len(held.answers) :]
    texts = written(base, variables, held.tickets)
    return {
        "chosen": pairs[::2],
        "rejected": pairs[1::2],
        "own": np.subtract(own[::2], own[1::2]).tolist(),
        "tickets": [support_ticket.score(text, example) for text, example in zip(texts, held.tickets)],
        "general": nats(base, variables, held),
    }


def nats(base: Base, variables: Tree, held: Held) -> list[float]:
    """Of each general text, per token."""
    return [round(float(loss), 4) for loss in forgetting.losses(base.model, variables, held.texts)]


def table(records: list[dict]) -> str:
    """Markdown. Pairs, tickets and texts are the same in all records, so that differences are paired."""
    heads = ["", "learns from", "steps", "CPU minutes", "the better answer is likelier", "where both are terse"]
    heads += ["more so than before", "likelier than its own mistake", "tickets right", "against SFT", "general text"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    start = next((record for record in records if record["name"] == START), None)
    for record in records if start else []:
        cells = [record["name"], VARIANTS[record["name"]].data, record["steps"], f"{record['cpu_seconds'] / 60:.0f}"]
        margins = np.subtract(record["chosen"], record["rejected"])
        terse = [support_preference.FAULTS[i % len(support_preference.FAULTS)] == "wrong" for i in range(len(margins))]
        cells += [f"{(margins > 0).mean():.0%}", f"{(margins[terse] > 0).mean():.0%}"]
        if "tickets" not in record:  # it does not write
            cells += [f"{margins.mean():.1f} (rewards)", "", "", "", ""]
        else:
            before = np.subtract(start["chosen"], start["rejected"])
            risen = "" if record is start else f"{(margins > before).mean():.0%}, {(margins - before).mean():+.1f}"
            against = np.subtract(record["tickets"], start["tickets"])
            own = np.array(record.get("own", []))
            cells += [risen, f"{(own > 0).mean():.0%} of {len(own)}" if len(own) else ""]
            cells += [with_interval(record["tickets"]), "" if record is start else with_interval(against, "+")]
            cells.append(f"{np.subtract(record['general'], start['general_before']).mean():+.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if start:
        lines += ["", f"{len(start['chosen'])} pairs and {len(start['tickets'])} tickets; {start['where']}."]
    return "\n".join(lines) + "\n"


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean in percent, with its 95 % interval."""
    low, high = interval(values)
    return f"{100 * np.mean(values):{sign}.0f} % [{100 * low:{sign}.0f}, {100 * high:{sign}.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"), help="where runs and results are kept")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="these variants alone")
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help="how many (0 steps: those of the config)")
    parser.add_argument("--write", action="store_true", help="also write the table in docs/preferences.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(*(getattr(args, name) for name in Sizes._fields))
    for record in results(args.out, sizes, args.only or list(VARIANTS)):
        with (args.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    latest = {record["name"]: record for record in metrics.read(args.out / "results.jsonl")}
    drawn = table([latest[name] for name in VARIANTS if name in latest])
    print(drawn)
    if args.write:
        write_measured("preferences.md", drawn)


if __name__ == "__main__":
    main()
