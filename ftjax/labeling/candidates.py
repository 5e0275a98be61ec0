"""Prompts with the answers that are compared: read from a file of the user's, kept in the labeling directory."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.atomic import write_rows, write_text
from ftjax.data.audit.parts import conversation as text_of
from ftjax.data.format.conversation import check_filled, conversation, tools_of
from ftjax.data.format.formats import check_row
from ftjax.data.format.images import images_of
from ftjax.data.format.prompt import prompt_of
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

FILE = "candidates.jsonl"
SOURCE = "source.json"  # beside it: what the candidates were made from


class Candidates(NamedTuple):
    """A prompt and its answers, which differ from each other.

    Attributes:
      prompt: messages.
      answers: messages each.
      tools: schemas, or ().
      origin: where they are from, such as "rows.jsonl:12".
    """

    prompt: list[dict]
    answers: list[list[dict]]
    tools: list[dict] | tuple
    origin: str


def of_file(source: str) -> list[Candidates]:
    """Those of rows {"prompt", "answers": [...]} and of preference rows in any format that training reads.

    Raises:
      UserError: no such file, a bad row, or no prompt with two answers that differ.
    """
    rows = read_sources([{"source": source}])
    found = [of_row(rows.raw(i), rows.origin(i)) for i in range(len(rows))]
    if not any(len(one.answers) > 1 for one in found):
        raise UserError(f"{source}: no prompt has two answers that differ; name a file with some")
    return found


def of_row(fields: dict, origin: str) -> Candidates:
    """The candidates of a row; UserError with its origin where it is malformed."""
    if fields.get("answers") is None:
        row = check_row(fields, origin).fields
        _check_seen(row, origin)
        if "chosen" not in row:
            raise UserError(f"{origin}: has neither `answers`, a list, nor `chosen` and `rejected`; add one of them")
        return Candidates(row["prompt"], distinct([row["chosen"], row["rejected"]]), row.get("tools", ()), origin)
    if not isinstance(fields["answers"], list):
        raise UserError(f"{origin}: answers must be a list of answers")
    answers = [_answer(answer, f"{origin}: answers[{i}]") for i, answer in enumerate(fields["answers"])]
    prompt = prompt_of({key: value for key, value in fields.items() if key != "answers"}, origin)
    _check_seen(prompt, origin)
    return Candidates(turns_of(prompt, origin), distinct(answers), tools_of(fields, origin).get("tools", ()), origin)


def _check_seen(fields: dict, origin: str) -> None:
    if images_of(fields):
        raise UserError(f"{origin}: has images, which the page does not show; leave the row out")


def turns_of(prompt: dict, origin: str) -> list[dict]:
    """The messages of what `prompt_of` gives; UserError for text, which nobody has asked for."""
    if "text" in prompt:
        raise UserError(f"{origin}: is text to be continued; answers are compared to a prompt or a conversation")
    return prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}]


def distinct(answers: Iterable[list[dict]]) -> list[list[dict]]:
    """The answers without those that say the same as one before them; spaces around an answer say nothing."""
    found: dict[str, list[dict]] = {}
    for answer in answers:
        found.setdefault(text_of(answer).strip(), answer)
    return list(found.values())


def open_or_make(
    out: Path, source: dict[str, Any] | None, make: Callable[[], list[Candidates]]
) -> tuple[list[Candidates], bool]:
    """(the candidates of the labeling directory `out`, whether they were there already); made once, then kept.

    source: what they are made from, as JSON; None: those that are there.

    Raises:
      UserError: `out` has candidates of another source, or none and there is no source.
    """
    if (out / FILE).exists():
        recorded = json.loads((out / SOURCE).read_text(encoding="utf-8")) if (out / SOURCE).exists() else source
        if source is not None and source != recorded:
            other = next(key for key in {**recorded, **source} if recorded.get(key) != source.get(key))
            raise UserError(
                f"{out}: holds candidates of another source: {other} was {recorded.get(other)!r} and is now "
                f"{source.get(other)!r}. Name another --out, or go on with --out {out} alone"
            )
        return of_file(str(out / FILE)), True
    if source is None:
        raise UserError(
            f"{out}: nothing to compare yet; give --candidates FILE, --workdir RUN, or --model with --prompts"
        )
    made = make()
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / SOURCE, json.dumps(source, indent=2, ensure_ascii=False) + "\n")
    write_rows(out / FILE, map(_row, made))
    return made, False


def _row(one: Candidates) -> dict:
    tools = {"tools": one.tools} if one.tools else {}
    return {
        "prompt": short(one.prompt),
        "answers": [short(answer) for answer in one.answers],
        **tools,
        "origin": one.origin,
    }


def short(turns: list[dict]) -> str | list[dict]:
    """A prompt or an answer of one plain turn as its text, which reads the same."""
    return turns[0]["content"] if len(turns) == 1 and set(turns[0]) == {"role", "content"} else turns


def _answer(given: object, what: str) -> list[dict]:
    if isinstance(given, str):
        check_filled(given, what)
        return [{"role": "assistant", "content": given}]
    turns = conversation(given, what, needs_assistant=False)
    if turns[0]["role"] != "assistant":
        raise UserError(f"{what} starts with a {turns[0]['role']} turn; the prompt must hold it")
    return turns
