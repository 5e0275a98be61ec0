"""The formats of rows: which fields each has, how it is detected, and how it becomes one of five records.

A format is one entry of `FORMATS`: its fields and the function that checks them and makes the record. The kinds of
records, which `kind_of` names:

    text               {"text": str}
    chat               {"messages": [message], "tools"?: [schema]}
    prompt_completion  {"prompt": str, "completion": str}
    preference         {"prompt": [message], "chosen": [message], "rejected": [message], "margin"?: float, "tools"?}
    unpaired           {"prompt": [message], "completion": [message], "label": bool, "tools"?}

Messages are those of `conversation`. A record is a row of its own format too, so checking it again changes nothing.

Where a row fits several formats and the fields of one contain those of the others (`WHOLE_OF`), it has that one. Else
`format` must say which is meant.
"""

from collections.abc import Callable

from ftjax.data.format import guess, pairs, sharegpt
from ftjax.data.format.conversation import check_filled, conversation, tools_of
from ftjax.data.format.example import Row
from ftjax.errors import UserError, did_you_mean


def check_row(fields: dict, origin: str, format: str | None = None) -> Row:
    """Detects the format (unless it is named), checks the fields and makes the record.

    Raises:
      UserError: with the origin, what is wrong and what to do.
    """
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
    parts = {part for name in fitting for part in WHOLE_OF.get(name, ())}
    return [name for name in fitting if name not in parts]


def kind_of(fields: dict) -> str:
    """The kind of a record that `check_row` returned: text, chat, prompt_completion, preference or unpaired."""
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


def _openai_preference(fields: dict, origin: str) -> dict:
    given = fields["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise UserError(f"{origin}: input must be an object with `messages`; see OpenAI's preference format")
    sides = {"chosen": fields["preferred_output"], "rejected": fields["non_preferred_output"]}
    return pairs.preference({**given, "prompt": given["messages"], **sides, "margin": fields.get("margin")}, origin)


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
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "openai_preference": (("input", "preferred_output", "non_preferred_output"), _openai_preference),
    "sharegpt_preference": (("conversations", "chosen", "rejected"), _sharegpt_preference),
    "text": (("text",), _text),
}

# Rows of the format on the left also have the fields of those on the right. Alpaca's own data set holds each row once
# more as rendered `text`.
WHOLE_OF = {"kto": ("prompt_completion",), "sharegpt_preference": ("sharegpt", "preference"), "alpaca": ("text",)}

# All fields that any format reads.
FIELDS = {name for keys, _ in FORMATS.values() for name in keys}
FIELDS |= {"system", "history", "tools", "functions", "margin", "input"}


def _has(fields: dict, keys: tuple[str, ...]) -> bool:
    return all(fields.get(key) is not None for key in keys)
