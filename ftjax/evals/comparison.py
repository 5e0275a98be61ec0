"""Contestants on the same held-out examples: each is measured once, and what it did is kept in evaluation.json.

A contestant is known by a digest of all that its answers depend on: the model, the tokens of its prompts, how long
answers may be, what is expected. So an evaluation that is begun again measures only what is not there yet.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import prompts
from ftjax.assemble import Base
from ftjax.atomic import write_text
from ftjax.errors import UserError
from ftjax.evals import heldout, verdict
from ftjax.evals.heldout import LOSS, HeldOut
from ftjax.evals.intervals import interval
from ftjax.evals.judge import Judge, text_of, win_rate
from ftjax.evals.scored import Question
from ftjax.prompts import Prompt
from ftjax.sampling.pictured import contents
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display
from ftjax.tree import Tree

FILE = "evaluation.json"
KINDS = (*verdict.PROMPTS, "tuned", "other")
_SAMPLES = 6  # examples whose answers are shown side by side
_AREA = 2**25  # rows x length^2 of a batch: attention takes four bytes of that for each head where it is not fused


class Model(NamedTuple):
    """A model that answers.

    Attributes:
      digest: of what it consists of.
      system: the system message of a conversation that has none, where its tokenizer does not bring it.
      same_tokens: as the run; else its losses are of other tokens, and no measure beside those of the run.
    """

    base: Base
    variables: Tree
    digest: str
    system: str = ""
    same_tokens: bool = True


class Contestant(NamedTuple):
    """A model and what it is given: one prompt for each question of a set."""

    name: str
    kind: str  # one of KINDS
    prompts: Sequence[Prompt]
    shots: int = 0
    note: str = ""


class Settings(NamedTuple):
    """How answers are made and what they cost. Prices are per million tokens, None where they are not known."""

    max_new_tokens: int
    batch_size: int
    price_in: float | None = None
    price_out: float | None = None

    @classmethod
    def of(cls, config: ConfigDict, price_in: float | None = None, price_out: float | None = None) -> "Settings":
        return cls(config.evaluate.max_new_tokens, config.evaluate.batch_size, price_in, price_out)


class Record:
    """The evaluation.json of a workdir, for one checkpoint; written after every contestant."""

    def __init__(self, path: Path, step: int, model: str):
        self._path = path
        try:
            old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); remove it, and everything is measured again") from error
        if old.get("version") != 1:
            old = {}
        if old.get("step") != step:  # what is said is of another model; what the base did stays
            for entry in old.get("sets", ()):
                entry |= {"verdict": "", "differences": [], "samples": []}
        self.document = {"version": 1, "verdict": "", "sets": []} | old | {"step": step, "model": model}

    def set_of(self, held: HeldOut, settings: Settings) -> dict[str, Any]:
        """The entry of a set, with what is known of the same examples and none of what is of others."""
        rows = None if held.rows is None else [held.rows[0].digest, held.rows[1].tolist()]
        asked = [[question.prompt.fields, question.expected] for question in held.questions]
        digest = digest_of([held.name, held.metric, settings.max_new_tokens, asked, rows])
        sets = self.document["sets"]
        found = next((its for its in sets if its["name"] == held.name and its["metric"] == held.metric), None)
        if found is None or found.get("digest") != digest:
            entry = {"name": held.name, "metric": held.metric, "examples": held.examples, "digest": digest}
            entry |= {"verdict": "", "contestants": [], "differences": [], "samples": [], "searches": {}}
            if found is None:
                sets.append(entry)
            else:
                sets[sets.index(found)] = entry
            found = entry
        return found

    def drop_others(self, digests: dict[str, str]) -> None:
        """Takes out what another base or tuned model did. digests: of those that are compared, by kind."""
        if self.document.get("forgetting", {}).get("model") != digests["tuned"]:
            self.document.pop("forgetting", None)
        for entry in self.document["sets"]:
            kinds = {its["name"]: "tuned" if its["kind"] == "tuned" else "base" for its in entry["contestants"]}
            kept = [
                its
                for its in entry["contestants"]
                if its["kind"] == "other" or its["model"] == digests[kinds[its["name"]]]
            ]
            if len(kept) < len(entry["contestants"]):
                entry.pop("win_rate", None)
            entry["contestants"] = kept

    def write(self) -> None:
        write_text(self._path, json.dumps(self.document, ensure_ascii=False, indent=1) + "\n")


def run(
    contestant: Contestant,
    held: HeldOut,
    model: Model,
    settings: Settings,
    record: Record,
    display: Display,
) -> None:
    """Measures a contestant where that is not done yet, and writes and says how it did."""
    entry = record.set_of(held, settings)
    found = measure(contestant, held, model, settings, entry, display)
    entry["contestants"] = [its for its in entry["contestants"] if its["name"] != contestant.name] + [found]
    summarize(entry, held, settings)
    record.write()
    display.say(f"{held.name}: {contestant.name}: {told(found, held.metric)}")


def measure(
    contestant: Contestant, held: HeldOut, model: Model, settings: Settings, entry: dict, display: Display
) -> dict[str, Any]:
    """The contestant's entry in evaluation.json: what is there of it already, or measured now."""
    key = "config.evaluate.max_new_tokens"
    ids = prompts.encode(contestant.prompts, model.base, settings.max_new_tokens, model.system, key=key)
    of = [model.digest, settings.max_new_tokens, entry["digest"], *map(contents, ids)]
    about = {"name": contestant.name, "kind": contestant.kind, "shots": contestant.shots, "note": contestant.note}
    digest = digest_of(of)
    if old := next((its for its in entry["contestants"] if its.get("digest") == digest), None):
        return old | about
    what = f"{held.name}: {contestant.name}"
    out: dict[str, Any] = about | {"digest": digest, "model": model.digest}
    if held.rows is not None and model.same_tokens:
        with (
            jax.set_mesh(jax.tree.leaves(model.variables)[0].sharding.mesh),
            display.counter(f"{what}, loss", held.examples) as advance,
        ):
            sums, tokens = heldout.losses(model.base.model, model.variables, held.rows, advance)
        out |= {"losses": sums.tolist(), "loss_tokens": tokens.tolist()}
    if ids:
        rows = rows_together(ids, settings)
        its = model.base, model.variables, ids, settings.max_new_tokens
        answers = prompts.complete(*its, Sampling(), rows, display, what)
        out["seconds"], out["batch_size"] = prompts.seconds_per_answer(*its, rows)
        out["answers"] = [
            {"completion": its.text, "prompt_tokens": its.prompt_tokens, "generated_tokens": its.generated_tokens}
            for its in answers
        ]
        grade(out, held)
    return out


