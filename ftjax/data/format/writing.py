"""Records -> rows of a format, the inverse of `formats`; a record that the format cannot hold is refused."""

import json
import os
from collections.abc import Callable

from ftjax.data.format import images
from ftjax.data.format.conversation import with_json_arguments
from ftjax.data.images.load import DATA
from ftjax.errors import UserError, did_you_mean


def write_as(fields: dict, format: str) -> dict:
    """The row of `format` that gives the record (see `formats`) when it is read again.

    ShareGPT has no ids of tool calls: only the order of the results of several calls says which is whose. "openai" is
    "messages" with the arguments of tool calls as JSON text, as in OpenAI's files. Images are parts of a message's
    content, in ShareGPT's formats tags in the text; their paths are whole.

    Raises:
      UserError: an unknown format, or one that cannot hold the record. The message does not name the row.
    """
    if format not in WRITERS:
        raise UserError(f"the format {format!r} cannot be written{did_you_mean(format, WRITERS)}")
    if its := images.images_of(fields):
        paths = [image if image.startswith(DATA) else os.path.normpath(image) for image in its]
        fields = images.with_images(fields, paths)
        fields = _with_tags(fields, format) if format in _TAGGED else _with_parts(fields)
    return WRITERS[format](fields)


def _with_parts(fields: dict) -> dict:
    out = dict(fields)
    for name, i, message in images.of_record(fields):
        parts = images.as_parts(message["content"], message["images"])
        out[name] = [*out[name][:i], {**message, "content": parts}, *out[name][i + 1 :]]
        del out[name][i]["images"]
    return out


def _with_tags(fields: dict, format: str) -> dict:
    """The record with TAG for each image, and a column of them."""
    out = dict(fields)
    for name in ("messages", "prompt"):
        turns = fields.get(name, ())
        if any(turn["role"] != "assistant" and images.TAG in turn["content"] for turn in turns):
            raise _cannot_hold(format, f"images beside the text {images.TAG}")
        turns = [dict(turn) for turn in turns]
        for turn in turns:
            if turn.pop("images", ()):
                turn["content"] = turn["content"].replace(images.MARK, images.TAG)
        out |= {name: turns} if turns else {}
    return out | {"images": images.images_of(fields)}


def _text(fields: dict) -> dict:
    if "text" not in fields:
        raise _cannot_hold("text", "turns; write messages or prompt_completion")
    return {"text": fields["text"]}


def _messages(fields: dict) -> dict:
    return {"messages": _chat(fields, "messages"), **_tools(fields)}


def _openai(fields: dict) -> dict:
    return {"messages": [_of_openai(message) for message in _chat(fields, "openai")], **_tools(fields)}


def _prompt_completion(fields: dict) -> dict:
    if isinstance(fields.get("completion"), str):
        return {"prompt": fields["prompt"], "completion": fields["completion"]}
    messages = _chat(fields, "prompt_completion")
    first = next((i for i, message in enumerate(messages) if _is_trained(message)), None)
    if first is None:
        raise _cannot_hold("prompt_completion", "a conversation without a trained assistant turn")
    before, after = messages[:first], messages[first:]
    if any(map(_is_trained, after[1:])):
        raise _cannot_hold("prompt_completion", "several trained assistant turns; split the row by answer")
    plain = not fields.get("tools") and all(set(message) <= {"role", "content", "weight"} for message in messages)
    plain = plain and isinstance(messages[0]["content"], str)  # and not parts
    if plain and [message["role"] for message in messages] == ["user", "assistant"]:
        return {"prompt": before[0]["content"], "completion": after[0]["content"]}
    before = [{key: value for key, value in message.items() if key != "weight"} for message in before]
    return {"prompt": before, "completion": after, **_tools(fields)}


def _alpaca(fields: dict) -> dict:
    messages = _chat(fields, "alpaca")
    if fields.get("tools"):
        raise _cannot_hold("alpaca", "tools")
    row = {"instruction": "", "input": "", "output": ""}
    if messages[0]["role"] == "system":
        row["system"], messages = messages[0]["content"], messages[1:]
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise _cannot_hold(
            "alpaca", "turns that do not alternate between user and assistant, or a last one by the user"
        )
    for message in messages:
        if isinstance(message["content"], list):
            raise _cannot_hold("alpaca", "images")
        extra = sorted(set(message) - {"role", "content", "weight"})
        if message["role"] == "assistant" and message.get("weight") == 0:
            extra = ["weight 0"]
        if extra:
            raise _cannot_hold("alpaca", f"{extra[0]} of a message")
    contents = [message["content"] for message in messages]
    row["instruction"], row["output"] = contents[-2:]
    if len(contents) > 2:
        row["history"] = [contents[i : i + 2] for i in range(0, len(contents) - 2, 2)]
    return row


