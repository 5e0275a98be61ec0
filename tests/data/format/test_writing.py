"""Records written in a format are read back as they were; what a format cannot hold is refused."""

import json

import pytest
from support.format_rows import ANSWER, CALLING, CHAT, OTHER, PAIR, RESULT, SCHEMA, SYSTEM, USER, muted

from ftjax.data.format import formats, writing
from ftjax.errors import UserError

IDLESS = {"messages": [SYSTEM, USER, CALLING, RESULT, ANSWER], "tools": [SCHEMA]}
WRITTEN = [
    (IDLESS, ("messages", "openai", "sharegpt")),
    (CHAT, ("messages", "openai", "sharegpt", "alpaca", "prompt_completion")),
    ({"messages": [SYSTEM, USER, ANSWER, USER, OTHER]}, ("messages", "openai", "sharegpt", "alpaca")),
    ({"messages": [USER, {**ANSWER, "weight": 0}, USER, OTHER]}, ("messages", "sharegpt")),
    ({"messages": [*muted(SYSTEM, USER), ANSWER]}, ("messages", "openai", "sharegpt", "prompt_completion")),
    ({"prompt": "2+2=", "completion": "4"}, ("prompt_completion",)),
    ({**PAIR, "margin": 0.5, "tools": [SCHEMA]}, ("preference", "openai_preference", "sharegpt_preference")),
    ({**PAIR, "probability": 0.75}, ("preference", "openai_preference", "sharegpt_preference")),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER], "label": False}, ("kto",)),
    ({"text": "Once"}, ("text",)),
]


@pytest.mark.parametrize(("record", "names"), WRITTEN)
def test_what_is_written_in_a_format_is_read_back_as_the_same_record(record, names):
    for name in names:
        row = json.loads(json.dumps(writing.write_as(record, name)))
        read = formats.check_row(row, "f:1").fields
        if name == "prompt_completion" and isinstance(row["prompt"], str):
            read = {"messages": [{"role": "user", "content": row["prompt"]}, {**ANSWER, "content": row["completion"]}]}
            record = formats.check_row(writing.write_as(record, "messages"), "f:1").fields
            record = {"messages": [{k: v for k, v in m.items() if k != "weight"} for m in record["messages"]]}
        assert read == record, name


def test_openai_rows_have_arguments_in_json():
    row = writing.write_as(IDLESS, "openai")
    assert row["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome", "days": [1, 2]}'


REFUSED = [
    (CHAT, "preference", "a chosen and a rejected answer"),
    (PAIR, "messages", "a preference pair"),
    ({"text": "a"}, "sharegpt", "plain text"),
    (CHAT, "text", "turns"),
    (IDLESS, "alpaca", "tools"),
    (IDLESS, "prompt_completion", "several trained assistant turns"),
    ({"messages": [USER, {**ANSWER, "weight": 0}, USER, OTHER]}, "alpaca", "weight 0 of a message"),
    ({"messages": [USER, ANSWER, USER]}, "alpaca", "a last one by the user"),
    ({"messages": [USER, {**CALLING, "content": "Let me see"}]}, "sharegpt", "text beside tool calls"),
    ({**PAIR, "chosen": [CALLING, RESULT, ANSWER]}, "sharegpt_preference", "more than one turn in chosen"),
    (CHAT, "kto", "rows without a label"),
]


@pytest.mark.parametrize(("record", "name", "what"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(record, name, what):
    with pytest.raises(UserError, match=f"the format {name} cannot hold .*{what}"):
        writing.write_as(record, name)
    with pytest.raises(UserError, match=r"'alpacca' cannot be written; did you mean 'alpaca'.*known: .*messages"):
        writing.write_as(record, "alpacca")
