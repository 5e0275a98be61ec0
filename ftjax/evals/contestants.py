"""What prompting could do: the base with training examples in the prompt, and with another instruction."""

from collections.abc import Callable, Sequence

from ftjax import prompts
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.evals import formats, rewrites, shots
from ftjax.evals.comparison import Contestant, Model, Settings, digest_of, rows_together
from ftjax.evals.heldout import HeldOut
from ftjax.evals.rewrites import UNCHANGED, Instruction, Tried, applied
from ftjax.evals.scored import Question
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display


def with_shots(
    held: HeldOut, training: Sequence[Question], base: Base, k: int | str, limit: int, near: bool, display: Display
) -> Contestant | None:
    """The base with k training examples before each question; None, which is said, where that cannot be.

    k: a number, or "fit": as many as leave room for an answer.
    limit: the most tokens of a prompt.
    near: the nearest of each question, instead of the same ones for all.
    """
    chat = bool(base.tokenizer.chat_template)

    def length(prompt: prompts.Prompt) -> int:
        return len(prompts.tokens(prompt, base.tokenizer, rules=base.images))

    longest = max(held.questions, key=lambda question: length(question.prompt))

    def fits(examples: Sequence[Question], question: Question) -> bool:
        return length(shots.with_examples(question.prompt, examples, chat)) <= limit

    if k == "fit" and not (k := _most(len(training), lambda count: fits(training[:count], longest))):
        display.say(f"{held.name}: not one example fits into {limit:,} tokens")
        return None
    if k > len(training):
        display.say(f"{held.name}: {k} examples are left out: the training rows give {len(training)}")
        return None
    its = shots.nearest(training, held.questions, k) if near else [training[:k]] * len(held.questions)
    if not all(map(fits, its, held.questions) if near else [fits(training[:k], longest)]):
        display.say(f"{held.name}: {k} examples are left out: a prompt has room for {limit:,} tokens")
        return None
    name = f"base, {k} {'retrieved ' if near else ''}example{'s' if k > 1 else ''}"
    asked = [
        shots.with_examples(question.prompt, some, chat) for question, some in zip(held.questions, its, strict=True)
    ]
    return Contestant(name, "retrieved" if near else "shots", asked, k)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, by halving; 0 where 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_instruction(
    held: HeldOut,
    examples: Sequence[Question],
    base: Model,
    given: Sequence[Instruction],
    budget: int,
    searches: dict[str, list],
    settings: Settings,
    display: Display,
) -> Contestant | None:
    """The base with the instruction that does best on `examples`; None, which is said, where none does better.

    examples: training rows, with answers. given: what is tried; (): `rewrites.rewrites`.
    searches: {digest: what was tried and how it did}, of earlier searches; a new one is added.
    """
    tried = list(given) or rewrites.usual(formats.of_answers([its.expected for its in examples]))
    examples = examples[:budget]
    key = digest_of([base.digest, tried, budget, settings.max_new_tokens, [its.example for its in examples]])

    def answer(rivals: Sequence[Instruction], which: range) -> list[list[tuple[float, float]]]:
        its = [examples[i] for i in which]
        asked = [applied(question.prompt, rival) for rival in rivals for question in its]
        ids = prompts.encode(asked, base.base, settings.max_new_tokens)
        limits = settings.max_new_tokens, Sampling(), rows_together(ids, settings)
        made = prompts.complete(
            base.base, base.variables, ids, *limits, display, f"{held.name}: trying {len(rivals)} instructions"
        )
        valid = held.valid or (lambda text, question: False)
        graded = [
            (held.grade(one.text, question), float(valid(one.text, question)))
            for one, question in zip(made, [*its] * len(rivals), strict=True)
        ]
        return [graded[i : i + len(its)] for i in range(0, len(graded), len(its))]

    if key not in searches:
        try:
            searches[key] = rewrites.search(tried, len(examples), budget, answer)
        except UserError as error:
            display.say(f"{held.name}: other instructions are not tried, for training rows cannot be scored: {error}")
            return None
    best = Tried(*searches[key][0])
    best = best._replace(instruction=Instruction(*best.instruction))
    spent = sum(Tried(*its).answers for its in searches[key])
    if best.instruction == UNCHANGED:
        display.say(f"{held.name}: no other instruction did better in {spent} answers to training rows")
        return None
    asked = [applied(question.prompt, best.instruction) for question in held.questions]
    note = f"the best of {len(tried)} in {spent} answers to training rows: {best.instruction.text!r}"
    note += f", appended: {best.instruction.after.strip()!r}" if best.instruction.after else ""
    return Contestant("base, another instruction", "instruction", asked, note=note)