def _sharegpt(fields: dict) -> dict:
    turns = [_turn(message, "sharegpt") for message in _chat(fields, "sharegpt")]
    rest = _json_tools(fields) | _images(fields)
    if turns[0]["from"] == "system" and set(turns[0]) == {"from", "value"} and images.TAG not in turns[0]["value"]:
        return {"conversations": turns[1:], "system": turns[0]["value"], **rest}
    return {"conversations": turns, **rest}


def _preference(fields: dict) -> dict:
    return _sides(fields, "preference") | _label(fields) | _tools(fields)


def _openai_preference(fields: dict) -> dict:
    sides = _sides(fields, "openai_preference")
    pair = {side: [_of_openai(turn) for turn in turns] for side, turns in sides.items()}
    given = {"messages": pair["prompt"], **_tools(fields)}
    row = {"input": given, "preferred_output": pair["chosen"], "non_preferred_output": pair["rejected"]}
    return row | _label(fields)


def _sharegpt_preference(fields: dict) -> dict:
    sides = _sides(fields, "sharegpt_preference")
    row = {"conversations": [_turn(message, "sharegpt_preference") for message in sides["prompt"]]}
    for side in ("chosen", "rejected"):
        if len(sides[side]) != 1:
            raise _cannot_hold("sharegpt_preference", f"more than one turn in {side}")
        row[side] = _turn(sides[side][0], "sharegpt_preference")
    return row | _json_tools(fields) | _label(fields) | _images(fields)


def _kto(fields: dict) -> dict:
    if not isinstance(fields.get("label"), bool):
        raise _cannot_hold("kto", "rows without a label")
    return {key: fields[key] for key in ("prompt", "completion", "label")} | _tools(fields)


def _chat(fields: dict, format: str) -> list[dict]:
    """The messages of a chat or of prompt/completion strings."""
    if "messages" in fields:
        return fields["messages"]
    if isinstance(fields.get("completion"), str):
        prompt = {"role": "user", "content": fields["prompt"]}
        return [prompt, {"role": "assistant", "content": fields["completion"]}]
    what = "plain text" if "text" in fields else "a preference pair" if "chosen" in fields else "the label of an answer"
    raise _cannot_hold(format, what)


def _sides(fields: dict, format: str) -> dict:
    if "chosen" not in fields:
        raise _cannot_hold(format, "rows without a chosen and a rejected answer")
    return {key: fields[key] for key in ("prompt", "chosen", "rejected")}


def _turn(message: dict, format: str) -> dict:
    calls = message.get("tool_calls")
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
    if calls and message["content"]:
        raise _cannot_hold(format, "text beside tool calls")
    if calls:
        calls = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
        value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return {"from": "function_call", "value": value, **rest}
    rest.pop("tool_call_id", None)  # the format has no ids: results follow their calls in the same order
    if message["role"] not in _SPEAKERS:
        raise _cannot_hold(format, f"the role {message['role']}")
    return {"from": _SPEAKERS[message["role"]], "value": message["content"], **rest}


def _of_openai(message: dict) -> dict:
    """A message with the arguments of tool calls as JSON text, and its images as OpenAI has them."""
    message = with_json_arguments(message)
    if not isinstance(message["content"], list):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": part["image"]}} if "image" in part else part
        for part in message["content"]
    ]
    return message | {"content": parts}


def _is_trained(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _label(fields: dict) -> dict:
    return {name: fields[name] for name in ("margin", "probability") if name in fields}


def _tools(fields: dict) -> dict:
    return {"tools": fields["tools"]} if fields.get("tools") else {}


def _json_tools(fields: dict) -> dict:
    return {"tools": json.dumps(fields["tools"], ensure_ascii=False)} if fields.get("tools") else {}


def _images(fields: dict) -> dict:
    return {"images": fields["images"]} if fields.get("images") else {}


def _cannot_hold(format: str, what: str) -> UserError:
    return UserError(f"the format {format} cannot hold {what}")


_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_TAGGED = ("sharegpt", "sharegpt_preference")
# name -> record -> row
WRITERS: dict[str, Callable[[dict], dict]] = {
    "messages": _messages,
    "openai": _openai,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "openai_preference": _openai_preference,
    "sharegpt_preference": _sharegpt_preference,
    "kto": _kto,
    "text": _text,
}
