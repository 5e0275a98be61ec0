"""Messages and records that the tests of formats share."""

import json

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
CHAT = {"messages": [USER, ANSWER]}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sun": true}'}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}


def openai(call, **more):
    """The call as OpenAI writes it: with an id, and arguments in JSON."""
    function = {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])}
    return {"id": "call_1", "type": "function", "function": function, **more}


def muted(*messages):
    return [{**message, "weight": 0} for message in messages]


def by_answer(fields):
    """A chat record as one for each trained assistant turn, which ends it; the turns before have weight 0."""
    messages = fields["messages"]
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight") != 0]
    return [{**fields, "messages": [*muted(*messages[:i]), messages[i]]} for i in answers]
