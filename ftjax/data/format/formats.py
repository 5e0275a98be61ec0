"""The formats of rows: which fields each has, how it is detected, and how it becomes one of seven records.

A format is one entry of `FORMATS`: its fields and the function that checks them and makes the record. The kinds of
records, which `kind_of` names:

    text               {"text": str}
    chat               {"messages": [message], "tools"?: [schema]}
    prompt_completion  {"prompt": str, "completion": str}
    preference         {"prompt": [message], "chosen": [message], "rejected": [message], "margin"?: float,
                        "probability"?: float, "tools"?}
    unpaired           {"prompt": [message], "completion": [message], "label": bool, "tools"?}
    stepwise           {"prompt": [message], "completions": [str], "labels": [bool], "tools"?}
    classified         text, chat, or prompt and completion (both strings or both [message]), and {"label": str}

Messages are those of `conversation`. A record is a row of its own format too, so checking it again changes nothing.

Where a row fits several formats and the fields of one contain those of the others (`WHOLE_OF`), it has that one. Else
`format` must say which is meant.
"""

from collections.abc import Callable

from ftjax.data.format import guess, images, pairs, sharegpt
from ftjax.data.format.conversation import check_filled, conversation, tools_of
from ftjax.data.format.example import Row
from ftjax.errors import UserError, did_you_mean


def check_row(fields: dict, origin: str, format: str | None = None) -> Row:
    """Detects the format (unless it is named), checks the fields and makes the record.

    Raises:
      UserError: with the origin, what is wrong and what to do.
    """
    fields = images.filled(fields, origin)
    if format is None:
        fitting = detect(fields)
        if len(fitting) > 1:
            raise UserError(f"{origin}: fits the formats {' and '.join(fitting)}; set `format` to the one you mean")
        if fitting == ["prompt_completion"] and "label" in fields:  # it may be a bad answer, not to be learned
            raise UserError(
                f"{origin}: label is empty; write true or false, or set `format` to 'prompt_completion' to ignore it"
            )
    else:
        if format not in FORMATS:
            raise UserError(f"data format {format!r} is unknown{did_you_mean(format, FORMATS)}")
        fitting = [format] if _has(fields, FORMATS[format][0]) else []
    if not fitting:
        known = "; ".join(f"{name} ({', '.join(keys)})" for name, (keys, _) in FORMATS.items())
        misfit = f"does not fit the format {format!r}" if format else "fits no known format"
        if meant := {} if format else guess.columns(fields):
            theirs, ours = ", ".join(meant.values()), " and ".join(meant)
            option = f"{{'source': {origin.rpartition(':')[0]!r}, 'columns': {meant}}}"
            misfit += (
                f": columns {theirs} look like {ours}: if they are names of columns, write "
                f'--config.data.train="{option}". It'
            )
        else:
            misfit += ": it"
        raise UserError(
            f"{origin}: {misfit} has the fields {sorted(map(str, fields))}, and the formats are "
            f"{known}; rename its fields, or name them in the source's option 'columns'"
        )
    return Row(FORMATS[fitting[0]][1](fields, origin), origin)


def detect(fields: dict) -> list[str]:
    """The formats that a row may have: one, none, or several where its fields do not decide between them."""
    fitting = [name for name, (keys, _) in FORMATS.items() if _has(fields, keys)]
    if "classified" in fitting and not _names_a_class(fields, fitting):
        fitting.remove("classified")
    parts = {part for name in fitting for part in WHOLE_OF.get(name, ())}
    return [name for name in fitting if name not in parts]


def kind_of(fields: dict) -> str:
    """The kind of a record that `check_row` returned, see above."""
    if "completions" in fields:
        return "stepwise"
    if isinstance(fields.get("label"), str):
        return "classified"
    if "text" in fields:
        return "text"
    if "messages" in fields:
        return "chat"
    if "chosen" in fields:
        return "preference"
    return "unpaired" if "label" in fields else "prompt_completion"


def _text(fields: dict, origin: str) -> dict:
    check_filled(fields["text"], f"{origin}: text")
    return {"text": fields["text"]}


def _chat(fields: dict, origin: str) -> dict:
    messages = conversation(fields["messages"], origin)
    return {"messages": messages, **tools_of(fields, origin)}


def _prompt_completion(fields: dict, origin: str) -> dict:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = conversation(prompt, f"{origin}: prompt", needs_assistant=False)
        after = conversation(completion, f"{origin}: completion", needs_assistant=False)
        if after[0]["role"] != "assistant":
            raise UserError(f"{origin}: the completion starts with a {after[0]['role']} turn; the prompt must hold it")
        messages = conversation([{**message, "weight": 0} for message in before] + after, origin)
        return {"messages": messages, **tools_of(fields, origin)}
    for key in ("prompt", "completion"):
        check_filled(fields[key], f"{origin}: {key}")
    extra = tools_of(fields, origin)
    if extra or fields.get("system"):  # strings cannot hold these, a conversation can
        messages = [*pairs.system_turn(fields, origin), {"role": "user", "content": prompt}]
        answer = {"role": "assistant", "content": completion}
        return {"messages": [{**message, "weight": 0} for message in messages] + [answer], **extra}
    return {"prompt": prompt, "completion": completion}