def grade(contestant: dict, held: HeldOut) -> None:
    """Gives each answer its "score" and whether it is "valid", None where there is no such thing.

    What is there from an earlier evaluation is graded again: its answers are still true, but a score may have changed.
    """
    for answer, question in zip(contestant.get("answers", ()), held.questions):
        text = answer["completion"]
        answer["score"] = held.grade(text, question) if held.grade else None
        answer["valid"] = bool(held.valid(text, question)) if held.valid else None


def rows_together(ids: Sequence[np.ndarray], settings: Settings) -> int:
    """How many are answered together: fewer of long prompts, since attention that is not fused takes their square."""
    return int(np.clip(_AREA // max(map(len, ids)) ** 2, 1, settings.batch_size))


def summarize(entry: dict, held: HeldOut, settings: Settings) -> None:
    """Fills in what follows from the answers of a set's contestants: means, differences, samples, the verdict."""
    entry["examples"], entry["form"] = held.examples, held.form
    entry["contestants"].sort(key=lambda its: (KINDS.index(its["kind"]), its["shots"]))
    for its in entry["contestants"]:
        its |= _means(its, settings)
    tuned = next((its for its in entry["contestants"] if its["kind"] == "tuned"), None)
    others = [its for its in entry["contestants"] if its is not tuned]
    entry["differences"] = [_difference(tuned, its, held.metric) for its in others if tuned]
    entry["samples"] = _samples(entry["contestants"], held.questions)
    base = next((its for its in others if its["kind"] == "base"), None)
    if held.metric != LOSS:
        entry["verdict"] = verdict.of_scores([_result(its) for its in entry["contestants"]])
    elif tuned and base:
        tokens = np.asarray(base["loss_tokens"])
        entry["verdict"] = verdict.of_losses(np.asarray(tuned["losses"]), np.asarray(base["losses"]), tokens)


def judge(entry: dict, held: HeldOut, asked: Judge) -> str:
    """Records how often the tuned model's answers are better than the base's, and returns it in words; "" without both.

    The same judge is not asked twice about the same answers.
    """
    found = {its["kind"]: [answer["completion"] for answer in its.get("answers", [])] for its in entry["contestants"]}
    if not (found.get("tuned") and found.get("base")):
        return ""
    prompts_shown = [text_of(question.prompt) for question in held.questions]
    digest = digest_of([asked.name, asked.template, prompts_shown, found["tuned"], found["base"]])
    if entry.get("win_rate", {}).get("digest") != digest:
        entry["win_rate"] = {"of": "tuned", "against": "base", "judge": asked.name, "digest": digest} | win_rate(
            asked, prompts_shown, found["tuned"], found["base"]
        )
    its = entry["win_rate"]
    return (
        f"{held.name}: {asked.name} prefers the tuned model's answers to the base's at a win rate of {its['rate']:.2g}"
        f"{between(its['interval'])}; {its['inconsistent']:.0%} of its verdicts changed with the order"
    )


def told(its: dict, metric: str) -> str:
    """Such as "score 0.49 [0.42, 0.56], 97% valid, 812 prompt tokens"."""
    value = its["loss"] if metric == LOSS else its["score"]
    parts = [] if value is None else [f"{metric} {value:.3g}{between(its['interval'])}"]
    parts += [] if its["valid"] is None else [f"{its['valid']:.0%} valid"]
    if its["prompt_tokens"]:
        parts += [f"{its['prompt_tokens']:,.0f} prompt tokens"]
    return ", ".join(parts)


def between(ends: Sequence[float] | None) -> str:
    """ " [0.42, 0.56]" of an interval, "" of none."""
    return "" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]"


def _means(its: dict, settings: Settings) -> dict[str, Any]:
    """Means per example; cost per 1,000 answers."""
    out: dict[str, Any] = dict.fromkeys(("score", "interval", "valid", "loss", "prompt_tokens", "generated_tokens"))
    if "losses" in its:
        out["loss"] = sum(its["losses"]) / sum(its["loss_tokens"])
        out["interval"] = interval(its["losses"], its["loss_tokens"])
    answers = its.get("answers", [])
    for name in ("score", "valid", "prompt_tokens", "generated_tokens"):
        if answers and answers[0][name] is not None:
            out[name] = float(np.mean([answer[name] for answer in answers]))
    if out["score"] is not None:
        out["interval"] = interval([answer["score"] for answer in answers])
    prices = settings.price_in, settings.price_out
    known = answers and None not in prices
    cost = (out["prompt_tokens"] * prices[0] + out["generated_tokens"] * prices[1]) / 1000 if known else None
    return out | {"seconds": its.get("seconds"), "cost": cost}


def _difference(tuned: dict, other: dict, metric: str) -> dict[str, Any]:
    out: dict[str, Any] = {"of": tuned["name"], "against": other["name"], "score": None, "interval": None}
    if metric != LOSS:
        values = np.array([answer["score"] for answer in tuned["answers"]])
        values -= np.array([answer["score"] for answer in other["answers"]])
        out |= {"score": float(values.mean()), "interval": interval(values)}
    elif "losses" in tuned and "losses" in other:
        values, tokens = np.asarray(tuned["losses"]) - np.asarray(other["losses"]), np.asarray(tuned["loss_tokens"])
        out |= {"loss": float(values.sum() / tokens.sum()), "interval": interval(values, tokens)}
    if tuned["prompt_tokens"] and other["prompt_tokens"]:
        out["prompt_tokens"] = tuned["prompt_tokens"] / other["prompt_tokens"] - 1
    return out


def _samples(contestants: Sequence[dict], questions: Sequence[Question]) -> list[dict]:
    """A few examples with the answers of all who have answered."""
    answered = [its for its in contestants if "answers" in its]
    out = []
    for i in np.unique(np.linspace(0, len(questions) - 1, _SAMPLES).astype(int)) if questions and answered else ():
        sample = {"prompt": questions[i].prompt.last, "expected": questions[i].expected}
        for key, name in {"completions": "completion", "scores": "score"}.items():
            sample[key] = {its["name"]: its["answers"][i][name] for its in answered}
        out.append(sample)
    return out


def _result(its: dict) -> verdict.Result:
    scores, valid = ([answer[name] for answer in its["answers"]] for name in ("score", "valid"))
    known = np.array(valid, np.float64) if None not in valid else None
    return verdict.Result(
        its["name"], its["kind"], np.array(scores, np.float64), known, its["prompt_tokens"], its["seconds"]
    )


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
