"""Records -> rows of a format, the way back of `formats`; what a format cannot hold is refused."""

import json
from collections.abc import Callable

from ftjax.errors import UserError, did_you_mean


def write_as(fields: dict, format: str) -> dict:
    """The row of `format` that says what a record (see `formats`) says: read again, it gives the record.

    ShareGPT has no ids of tool calls: there the results of several calls are told apart by their order. "openai" is
    "messages" with the arguments of tool calls as JSON text, as OpenAI's files have them.

    Raises:
      UserError: an unknown format, or what the format has no place for. It does not name the row.
    """
    if format not in WRITERS:
        raise UserError(f"the format {format!r} cannot be written{did_you_mean(format, WRITERS)}")
    return WRITERS[format](fields)


def _text(fields: dict) -> dict:
    if "text" not in fields:
        raise _no_place("text", "turns; write messages or prompt_completion")
    return {"text": fields["text"]}


def _messages(fields: dict) -> dict:
    return {"messages": _chat(fields, "messages"), **_tools(fields)}


def _openai(fields: dict) -> dict:
    return {"messages": [_with_json(message) for message in _chat(fields, "openai")], **_tools(fields)}


def _prompt_completion(fields: dict) -> dict:
    if isinstance(fields.get("completion"), str):
        return {"prompt": fields["prompt"], "completion": fields["completion"]}
    messages = _chat(fields, "prompt_completion")
    first = next((i for i, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") != 0), None)
    if first is None:
        raise _no_place("prompt_completion", "a conversation without a trained assistant turn")
    before, after = messages[:first], messages[first:]
    if any(message["role"] == "assistant" and message.get("weight") != 0 for message in after[1:]):
        raise _no_place("prompt_completion", "several trained assistant turns; split the row by answer")
    plain = len(after) == 1 and set(after[0]) <= {"role", "content", "weight"} and not fields.get("tools")
    if plain and len(before) == 1 and set(before[0]) <= {"role", "content", "weight"} and before[0]["role"] == "user":
        return {"prompt": before[0]["content"], "completion": after[0]["content"]}
    before = [{key: value for key, value in message.items() if key != "weight"} for message in before]
    return {"prompt": before, "completion": after, **_tools(fields)}


def _alpaca(fields: dict) -> dict:
    messages = _chat(fields, "alpaca")
    if fields.get("tools"):
        raise _no_place("alpaca", "tools")
    row = {"instruction": "", "input": "", "output": ""}
    if messages[0]["role"] == "system":
        row["system"], messages = messages[0]["content"], messages[1:]
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise _no_place("alpaca", "turns that do not alternate between user and assistant, or a last one by the user")
    for message in messages:
        _only_text(message, "alpaca")
    said = [message["content"] for message in messages]
    row["instruction"], row["output"] = said[-2:]
    if len(said) > 2:
        row["history"] = [said[i : i + 2] for i in range(0, len(said) - 2, 2)]
    return row


def _sharegpt(fields: dict) -> dict:
    turns = [_turn(message, "sharegpt") for message in _chat(fields, "sharegpt")]
    tools = {"tools": json.dumps(fields["tools"], ensure_ascii=False)} if fields.get("tools") else {}
    if turns[0]["from"] == "system" and set(turns[0]) == {"from", "value"}:
        return {"conversations": turns[1:], "system": turns[0]["value"], **tools}
    return {"conversations": turns, **tools}


def _preference(fields: dict) -> dict:
    return {**_pair(fields, "preference"), **_tools(fields)}


def _openai_preference(fields: dict) -> dict:
    pair = {side: [_with_json(m) for m in turns] for side, turns in _sides(fields, "openai_preference").items()}
    given = {"messages": pair["prompt"], **_tools(fields)}
    row = {"input": given, "preferred_output": pair["chosen"], "non_preferred_output": pair["rejected"]}
    return row | ({"margin": fields["margin"]} if "margin" in fields else {})


def _sharegpt_preference(fields: dict) -> dict:
    sides = _sides(fields, "sharegpt_preference")
    row = {"conversations": [_turn(message, "sharegpt_preference") for message in sides["prompt"]]}
    for side in ("chosen", "rejected"):
        if len(sides[side]) != 1:
            raise _no_place("sharegpt_preference", f"more than one turn in {side}")
        row[side] = _turn(sides[side][0], "sharegpt_preference")
    if fields.get("tools"):
        row["tools"] = json.dumps(fields["tools"], ensure_ascii=False)
    return row | ({"margin": fields["margin"]} if "margin" in fields else {})


def _kto(fields: dict) -> dict:
    if "label" not in fields:
        raise _no_place("kto", "rows without a label")
    return {key: fields[key] for key in ("prompt", "completion", "label")} | _tools(fields)


def _chat(fields: dict, format: str) -> list[dict]:
    """The messages of a chat or of prompt/completion strings."""
    if "messages" in fields:
        return fields["messages"]
    if isinstance(fields.get("completion"), str):
        prompt = {"role": "user", "content": fields["prompt"]}
        return [prompt, {"role": "assistant", "content": fields["completion"]}]
    what = "plain text" if "text" in fields else "a preference pair" if "chosen" in fields else "an answer's label"
    raise _no_place(format, what)


def _pair(fields: dict, format: str) -> dict:
    return _sides(fields, format) | ({"margin": fields["margin"]} if "margin" in fields else {})


def _sides(fields: dict, format: str) -> dict:
    if "chosen" not in fields:
        raise _no_place(format, "rows without a chosen and a rejected answer")
    return {key: fields[key] for key in ("prompt", "chosen", "rejected")}


def _turn(message: dict, format: str) -> dict:
    calls = message.get("tool_calls")
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
    if calls and message["content"]:
        raise _no_place(format, "text beside tool calls")
    if calls:
        calls = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
        value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return {"from": "function_call", "value": value, **rest}
    rest.pop("tool_call_id", None)  # the format has no ids: a call's results follow it in its order
    if message["role"] not in SHAREGPT:
        raise _no_place(format, f"the role {message['role']}")
    return {"from": SHAREGPT[message["role"]], "value": message["content"], **rest}


def _only_text(message: dict, format: str) -> None:
    extra = sorted(set(message) - {"role", "content", "weight"})
    if message["role"] == "assistant" and message.get("weight") == 0:
        extra = ["weight 0"]
    if extra:
        raise _no_place(format, f"{extra[0]} of a message")


def _with_json(message: dict) -> dict:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _tools(fields: dict) -> dict:
    return {"tools": fields["tools"]} if fields.get("tools") else {}


def _no_place(format: str, what: str) -> UserError:
    return UserError(f"the format {format} has no place for {what}")


SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
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