def _alpaca(fields: dict, origin: str) -> dict:
    return {"messages": [*pairs.alpaca_prompt(fields, origin), pairs.one_answer(fields["output"], f"{origin}: output")]}


def _sharegpt(fields: dict, origin: str) -> dict:
    return {"messages": sharegpt.messages(fields, origin), **tools_of(fields, origin)}


def _names_a_class(fields: dict, fitting: list[str]) -> bool:
    """Whether the label of a row is that of a text or a conversation. Beside a prompt and a completion it may as well
    call the completion good or bad, so there it must be a name."""
    whole = [name for name in fitting if name not in ("classified", "kto")]
    sure = "kto" not in fitting or isinstance(fields["label"], str)
    return len(whole) == 1 and whole[0] in WHOLE_OF["classified"] and sure


def _classified(fields: dict, origin: str) -> dict:
    label = fields["label"]
    if not isinstance(label, str | int) or label == "":
        raise UserError(f"{origin}: label is {label!r}; write the name of a class, or its index in objective.classes")
    # Not 1 and 0 of true and false: there may be classes of these names, in any order.
    return _of_a_class(fields, origin) | {"label": str(label).lower() if isinstance(label, bool) else str(label)}


def _of_a_class(fields: dict, origin: str) -> dict:
    """What a label is about: a text, a conversation, or a prompt and its completion."""
    if fields.get("text") is not None:
        return _text(fields, origin)
    if fields.get("messages") is not None:
        messages = conversation(fields["messages"], origin, needs_assistant=False)
        return {"messages": messages, **tools_of(fields, origin)}
    if fields.get("prompt") is None or fields.get("completion") is None:
        raise UserError(f"{origin}: has a label of nothing; add the text, the messages, or prompt and completion")
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        for key in ("prompt", "completion"):
            check_filled(fields[key], f"{origin}: {key}")
        if not fields.get("tools") and not fields.get("system"):
            return {"prompt": prompt, "completion": completion}
        prompt = [*pairs.system_turn(fields, origin), {"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    turns = {"prompt": prompt, "completion": completion}
    checked = {key: conversation(its, f"{origin}: {key}", needs_assistant=False) for key, its in turns.items()}
    return checked | tools_of(fields, origin)


def _openai_preference(fields: dict, origin: str) -> dict:
    given = fields["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise UserError(f"{origin}: input must be an object with `messages`; see OpenAI's preference format")
    sides = {"chosen": fields["preferred_output"], "rejected": fields["non_preferred_output"]}
    said = {name: fields.get(name) for name in ("margin", "probability")}
    return pairs.preference({**given, "prompt": given["messages"], **sides, **said}, origin)


def _sharegpt_preference(fields: dict, origin: str) -> dict:
    prompt = sharegpt.messages(fields, origin, needs_assistant=False)
    sides = {side: sharegpt.answer(fields[side], f"{origin}: {side}") for side in ("chosen", "rejected")}
    return pairs.preference({**fields, "prompt": prompt, **sides}, origin)


# name -> the fields that it needs, and the function (fields, origin) that checks all fields and makes the record.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict, str], dict]]] = {
    "messages": (("messages",), _chat),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "preference": (("chosen", "rejected"), pairs.preference),
    "kto": (("prompt", "completion", "label"), pairs.unpaired),
    "stepwise": (("prompt", "completions", "labels"), pairs.stepwise),
    "classified": (("label",), _classified),
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "openai_preference": (("input", "preferred_output", "non_preferred_output"), _openai_preference),
    "sharegpt_preference": (("conversations", "chosen", "rejected"), _sharegpt_preference),
    "text": (("text",), _text),
}

# Rows of the format on the left also have the fields of those on the right. Alpaca's own data set holds each row once
# more as rendered `text`.
WHOLE_OF = {
    "kto": ("prompt_completion",),
    "classified": ("text", "messages", "prompt_completion", "kto"),
    "sharegpt_preference": ("sharegpt", "preference"),
    "alpaca": ("text",),
}

# All fields that any format reads.
FIELDS = {name for keys, _ in FORMATS.values() for name in keys}
FIELDS |= {"system", "history", "tools", "functions", "margin", "probability", "input", *images.COLUMNS}


def _has(fields: dict, keys: tuple[str, ...]) -> bool:
    return all(fields.get(key) is not None for key in keys)
