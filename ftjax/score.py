"""The rewards of rows by a reward model, and of preference pairs how often and how surely it is right.

    python -m ftjax.score --reward runs/reward --data pairs.jsonl --out scored.jsonl

A row is a conversation, a prompt with its answer, or a prompt with two, in any format that training reads; --out has it
with `reward`, of a pair `chosen_reward`, `rejected_reward` and `likelihood` (that the chosen answer is better). With
several heads there is `disagreement` too: the variance of the reward over them, of a pair that of the difference.

--reward is a run of objective.name=reward, the directory of an export of one, a model of transformers'
...ForSequenceClassification, or an adapter of one. Rewards of a run and of its exports are normalized: over the
training pairs they have the mean 0 and the standard deviation 1.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ftjax import cli, distributed, rewards
from ftjax.atomic import write_text
from ftjax.data.format import formats
from ftjax.data.format.example import Row
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.evals.calibration import Calibration, calibration
from ftjax.evals.intervals import interval
from ftjax.prompts import check_out
from ftjax.rewards import Conversation, RewardModel
from ftjax.training.display import Display

_SIDES = ("chosen", "rejected")


def score_rows(model: RewardModel, rows: Sequence[Row]) -> list[dict[str, float]]:
    """What `--out` has of each row besides its own fields."""
    answers = [_conversations(row) for row in rows]
    documents = [
        model.tokens(turns, row.fields.get("tools"), f"{row.origin}: {side}" if side else row.origin)
        for row, its in zip(rows, answers, strict=True)
        for side, turns in its.items()
    ]
    found, scores = [], iter(model.scores_of(documents))
    for its in answers:
        by_side = {side: next(scores) for side in its}
        if set(by_side) == set(_SIDES):
            found.append(_of_pair(model, by_side))
        else:
            found.append({"reward": float(by_side[""].mean())} | _disagreement(model, by_side[""]))
    return found


def _conversations(row: Row) -> dict[str, Conversation]:
    """{"chosen", "rejected"} of a preference row, {""} of any other; UserError for one without an answer."""
    fields = row.fields
    kind = formats.kind_of(fields)
    if kind == "text" or (kind == "classified" and "text" in fields):
        raise UserError(f"{row.origin}: is a text; a reward is of an answer, so write a prompt with its completion")
    if kind == "stepwise":
        raise UserError(f"{row.origin}: is an answer in steps; a reward is of a whole one, so join its completions")
    if kind == "preference":
        return {side: [*fields["prompt"], *fields[side]] for side in _SIDES}
    if "messages" in fields:
        return {"": fields["messages"]}
    prompt, answer = fields["prompt"], fields["completion"]
    return {"": (prompt, answer) if isinstance(prompt, str) else [*prompt, *answer]}


def _of_pair(model: RewardModel, scores: dict[str, np.ndarray]) -> dict[str, float]:
    chosen, rejected = (scores[side] for side in _SIDES)
    likelihood = model.likelihood(chosen[None], rejected[None])
    out = {"chosen_reward": float(chosen.mean()), "rejected_reward": float(rejected.mean())}
    return out | {"likelihood": float(likelihood[0])} | _disagreement(model, chosen - rejected)


def _disagreement(model: RewardModel, values: np.ndarray) -> dict[str, float]:
    return {"disagreement": float(values.var())} if model.heads > 1 else {}


def _rows_of_table(found: Calibration, right: Sequence[float]) -> dict[str, str]:
    """What is said of pairs, for `Display.table`."""
    between = interval(right)
    told = f"{found.accuracy:.1%} of {len(right)} pairs"
    table = {"accuracy": told + (f" (95 % interval {between[0]:.1%} to {between[1]:.1%})" if between else "")}
    for its in found.bins:
        if its.count:
            name = f"sure by {its.low:.0%} to {its.high:.0%}"
            table[name] = f"{its.count} pairs: sure by {its.confidence:.1%}, right in {its.accuracy:.1%}"
    return table | {
        "calibration": f"expected error {found.error:.3f}, Brier score {found.brier:.3f} (0.25 of a coin)",
    }


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not (FLAGS.reward and FLAGS.data and FLAGS.out):
        raise UserError("give --reward (a run or a model), --data (rows) and --out (the JSON Lines file to write)")
    distributed.refuse_several("ftjax.score")
    check_out(Path(FLAGS.out))
    rows = read_sources([{"source": FLAGS.data}])
    model = rewards.load(FLAGS.reward, FLAGS.step, FLAGS.model or "")
    found = score_rows(model, [rows[i] for i in range(len(rows))])
    lines: list[dict[str, Any]] = [rows.raw(i) | its for i, its in enumerate(found)]
    write_text(Path(FLAGS.out), "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))
    with Display(1) as display:
        likelihood = np.array([its["likelihood"] for its in found if "likelihood" in its])
        if len(likelihood):
            display.table("ftjax.score", _rows_of_table(calibration(likelihood), (likelihood > 0.5).tolist()))
        display.say(f"{len(found)} rows with their rewards are in {FLAGS.out}")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "ftjax.score"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    flags.DEFINE_string("reward", None, "a run of a reward model, its export or adapter, or a model of transformers")
    flags.DEFINE_string("step", None, best.STEP_HELP)
    flags.DEFINE_string("model", None, "where the base of a run or an adapter is now, if it was moved")
    flags.DEFINE_string("data", None, "rows of any source that training reads, such as a .jsonl file")
    flags.DEFINE_string("out", None, "the JSON Lines file to write")
    cli.run(main)
