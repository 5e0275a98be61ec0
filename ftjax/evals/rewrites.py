"""A better instruction for the base: a few rewrites, tried on training examples, within a budget of answers."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ftjax.errors import UserError
from ftjax.evals.formats import Format
from ftjax.prompts import Prompt, lines_of

SYSTEM = "{system}"  # stands for what the prompt's own system message says
_ROLES = ("system", "developer")


class Instruction(NamedTuple):
    """A rewrite of a prompt.

    Attributes:
      text: in the place of the system message; of a prompt without one, before the first turn of the user.
      after: what is appended to the last turn of the user.
    """

    text: str = SYSTEM
    after: str = ""


class Tried(NamedTuple):
    """An instruction and how it did on so many training examples, as means."""

    instruction: Instruction
    answers: int
    score: float
    valid: float


UNCHANGED = Instruction()


def usual(form: Format | None) -> list[Instruction]:
    """What is tried where nothing is given: to say that only the answer is wanted, its form, and to take care."""
    only = f"Answer only with {form.name if form else 'the answer'}, and with nothing else."
    care = "You are an expert at this task. Read carefully, and leave nothing out."
    found = [
        Instruction(f"{SYSTEM}\n{only}"),
        Instruction(after=f"\n\n{only}"),
        Instruction(f"{care}\n{SYSTEM}\n{only} No explanation, no code fences.", f"\n\n{only}"),
    ]
    if form and form.detail != form.name:
        found.append(Instruction(f"{SYSTEM}\nAnswer only with {form.detail}. Nothing before it, nothing after it."))
    return found


def of_file(path: Path) -> list[Instruction]:
    """An instruction a line, {system} in it being what the prompt's own system message says."""
    return [Instruction(line.strip()) for line in lines_of(path, "an instruction") if line.strip()]


def applied(prompt: Prompt, instruction: Instruction) -> Prompt:
    """The prompt with the instruction. A template need not know system messages: where there was none, none comes."""
    if instruction == UNCHANGED:
        return prompt
    fields = prompt.fields
    if "prompt" in fields:
        before = instruction.text.replace(SYSTEM, "").strip()
        text = fields["prompt"] + instruction.after
        return Prompt(prompt.origin, fields | {"prompt": f"{before}\n\n{text}" if before else text})
    turns = [dict(turn) for turn in fields["messages"]]
    users = [turn for turn in turns if turn["role"] == "user"]
    systems = [turn for turn in turns if turn["role"] in _ROLES]
    text = instruction.text.replace(SYSTEM, systems[0]["content"] if systems else "").strip()
    if systems:
        systems[0]["content"] = text
    elif text and users:
        users[0]["content"] = f"{text}\n\n{users[0]['content']}"
    if users:
        users[-1]["content"] += instruction.after
    return Prompt(prompt.origin, fields | {"messages": turns})


def search(
    tried: Sequence[Instruction],
    examples: int,
    budget: int,
    answer: Callable[[Sequence[Instruction], range], Sequence[Sequence[tuple[float, float]]]],
) -> list[Tried]:
    """Every instruction as it did, the best first. UNCHANGED is among them, and wins where all are equal.

    Successive halving (Jamieson and Talwalkar 2016): all answer a few examples, the better half of them some more,
    until one is left or `budget` answers are spent.

    Args:
      examples: how many there are to be answered.
      answer: (instructions, which examples) -> of each instruction, of each example (score, whether it is valid); the
        mean score decides, then how many are valid.

    Raises:
      UserError: the budget does not give each instruction an answer.
    """
    rivals = [UNCHANGED, *tried]
    if budget < len(rivals):
        raise UserError(
            f"--instruction_budget={budget}: {len(tried)} instructions and the prompt as it is need an answer each; "
            f"give {len(rivals)} or more"
        )
    rounds = max(math.ceil(math.log2(len(rivals))), 1)
    found: dict[Instruction, list[tuple[float, float]]] = {rival: [] for rival in rivals}
    alive, done = rivals, 0
    for _ in range(rounds):
        more = min(budget // rounds // len(alive), examples - done)
        if more < 1 and done:
            break
        which = range(done, done + max(more, 1))
        for rival, answers in zip(alive, answer(alive, which), strict=True):
            found[rival] += answers
        done = which.stop
        alive = sorted(alive, key=lambda rival: _means(found[rival]), reverse=True)[: math.ceil(len(alive) / 2)]
    order = sorted(rivals, key=lambda rival: (len(found[rival]), _means(found[rival])), reverse=True)
    return [Tried(rival, len(found[rival]), *_means(found[rival])) for rival in order]


def _means(answers: Sequence[tuple[float, float]]) -> tuple[float, float]:
    score, valid = (sum(values) / len(answers) for values in zip(*answers))
    return score, valid
