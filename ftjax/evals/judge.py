"""Which of two answers is better, as a model judges: a local one, or one behind an OpenAI-compatible endpoint.

Judges favor positions (Zheng et al. 2023, arXiv:2306.05685, section 3.3), so each pair is shown in both orders, and a
verdict that changes with the order is a tie.

    judge = endpoint("https://api.openai.com/v1", "gpt-4.1")
    win_rate(judge, prompts, ours, theirs)["rate"]
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax import prompts as prompts_lib
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.evals.chat_endpoint import Endpoint
from ftjax.evals.intervals import interval
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.prompts import Prompt
from ftjax.tree import Tree

_PAIR = """Two assistants answered the same request. Judge which answer is better: correct, helpful, to the point, and
in the form that the request asks for. Neither the order nor the length of the answers counts.

[Request]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

"""
REASONED = (
    _PAIR + "Give your reasons in a sentence or two, then your verdict as the last line: [[A]], [[B]] or [[TIE]]."
)
LETTER = _PAIR + "Which answer is better? Reply with one letter, A or B, and nothing else."

_VERDICT = re.compile(r"\[\[(A|B|TIE)\]\]")


class Judge(NamedTuple):
    """Who is asked, and how.

    Attributes:
      name: of the model.
      verdicts: (questions, where each comes from, for messages) -> "A", "B" or "TIE" for each.
      template: of a question, with {prompt}, {a} and {b}.
      everywhere: whether every process of a run is to ask, and not one for all.
    """

    name: str
    verdicts: Callable[[Sequence[str], Sequence[str]], Sequence[str]]
    template: str
    everywhere: bool = False


def win_rate(
    judge: Judge,
    prompts: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    origins: Sequence[str] | None = None,
) -> dict[str, Any]:
    """How often `ours` are judged better than `theirs`, answers to the same prompts in the same order.

    Args:
      prompts: what was asked, as text; see `text_of`.
      origins: where each prompt comes from, for messages; None: its number.

    Returns:
      "rate": (wins + ties / 2) / examples, and its 95 % "interval" by the bootstrap over prompts, None of one prompt;
      "wins", "ties", "losses", "examples": numbers of prompts;
      "inconsistent": the share of prompts whose verdict changed with the order, each of which is a tie;
      "first": the share of what was shown first among the verdicts that are no ties, 0.5 without a position bias, None
        where all are ties;
      "outcomes": of each prompt, 1.0 for a win, 0.5 for a tie, 0.0 for a loss.

    Raises:
      UserError: there is nothing to judge, or a template without one of its fields; and what the judge raises.
    """
    if not prompts or not len(prompts) == len(ours) == len(theirs):
        raise UserError(f"a judge compares two answers to each prompt; got {len(prompts)}, {len(ours)}, {len(theirs)}")
    pairs = list(zip(prompts, ours, theirs, strict=True))
    questions = [_fill(judge.template, prompt, our, their) for prompt, our, their in pairs]
    questions += [_fill(judge.template, prompt, their, our) for prompt, our, their in pairs]
    origins = [f"pair {number}" for number in range(len(pairs))] if origins is None else list(origins)
    verdicts = judge.verdicts(questions, origins * 2)
    before, after = verdicts[: len(pairs)], verdicts[len(pairs) :]
    won = {("A", "B"): 1.0, ("B", "A"): 0.0}
    outcomes = [won.get(both, 0.5) for both in zip(before, after, strict=True)]
    consistent = [*won, ("TIE", "TIE")]
    decided = [verdict for verdict in verdicts if verdict != "TIE"]
    return {
        "rate": float(np.mean(outcomes)),
        "interval": interval(outcomes),
        "wins": outcomes.count(1.0),
        "ties": outcomes.count(0.5),
        "losses": outcomes.count(0.0),
        "examples": len(pairs),
        "inconsistent": sum(both not in consistent for both in zip(before, after, strict=True)) / len(pairs),
        "first": decided.count("A") / len(decided) if decided else None,
        "outcomes": outcomes,
    }


def local(base: Base, variables: Tree, template: str = LETTER) -> Judge:
    """A model here as a judge: the letter that it finds likelier after the question, A or B, so nothing is parsed.

    variables: the model's, on one device or sharded over a mesh. Every process of a run asks it alike.
    template: one that asks for a letter.
    """
    letters = [base.tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]

    def verdicts(questions: Sequence[str], origins: Sequence[str]) -> list[str]:
        asked = [Prompt(origin, {"prompt": text}) for text, origin in zip(questions, origins, strict=True)]
        contexts = [prompts_lib.tokens(prompt, base.tokenizer) for prompt in asked]
        items = [Item(context, letter) for context in contexts for letter in letters]
        with jax.set_mesh(jax.tree.leaves(variables)[0].sharding.mesh):
            found = [its.total for its in log_likelihoods(base.model, variables, items)]
        return [_likelier(a, b) for a, b in zip(found[::2], found[1::2], strict=True)]

    return Judge(base.source, verdicts, template, everywhere=True)


def endpoint(url: str, model: str, template: str = REASONED, **settings: Any) -> Judge:
    """A model behind an OpenAI-compatible endpoint as a judge.

    A reply without exactly one verdict is a UserError with the question, and never a tie.

    Args:
      url: up to and including the version, such as https://api.openai.com/v1.
      template: one that asks for [[A]], [[B]] or [[TIE]].
      settings: further ones of `Endpoint`.
    """
    ask = Endpoint(url, model, **settings)

    def verdicts(questions: Sequence[str], origins: Sequence[str]) -> list[str]:
        return [verdict_of(*its) for its in zip(questions, ask(questions, origins), origins, strict=True)]

    return Judge(model, verdicts, template)


def verdict_of(question: str, reply: str, origin: str) -> str:
    """The verdict of a reply: "A", "B" or "TIE"; UserError where it has none, or several that differ."""
    found = set(_VERDICT.findall(reply))
    if len(found) != 1:
        what = "no verdict" if not found else "more than one verdict"
        raise UserError(
            f"{origin}: the judge's reply has {what}, [[A]], [[B]] or [[TIE]]: {reply!r}; it was asked:\n{question}"
        )
    return found.pop()


def text_of(prompt: Prompt) -> str:
    """A prompt as a judge reads it: its text, or a conversation with the role before each turn."""
    turns = prompt.fields.get("messages")
    if turns is None:
        return prompt.fields.get("prompt", prompt.fields.get("text"))
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _likelier(a: float, b: float) -> str:
    return "TIE" if a == b else "A" if a > b else "B"


def _fill(template: str, prompt: str, a: str, b: str) -> str:
    if missing := [name for name in ("{prompt}", "{a}", "{b}") if name not in template]:
        raise UserError(f"the judge's template lacks {', '.join(missing)}")
    # Not `str.format`: braces of the template's own, as of JSON, are to stay, and those of the answers.
    values = {"{prompt}": prompt, "{a}": a, "{b}": b}
    return re.sub(r"\{(prompt|a|b)\}", lambda match: values[match[0]], template)
