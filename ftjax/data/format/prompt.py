"""Rows of any format -> what a model is to answer: a row without its answer, which it may also lack from the start."""

from ftjax.data.format import images, pairs, sharegpt
from ftjax.data.format.conversation import check_filled, conversation, tools_of
from ftjax.data.format.example import Row
from ftjax.data.format.formats import check_row, detect
from ftjax.errors import UserError


def prompt_of(fields: dict, origin: str) -> dict:
    """{"messages": [message], "tools"?: [schema]}, {"prompt": str} or {"text": str} of a row.

    A conversation ends with its last turn of the user or of a tool. A `text` row has no answer: it is to be continued.

    Raises:
      UserError: with the origin; no field holds a prompt, it is empty, or there is no turn to answer.
    """
    fields = images.filled(fields, origin)
    if fields.get("messages") is not None:
        turns = conversation(fields["messages"], origin, needs_assistant=False)
    elif fields.get("conversations") is not None:
        turns = sharegpt.messages(fields, origin, needs_assistant=False)
    elif fields.get("prompt") is not None:
        if not isinstance(fields["prompt"], list):
            return _of_a_string(fields, origin)
        turns = conversation(fields["prompt"], f"{origin}: prompt", needs_assistant=False)
    elif fields.get("chosen") is not None and fields.get("rejected") is not None:
        turns = pairs.preference(fields, origin)["prompt"]
    elif isinstance(fields.get("input"), dict) and fields["input"].get("messages") is not None:
        turns = conversation(fields["input"]["messages"], f"{origin}: input", needs_assistant=False)
        fields = fields["input"]
    elif fields.get("instruction") is not None:
        turns = pairs.alpaca_prompt(fields, origin)
    elif fields.get("text") is not None:
        check_filled(fields["text"], f"{origin}: text")
        return {"text": fields["text"]}
    else:
        raise UserError(
            f"{origin}: holds no prompt: it has the fields {sorted(map(str, fields))}, and prompts are read from "
            "messages, conversations, prompt, instruction, input.messages, chosen and rejected, and text; rename its "
            "fields"
        )
    asked = [i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool")]
    if not asked:
        raise UserError(f"{origin}: has no turn of the user to answer")
    last = turns[asked[-1]]
    if last["role"] == "user":
        check_filled(last["content"], f"{origin}: the prompt")
    return {"messages": turns[: asked[-1] + 1], **tools_of(fields, origin)}


def check_question(fields: dict, origin: str, format: str | None = None) -> Row:
    """A row whose completions are scored: as `check_row` gives it, or without an answer only its "prompt" and "tools".

    Raises:
      UserError: with the origin; it is malformed, or is text, which nobody has asked for.
    """
    turns = fields.get("messages")
    asks = isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user"
    if not asks and (format or detect(fields)):
        row = check_row(fields, origin, format)
        if "text" not in row.fields:
            return row
    prompt = prompt_of(fields, origin)
    if "text" in prompt:
        raise UserError(f"{origin}: is text, which asks nothing; leave out the option 'score': its loss is measured")
    if "messages" in prompt:
        prompt = {"prompt": prompt.pop("messages"), **prompt}
    return Row(prompt, origin)


def _of_a_string(fields: dict, origin: str) -> dict:
    check_filled(fields["prompt"], f"{origin}: prompt")
    system, tools = pairs.system_turn(fields, origin), tools_of(fields, origin)
    if not system and not tools:
        return {"prompt": fields["prompt"]}
    return {"messages": [*system, {"role": "user", "content": fields["prompt"]}], **tools}
