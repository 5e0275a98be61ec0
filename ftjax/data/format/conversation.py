"""Conversations as rows hold them -> plain messages that a chat template takes, and the checks of both.

A message has "role" and "content", and may have "tool_calls", "tool_call_id", "name", "weight", "reasoning_content" and
other keys: `content` is always a string ("" beside tool calls that had none), `weight` 0 or 1, `arguments` of a call a
dict, as transformers documents for chat templates. One with images has them in "images", see the module of that name.
Other keys are kept as they are, in case a template reads them; keys without a value are dropped.
"""

import json
import math

from ftjax import strict_json
from ftjax.data.format import images
from ftjax.errors import UserError

_CHECKED = ("role", "content", "tool_calls", "function_call", "weight", "images")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys under which data sets keep thoughts
ROLES = ("system", "developer", "user", "assistant", "tool")


def conversation(messages: object, origin: str, needs_assistant: bool = True) -> list[dict]:
    """The messages of a row, checked, in the form that the module describes.

    Content in parts ([{"type": "text", "text": ...}]) becomes one string, OpenAI's older `function_call` and the role
    `function` become a tool call and a tool message, arguments in JSON become dicts.

    Args:
      needs_assistant: there must be an assistant turn, and it must not be the first. False for a prompt or an answer.

    Raises:
      UserError: with the origin and the number of the message (from 0).
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{origin}: messages must be a non-empty list of {{role, content}} objects")
    plain = [_message(message, f"{origin}: message {i}") for i, message in enumerate(messages)]
    for i, message in enumerate(plain):
        if message["role"] == "tool":
            _check_answers_a_call(plain[:i], message, f"{origin}: message {i}")
    roles = [message["role"] for message in plain]
    if needs_assistant and "assistant" not in roles:
        raise UserError(f"{origin}: no assistant turn, so nothing to train on; add one or remove the row")
    if needs_assistant and roles[0] == "assistant":
        raise UserError(f"{origin}: the conversation starts with an assistant turn; put a user turn before it")
    return plain


def unanswered(fields: dict) -> bool:
    """Whether the turns of a record that has no class end in one that nothing answers, of the user or a tool."""
    if isinstance(fields.get("label"), str):
        return False
    named = (fields.get(name) for name in ("messages", "completion", "chosen", "rejected"))
    return any(turns[-1]["role"] != "assistant" for turns in named if isinstance(turns, list) and turns)


def check_string(value: object, what: str) -> None:
    """`UserError` where a value is not a string that a tokenizer takes."""
    if isinstance(value, bytes):
        raise UserError(f"{what} is bytes that are not UTF-8 text; convert the data set")
    if not isinstance(value, str):
        raise UserError(f"{what} is a {type(value).__name__}, not a string; write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise UserError(f"{what} has a lone surrogate (\\ud8xx) at character {error.start}; remove it") from None


def check_filled(value: object, what: str) -> None:
    """`check_string`, and `UserError` where nothing but white space is in it."""
    check_string(value, what)
    if not value.strip():
        raise UserError(f"{what} is empty; fill it in or remove the row")


def tools_of(fields: dict, origin: str) -> dict:
    """{"tools": [{"type": "function", "function": {"name", ...}}, ...]} of a row, {} where it has none.

    They may also be in `functions`, OpenAI's older name. The list and each tool may be given as JSON text, and a tool
    as a bare {"name", "description", "parameters"}.
    """
    tools = fields.get("tools") or fields.get("functions")
    if not tools:
        return {}
    tools = from_json(tools, f"{origin}: tools")
    if not isinstance(tools, list):
        raise UserError(f"{origin}: tools is a {type(tools).__name__}; write it as a list of JSON schemas")
    schemas = []
    for i, tool in enumerate(tools):
        where = f"{origin}: tools[{i}]"
        tool = from_json(tool, where)
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(f'{where} has no name; write it as {{"type": "function", "function": {{"name": ...}}}}')
        _check_json(tool, where)
        schemas.append(tool)
    return {"tools": schemas} if schemas else {}


def with_json_arguments(message: dict) -> dict:
    """A checked message with the arguments of its tool calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _call(call: object, where: str) -> dict:
    """A tool call as {"type": "function", "function": {"name": str, "arguments": dict}, and "id" if there is one}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(
            f'{where} names no function; write {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}'
        )
    arguments = function.get("arguments")
    arguments = {} if arguments is None or arguments == "" else from_json(arguments, f"{where}: arguments")
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: arguments are a JSON {type(arguments).__name__}; write an object of names and values"
        )
    _check_json(arguments, f"{where}: arguments")
    _check_json(function["name"], f"{where}: name")
    known = ("type", "function", "name", "arguments")
    rest = {key: value for key, value in call.items() if key not in known and value is not None and _is_json(value)}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{where} is a {type(message).__name__}; write it as {{role, content}}")
    # Data sets add notes of their own (times, scores). Those that are not JSON are dropped: no template can read them.
    plain = {key: value for key, value in message.items() if value is not None and (key in _CHECKED or _is_json(value))}
    if plain.get("role") == "function":
        plain["role"] = "tool"
    role = plain.get("role")
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
    call = plain.pop("function_call", None)
    calls = plain.pop("tool_calls", None) or ([call] if call else [])
    if calls and role != "assistant":
        raise UserError(f"{where} has tool_calls, but its role is {role!r}; only an assistant calls tools")
    if calls:
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls is a {type(calls).__name__}; write it as a list")
        plain["tool_calls"] = [_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]
        plain.setdefault("content", "")  # templates add it to strings, so it must not be missing
    _take_content(plain, f"{where} ({role}): content")
    if plain.get("weight") not in (None, 0, 1):
        raise UserError(f"{where} has the weight {plain['weight']!r}; use 0 (no loss) or 1")
    if "weight" in plain:
        plain["weight"] = int(plain["weight"])
    if role == "assistant" and not calls and not plain["content"].strip():
        raise UserError(f"{where} is an empty assistant turn; remove it or write the answer")
    for key in ("name", "reasoning_content", "thinking", "reasoning"):
        if key in plain:
            check_string(plain[key], f"{where} ({role}): {key}")
    return plain


def _take_content(message: dict, what: str) -> None:
    """Makes the content of a message a string, and gives it `images` where it has some."""
    text, found = images.text_and_images(message.get("content"), what)
    check_string(text, what)
    message["content"] = text
    given = found or message.pop("images", None)
    if given:
        message["images"] = images.check(text, given, message["role"], what)


def _check_answers_a_call(before: list[dict], message: dict, where: str) -> None:
    """`UserError` where a tool message does not follow the assistant turn that called it. Other tools' messages may
    stand between the two."""
    turn = next((earlier for earlier in reversed(before) if earlier["role"] != "tool"), None)
    if turn is None or turn["role"] != "assistant":  # a turn without tool_calls may have its call in the content
        after = f"after a {turn['role']} message" if turn else "without a call"
        raise UserError(f"{where} is a tool message {after}; put the assistant turn that calls the tool before it")
    known = [call["id"] for call in turn.get("tool_calls", ()) if "id" in call]
    if known and message.get("tool_call_id") is not None and message["tool_call_id"] not in known:
        raise UserError(
            f"{where} answers the call {message['tool_call_id']!r}, but the assistant turn before it made "
            f"{', '.join(map(repr, known))}; correct tool_call_id"
        )


def from_json(value: object, what: str) -> object:
    """The value itself, or the one that it spells if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is a string that is not JSON ({error}); correct it") from None


def _check_json(value: object, what: str) -> None:
    """`UserError` for anything but nested dicts, lists, strings that can be encoded, finite numbers, booleans, None."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_string(key, f"{what}: the key {key!r}")
            _check_json(item, what)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{what} has the number {value}, which is not JSON; write it as a string")
    elif value is not None and not isinstance(value, bool | int | float):
        check_string(value, what)


def _is_json(value: object) -> bool:
    try:
        _check_json(value, "")
    except UserError:
        return False
    return True
