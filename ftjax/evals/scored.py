"""What is answered and scored of `data.eval`: tasks, and sources that have a `score`; everything else has a loss."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax.config import SHIPPED
from ftjax.data.format.example import Row
from ftjax.data.read.sources import TASK, read_sources
from ftjax.errors import UserError
from ftjax.evals import scores
from ftjax.evals.entries import TASK_SCORE, entry_name, score_name, split_entries
from ftjax.evals.scores import Score
from ftjax.prompts import Prompt
from ftjax.tasks import registry

_PASS_AT = (10, 100)  # the k of pass@k beside 1, the mean, and the number of samples


class Question(NamedTuple):
    """What is asked, and what a score is told of it."""

    prompt: Prompt
    example: dict  # see `scores`

    @property
    def has_answer(self) -> bool:
        last = self.example["messages"][-1]
        return last["role"] == "assistant" and bool(last.get("content")) and not last.get("tool_calls")

    @property
    def expected(self) -> str:
        """The row's answer, "" where it has none."""
        return self.example["messages"][-1]["content"] if self.has_answer else ""


class ScoredSet(NamedTuple):
    """The questions of one entry.

    Attributes:
      name: support_ticket, or support_ticket[train] for another split than test; of a file its name without suffixes.
      score: the name of the score, "score" for that of a task.
    """

    name: str
    score: str
    questions: Sequence[Question]
    how: Score

    @property
    def metric(self) -> str:
        """The name of its mean in metrics.jsonl."""
        return f"eval_{self.name}/{self.score}"

    def grade(self, completion: str, question: Question) -> float:
        """The score of a completion; UserError with the row where the score's function fails."""
        where = f"{question.prompt.origin}: {self.score}"
        try:
            value = self.how.function(completion, question.example)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (Exception, SystemExit) as error:  # a person's own function may raise anything, which is never a 0
            raise UserError(f"{where}: {type(error).__name__}: {error}; the completion was {completion!r}") from error
        return scores.checked(value, f"{where} of {completion!r}")

    def grade_all(self, completions: Sequence[str], questions: Sequence[Question]) -> list[float]:
        """`grade` of each; programs run side by side, and a reward model reads them in batches."""
        if self.how.together is not None:
            values = self.how.together(completions, [question.example for question in questions])
            origins = [question.prompt.origin for question in questions]
            return [scores.checked(value, f"{at}: {self.score}") for value, at in zip(values, origins, strict=True)]
        if not (self.how.runs_code or self.how.side_by_side):
            return list(map(self.grade, completions, questions))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.grade, completions, questions))

    def means(self, grades: Sequence[float], samples: int) -> dict[str, float]:
        """{metric: mean}, and {"eval_NAME/pass@K": ...} where a 0 or 1 was given to each of several samples.

        grades: [questions * samples], those of a question beside each other.
        """
        means = {self.metric: sum(grades) / len(grades)}
        if self.how.binary and samples > 1:
            passed = [round(sum(grades[i : i + samples])) for i in range(0, len(grades), samples)]
            for k in sorted({samples, *(k for k in _PASS_AT if k < samples)}):
                chances = [scores.pass_at(k, count, samples) for count in passed]
                means[f"eval_{self.name}/pass@{k}"] = sum(chances) / len(chances)
        return means


def scored_sets(config: ConfigDict) -> list[ScoredSet]:
    """The scored entries of data.eval, read.

    Raises:
      UserError: an entry that cannot be read or has an option that scoring does not know; two of one name and score; a
        row without an answer where the score compares with one.
    """
    sets = [_read(entry, config.evaluate.run_code) for entry in split_entries(config)[0]]
    names = [one.name for one in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"config.data.eval: the answers of two entries would be recorded as those of {twice}; give a file one "
            "score, or a copy of it another name"
        )
    return sets


def _read(entry: dict[str, Any], run_code: bool) -> ScoredSet:
    source = entry["source"]
    task = registry.get(source.removeprefix(TASK)) if source.startswith(TASK) else None
    unknown = {"weight"} | ({"columns", "format"} if task else set())
    if unused := sorted(unknown & entry.keys()):
        raise UserError(f"config.data.eval: {source} is scored, which knows no {unused[0]!r}; leave it out")
    where = f"config.data.eval: {source}"
    how = score_of(entry["score"], source, run_code, where)
    rows = read_sources([entry])
    questions = []
    for i in range(len(rows)):
        question = question_of(rows[i], rows.raw(i))
        check(how, entry["score"], question)
        questions.append(question)
    if (name := entry_name(entry)) == SHIPPED:
        raise UserError(f"{where}: eval_{name}/... are the metrics of general text (evaluate.general); rename the file")
    return ScoredSet(name, score_name(entry), questions, how)


def score_of(name: str, source: str, run_code: bool, where: str) -> Score:
    """The score `name` of the rows of a source: a task's own, or one that `scores.find` finds.

    run_code: config.evaluate.run_code; where: for messages, what names it.
    """
    task = registry.get(source.removeprefix(TASK)) if source.startswith(TASK) else None
    is_own = name == TASK_SCORE and hasattr(task, "score")
    how = Score(task.score, valid=getattr(task, "valid", None)) if is_own else scores.find(name, where)
    if how.runs_code and not run_code:
        raise UserError(
            f"{where}: the score {name!r} runs what the model writes, on this machine and with few guards "
            "(docs/evaluation.md); allow it with --config.evaluate.run_code=True"
        )
    return how


def check(how: Score, name: str, question: Question) -> None:
    """UserError with its origin for a question whose answers the score `name` cannot score."""
    if how.needs_answer and not question.has_answer:
        raise UserError(
            f"{question.prompt.origin}: has no answer in words, with which the score {name!r} compares; "
            "remove the row, or score it with a function of your own"
        )
    try:
        if how.check is not None:
            how.check(question.example)
    except UserError as error:
        raise UserError(f"{question.prompt.origin}: score {name!r}: {error}") from error


def question_of(row: Row, raw: dict) -> Question:
    """What a row asks, of any format but text. raw: its fields as they are stored, which the score gets too."""
    prompt, answer = _parts(row.fields)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    example = raw | {"messages": [*messages, *([answer] if answer else [])]}
    tools = {"tools": row.fields["tools"]} if row.fields.get("tools") else {}
    fields = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    return Question(Prompt(row.origin, fields | tools), example)


def _parts(fields: dict) -> tuple[str | list[dict], dict | None]:
    """(prompt, the assistant's turn that answers it or None) of a checked row; a preference's chosen one."""
    if "messages" in fields:
        turns = [_plain(turn) for turn in fields["messages"]]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return turns[:last], turns[last]
    prompt, answer = fields["prompt"], fields.get("chosen", fields.get("completion"))
    prompt = prompt if isinstance(prompt, str) else [_plain(turn) for turn in prompt]
    if isinstance(answer, str):
        return prompt, {"role": "assistant", "content": answer}
    return prompt, _plain(answer[-1]) if answer else None


def _plain(turn: dict) -> dict:
    """Without its weight, which says whether it is trained."""
    return {key: value for key, value in turn.items() if key != "weight"}
