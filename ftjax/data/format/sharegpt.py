"""ShareGPT rows: {"from", "value"} turns -> messages."""

from ftjax.data.format.conversation import check_string, conversation, from_json
from ftjax.data.format.pairs import system_turn
from ftjax.errors import UserError

# speaker -> role, as LLaMA-Factory's and OpenHermes' data sets spell the speakers
ROLE_OF = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}


def messages(fields: dict, origin: str, needs_assistant: bool = True) -> list[dict]:
    """The messages of `conversations`, after that of the field `system` where there is one.

    The turns may also be {role, content} messages, which some data sets have under that name.
    """
    turns = fields["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{origin}: conversations must be a non-empty list of {{from, value}} objects")
    turns = [turn(given, f"{origin}: message {i}") for i, given in enumerate(turns)]
    system = system_turn(fields, origin)
    if system and turns[0].get("role") == "system":
        if turns[0].get("content") != system[0]["content"]:
            raise UserError(f"{origin}: has a `system` field and a system turn; keep one of them")
        system = []
    return conversation(system + turns, origin, needs_assistant)


def answer(given: object, what: str) -> list[dict]:
    """One {from, value} turn, or a list of them, as messages; a string is an assistant turn."""
    if isinstance(given, str):
        return [{"role": "assistant", "content": given}]
    return [turn(item, what) for item in (given if isinstance(given, list) else [given])]


def turn(given: object, where: str) -> dict:
    """A message of a {from, value} turn; a {role, content} message as it is."""
    if not isinstance(given, dict) or ("from" not in given and "role" not in given):
        raise UserError(f"{where} is not a turn; write it as {{from, value}}")
    if given.get("from") is None:
        return given
    speaker, value = given["from"], given.get("value")
    if not isinstance(speaker, str) or speaker.lower() not in ROLE_OF:
        raise UserError(f"{where} is from {speaker!r}; use one of {', '.join(ROLE_OF)}")
    check_string(value, f"{where} ({speaker}): value")
    rest = {key: item for key, item in given.items() if key not in ("from", "value")}
    if speaker.lower() == "function_call":
        calls = from_json(value, f"{where} (function_call): value")  # one, or a list of them
        return {**rest, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**rest, "role": ROLE_OF[speaker.lower()], "content": value}
