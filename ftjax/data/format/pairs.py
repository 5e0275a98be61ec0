"""Rows with a prompt and answers: preference pairs, answers or their steps with labels, and prompts of Alpaca rows."""

from ftjax.data.format.conversation import check_filled, check_string, conversation, tools_of
from ftjax.errors import UserError

_LARGEST_MARGIN = 10_000  # beyond it the loss of one pair would be all that a step is about, or no number in float32


def preference(fields: dict, origin: str) -> dict:
    """{"prompt", "chosen", "rejected", "margin"?, "probability"?, "tools"?} of a preference row.

    The first three are lists of messages. The probability is that of `chosen` being the better answer, 1 if not said.

    `chosen` and `rejected` are answers (strings or messages) to `prompt`, or both are whole conversations, which start
    with a turn of the user or the system. Of these the longest common start is the prompt; at least one message is left
    to each answer, also where the two are the same, which the checks of the data report. A `prompt` string beside whole
    conversations must be their first user turn.
    """
    chosen, rejected = (_answer(fields[side], f"{origin}: {side}") for side in ("chosen", "rejected"))
    prompt = _prompt(fields, origin)
    whole = [side for side in (chosen, rejected) if side[0]["role"] in ("system", "developer", "user")]
    if len(whole) == 1:
        raise UserError(f"{origin}: only one of chosen and rejected starts with the prompt; write both in the same way")
    if whole:
        if prompt and isinstance(fields.get("prompt"), list):
            raise UserError(f"{origin}: chosen and rejected repeat the prompt's turns; leave them in `prompt` only")
        if prompt and any(_first_user(side) != prompt[-1]["content"] for side in (chosen, rejected)):
            raise UserError(f"{origin}: `prompt` is not the first user turn of chosen and rejected; remove it")
        limit = min(len(chosen), len(rejected)) - 1
        length = next((i for i in range(limit) if _said(chosen[i]) != _said(rejected[i])), limit)
        if length == 0:
            raise UserError(f"{origin}: chosen and rejected have no first turn in common; they must share the prompt")
        system = prompt[:-1] if chosen[0]["role"] == "user" else []
        prompt, chosen, rejected = system + chosen[:length], chosen[length:], rejected[length:]
    elif not prompt:
        raise UserError(f"{origin}: chosen and rejected have no prompt; add `prompt`, or write both as conversations")
    record = {"prompt": conversation(prompt, f"{origin}: prompt", needs_assistant=False)}
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        record[side] = _checked_answer(record["prompt"], turns, f"{origin}: {side}")
    margin = fields.get("margin")
    if margin is not None:
        number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not (number and abs(margin) <= _LARGEST_MARGIN):  # nor NaN
            raise UserError(
                f"{origin}: margin is {margin!r}; write a finite number, at most {_LARGEST_MARGIN:,}, or leave it out"
            )
        record["margin"] = float(margin)
    probability = fields.get("probability")
    if probability is not None:
        number = isinstance(probability, int | float) and not isinstance(probability, bool)
        if not (number and 0 <= probability <= 1):
            raise UserError(f"{origin}: probability is {probability!r}; write a number from 0 to 1, or leave it out")
        if record.get("margin"):
            raise UserError(f"{origin}: has a margin and a probability, of which a pair may have one; leave one out")
        record["probability"] = float(probability)
    return record | tools_of(fields, origin)


def unpaired(fields: dict, origin: str) -> dict:
    """{"prompt", "completion", "label", "tools"?} of a KTO row."""
    label = fields["label"]
    if not isinstance(label, bool):
        raise UserError(
            f"{origin}: label is {label!r}; write true (a wanted answer) or false, or set `format` to "
            "prompt_completion if it means something else"
        )
    prompt = conversation(_prompt(fields, origin), f"{origin}: prompt", needs_assistant=False)
    answer = _answer(fields["completion"], f"{origin}: completion")
    answer = _checked_answer(prompt, answer, f"{origin}: completion")
    return {"prompt": prompt, "completion": answer, "label": label, **tools_of(fields, origin)}


def stepwise(fields: dict, origin: str) -> dict:
    """{"prompt", "completions", "labels", "tools"?} of a row of TRL's stepwise supervision: the steps of an answer, and
    whether each is right."""
    steps, labels = fields["completions"], fields["labels"]
    for name, values in (("completions", steps), ("labels", labels)):
        if not isinstance(values, list) or not values:
            raise UserError(f"{origin}: {name} must be a list with an entry for each step of the answer")
    if len(steps) != len(labels):
        raise UserError(
            f"{origin}: there are {len(steps)} completions and {len(labels)} labels; write a label for each step"
        )
    for i, (step, label) in enumerate(zip(steps, labels, strict=True)):
        check_filled(step, f"{origin}: completions[{i}]")
        if not isinstance(label, bool):
            raise UserError(f"{origin}: labels[{i}] is {label!r}; write true (the step is right) or false")
    prompt = conversation(_prompt(fields, origin), f"{origin}: prompt", needs_assistant=False)
    return {"prompt": prompt, "completions": steps, "labels": labels, **tools_of(fields, origin)}


def alpaca_prompt(fields: dict, origin: str) -> list[dict]:
    """The turns before the answer: `system`, the pairs of `history`, then the instruction and its input."""
    messages = system_turn(fields, origin)
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{origin}: history must be a list of [question, answer] pairs")
    for i, (question, answer) in enumerate(history):
        check_filled(question, f"{origin}: history[{i}][0]")
        messages += [{"role": "user", "content": question}, one_answer(answer, f"{origin}: history[{i}][1]")]
    parts = [fields.get(key) for key in ("instruction", "input")]
    for key, part in zip(("instruction", "input"), parts, strict=True):
        if part is not None:
            check_string(part, f"{origin}: {key}")
    text = "\n".join(part for part in parts if part and part.strip())
    check_filled(text, f"{origin}: instruction")
    return [*messages, {"role": "user", "content": text}]


def one_answer(text: object, what: str) -> dict:
    """The assistant turn of an answer's text."""
    check_filled(text, what)
    return {"role": "assistant", "content": text}


def system_turn(fields: dict, origin: str) -> list[dict]:
    """The message of a `system` field, or no message where there is none."""
    system = fields.get("system")
    if system is None or system == "":
        return []
    check_string(system, f"{origin}: system")
    return [{"role": "system", "content": system}]


def _prompt(fields: dict, origin: str) -> list[dict]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        return prompt
    if prompt is None:
        return alpaca_prompt(fields, origin) if fields.get("instruction") else []
    check_filled(prompt, f"{origin}: prompt")
    return [*system_turn(fields, origin), {"role": "user", "content": prompt}]


def _answer(given: object, what: str) -> list[dict]:
    if isinstance(given, str):
        return [one_answer(given, what)]
    return conversation([given] if isinstance(given, dict) else given, what, needs_assistant=False)


def _checked_answer(prompt: list[dict], answer: list[dict], where: str) -> list[dict]:
    if answer[0]["role"] != "assistant":
        raise UserError(f"{where} starts with a {answer[0]['role']} turn; the prompt must hold it")
    conversation(prompt + answer, where)
    return answer


def _said(message: dict) -> list:
    """The keys in which equal turns must agree; data sets may add others."""
    return [message.get(key) for key in ("role", "content", "tool_calls")]


def _first_user(messages: list[dict]) -> str | None:
    return next((message["content"] for message in messages if message["role"] == "user"), None)
