"""What a model is asked: for a critique, for a revision, and which of two answers is better (Bai et al. 2022, arXiv
2212.08073, appendices C and E). Examples come before as turns of the same conversation."""

from collections.abc import Sequence

from ftjax.constitutional.principles import Example, Principle

Messages = list[dict]
Shown = tuple[Example, Principle]  # an example that is shown, and its principle

_ANSWERED = """A request, and an answer to it.

Request: {}

Answer: {}

{}"""
_COMPARED = """A request, and two answers to it.

Request: {}

(A) {}

(B) {}

{}"""
_CHOOSE = "Answer with (A) or (B)."
_THINK = "Think step by step first, in a few sentences."
_DECIDE = f"Which one is it? {_CHOOSE}"


def critique(prompt: str, answer: str, principle: Principle, examples: Sequence[Shown]) -> Messages:
    """What is answered with a critique."""
    shots = []
    for example, its in examples:
        shots += [*critique(example.prompt, example.answer, its, ()), _said(example.critique)]
    return [*shots, _asked(_ANSWERED.format(prompt, answer, principle.critique))]


def revision(prompt: str, answer: str, critique: str, principle: Principle, examples: Sequence[Shown]) -> Messages:
    """What is answered with a revision.

    The critique is part of the request, and not an answer before it as in the paper: a small model would repeat that.
    """
    shots = []
    for example, its in examples:
        shots += revision(example.prompt, example.answer, example.critique, its, ())
        shots.append(_said(example.revision))
    return [*shots, _asked(_ANSWERED.format(prompt, answer, f"Critique: {critique}\n\n{principle.revise}"))]


def comparison(
    prompt: str,
    first: str,
    second: str,
    principle: Principle,
    examples: Sequence[Shown],
    think: bool = False,
) -> Messages:
    """What is answered with (A) or (B); with `think`, with thoughts, after which `decision` asks for the letter.

    The examples are those of revisions: the revision is better, which is shown as (A) and as (B) by turns.
    """
    shots = []
    for number, (example, its) in enumerate(examples):
        sides = [example.answer, example.revision]
        better, worse = "BA" if number % 2 == 0 else "AB"
        asked = comparison(example.prompt, *(sides if better == "B" else sides[::-1]), its, (), think)
        if think:
            thought = f"About ({worse}): {example.critique} ({better}) does not have this fault."
            asked = decision(asked, thought)
        shots += [*asked, _said(f"({better})")]
    question = f"{principle.prefer} {_THINK if think else _CHOOSE}"
    return [*shots, _asked(_COMPARED.format(prompt, first, second, question))]


def decision(asked: Messages, thought: str) -> Messages:
    """What is answered with (A) or (B) after a thought."""
    return [*asked, _said(thought), _asked(_DECIDE)]


def transcript(messages: Messages) -> str:
    """A conversation as text, for models without a chat template; the answer goes on from it."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in messages]
    return "\n\n".join([*turns, "Assistant:"])


NEXT_TURN = "\n\nHuman:"  # what such a model writes when its answer has ended


def _asked(text: str) -> dict:
    return {"role": "user", "content": text}


def _said(text: str) -> dict:
    return {"role": "assistant", "content": text}
