"""What rows that fit no format may be meant as: columns under the names that other programs and data sets give them."""

# Our field -> the names that it has elsewhere, the usual ones first. `text` and `label` say too little to guess from.
_PROMPTS = ("question", "instruction", "query", "user", "human", "problem", "input", "source", "prompt")
_ANSWERS = ("answer", "response", "output", "assistant", "completion", "target", "solution", "reply", "gpt", "bot")
_CHOSEN = ("accepted", "preferred", "better", "winner", "chosen_response", "response_chosen", "chosen")
_REJECTED = ("refused", "dispreferred", "worse", "loser", "rejected_response", "response_rejected", "rejected")
_CHATS = ("conversation", "chat", "dialog", "dialogue", "turns", "messages", "conversations")
_TEXTS = ("content", "document", "body", "article", "passage", "story")


def columns(fields: dict) -> dict[str, str]:
    """The option `columns` with which the row would fit a format; {} where nothing says so."""
    names = {str(name).strip().lower(): str(name) for name, value in fields.items() if _filled(value)}

    def first(known: tuple[str, ...]) -> str | None:
        return next((names[name] for name in known if name in names), None)

    prompt, answer, chosen, rejected = map(first, (_PROMPTS, _ANSWERS, _CHOSEN, _REJECTED))
    if chat := first(_CHATS):
        start = str(fields[chat])
        if "role" in start or "from" in start:
            return {"messages" if "role" in start else "conversations": chat}
    if chosen and rejected:
        found = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    elif answer and {"instruction", "input"} <= names.keys():
        found = {"instruction": names["instruction"], "input": names["input"], "output": answer}
    elif prompt and answer:
        found = {"prompt": prompt, "completion": answer}
    elif len(names) == len(fields) == 2 and all(isinstance(value, str) for value in fields.values()):
        found = dict(zip(("prompt", "completion"), names.values()))  # a table of two columns, in whatever language
    else:
        found = {"text": first(_TEXTS)} if len(names) == 1 else {}
    return {ours: theirs for ours, theirs in found.items() if theirs and theirs != ours}


def _filled(value: object) -> bool:
    return isinstance(value, str | list) and bool(value)
