"""Rows of every format become one of five records; those that say too little, too much or nonsense are refused."""

import contextlib
import json

import numpy as np
import pytest
from support.format_rows import ANSWER, CALL, CALLING, CHAT, OTHER, PAIR, RESULT, SCHEMA, SYSTEM, USER, muted, openai

from ftjax.data.format import formats, writing
from ftjax.errors import UserError

# name -> a row, the record that it becomes, its format.
READ = {
    "text": ({"text": "Once"}, {"text": "Once"}, "text"),
    "notes beside messages, some of them not JSON": (
        {"messages": [{**USER, "time": b"\xff", "score": 1}, ANSWER]},
        {"messages": [{**USER, "score": 1}, ANSWER]},
        "messages",
    ),
    "chat": (CHAT, CHAT, "messages"),
    "empty and missing keys": (
        {"messages": [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": []}], "tools": []},
        CHAT,
        "messages",
    ),
    "weights of 0 and 1, also as floats": (
        {"messages": [{**USER, "weight": 0.0}, {**ANSWER, "weight": 1.0}, USER, {**ANSWER, "weight": 0}]},
        {"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}]},
        "messages",
    ),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                ANSWER,
            ]
        },
        CHAT,
        "messages",
    ),
    "OpenAI fine-tuning": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [openai(CALL)]},
                {**RESULT, "tool_call_id": "call_1"},
                ANSWER,
            ],
            "tools": [SCHEMA],
            "parallel_tool_calls": False,
        },
        {
            "messages": [
                USER,
                {**CALLING, "tool_calls": [{"id": "call_1", **CALL}]},
                {**RESULT, "tool_call_id": "call_1"},
                ANSWER,
            ],
            "tools": [SCHEMA],
        },
        "messages",
    ),
    "OpenAI's older functions": (
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": openai(CALL)["function"]},
                {"role": "function", "name": "weather", "content": "sun"},
                ANSWER,
            ],
            "functions": [SCHEMA["function"]],
        },
        {
            "messages": [USER, CALLING, {"role": "tool", "name": "weather", "content": "sun"}, ANSWER],
            "tools": [SCHEMA],
        },
        "messages",
    ),
    "tools as JSON text": (
        {**CHAT, "tools": json.dumps([SCHEMA])},
        {**CHAT, "tools": [SCHEMA]},
        "messages",
    ),
    "each tool as JSON text, and a bare one": (
        {**CHAT, "tools": [json.dumps(SCHEMA), SCHEMA["function"]]},
        {**CHAT, "tools": [SCHEMA, SCHEMA]},
        "messages",
    ),
    "thoughts in a field of their own": (
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]},
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]},
        "messages",
    ),
    "prompt as a field beside messages (UltraChat)": ({**CHAT, "prompt": "Hi", "prompt_id": "x"}, CHAT, "messages"),
    "prompt and completion": (
        {"prompt": "2+2=", "completion": "4", "id": 7},
        {"prompt": "2+2=", "completion": "4"},
        "prompt_completion",
    ),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"messages": [*muted(SYSTEM, USER), ANSWER]},
        "prompt_completion",
    ),
    "prompt and completion with a system prompt": (
        {"prompt": "Hi", "completion": "Hello", "system": "Be brief."},
        {"messages": [*muted(SYSTEM, USER), ANSWER]},
        "prompt_completion",
    ),
    "preference": ({**PAIR, "margin": 2}, {**PAIR, "margin": 2.0}, "preference"),
    "preference of strings": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, PAIR, "preference"),
    "preference with an implicit prompt": (
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        {**PAIR, "prompt": [SYSTEM, USER]},
        "preference",
    ),
    "preference whose conversations part late": (
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]},
        {**PAIR, "prompt": [USER, ANSWER, USER]},
        "preference",
    ),
    "prompt string beside whole conversations (UltraFeedback)": (
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score_chosen": 8.0},
        PAIR,
        "preference",
    ),
    "both answers the same": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        {**PAIR, "rejected": [ANSWER]},
        "preference",
    ),
    "Alpaca with two answers": (
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"},
        PAIR,
        "preference",
    ),
    "OpenAI preference": (
        {
            "input": {"messages": [USER], "tools": [SCHEMA], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [OTHER],
        },
        {**PAIR, "tools": [SCHEMA]},
        "openai_preference",
    ),
    "ShareGPT preference": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go away"},
        },
        PAIR,
        "sharegpt_preference",
    ),
    "KTO": (
        {"prompt": [USER], "completion": [ANSWER], "label": False},
        {"prompt": [USER], "completion": [ANSWER], "label": False},
        "kto",
    ),
    "KTO of strings": (
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": [USER], "completion": [ANSWER], "label": True},
        "kto",
    ),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, CHAT, "alpaca"),
    "Alpaca with everything": (
        {
            "instruction": "Translate",
            "input": "ciao",
            "output": "hello",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        {
            "messages": [
                SYSTEM,
                USER,
                ANSWER,
                {"role": "user", "content": "Translate\nciao"},
                {"role": "assistant", "content": "hello"},
            ]
        },
        "alpaca",
    ),
    "Alpaca's own data set has its rows as text, too": (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "### Instruction: Hi ### Response: Hello"},
        CHAT,
        "alpaca",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": ""},
        CHAT,
        "sharegpt",
    ),
    "ShareGPT with weights (SlimOrca)": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Hi", "weight": 0.0},
                {"from": "gpt", "value": "Hello", "weight": 1.0},
            ]
        },
        {"messages": [SYSTEM, {**USER, "weight": 0}, {**ANSWER, "weight": 1}]},
        "sharegpt",
    ),
    "ShareGPT with tools": (
        {
            "system": "Be brief.",
            "tools": json.dumps([SCHEMA["function"]]),
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(openai(CALL)["function"])},
                {"from": "observation", "value": '{"sun": true}'},
                {"from": "gpt", "value": "Hello"},
            ],
        },
        {"messages": [SYSTEM, USER, CALLING, RESULT, ANSWER], "tools": [SCHEMA]},
        "sharegpt",
    ),
    "ShareGPT whose turns are messages": ({"conversations": [USER, ANSWER]}, CHAT, "sharegpt"),
    "ShareGPT with the other names": (
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        CHAT,
        "sharegpt",
    ),
}


@pytest.mark.parametrize(("row", "record", "format"), READ.values(), ids=READ)
def test_a_row_becomes_its_record_detected_or_named_and_a_record_stays_as_it_is(row, record, format):
    given = repr(row)
    for name in (None, format):
        assert formats.check_row(row, "f:1", name).fields == record
    assert formats.check_row(record, "f:1").fields == record
    assert repr(row) == given, "the row was changed"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "a"}, "text"),
        (CHAT, "chat"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        (PAIR, "preference"),
        ({"prompt": [USER], "completion": [ANSWER], "label": True}, "unpaired"),
    ],
)
def test_kinds_of_records(record, kind):
    assert formats.kind_of(formats.check_row(record, "f:1").fields) == kind


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


REFUSED = {
    "unknown fields": ({"question": "a", "answer": "b"}, r"\['answer', 'question'\].*messages.*alpaca.*rename"),
    "messages and text": ({**CHAT, "text": "a"}, "fits the formats messages and text; set `format`"),
    "messages and a pair (UltraFeedback)": ({**PAIR, **CHAT}, "fits the formats messages and preference; set `format`"),
    "empty text": ({"text": " "}, "text is empty; fill"),
    "bytes": ({"text": b"\xff"}, "text is bytes .*convert"),
    "half a surrogate pair": ({"text": "a\ud800"}, "lone surrogate .*character 1; remove"),
    "unknown role": (chat({"role": "human", "content": "Hi"}, ANSWER), "message 0 has the role 'human'; use one of"),
    "image": (
        chat({"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, ANSWER),
        "message 0 .*part of type 'video'; only",
    ),
    "empty answer": (chat(USER, {**ANSWER, "content": "\n"}), "message 1 is an empty assistant turn; remove"),
    "null answer": (chat(USER, {**ANSWER, "content": None}), r"message 1 \(assistant\): content is a NoneType"),
    "no answer": (chat(USER), "no assistant turn"),
    "answer first": (chat(ANSWER), "starts with an assistant turn; put"),
    "weight": (chat(USER, {**ANSWER, "weight": 0.5}), "message 1 has the weight 0.5; use 0"),
    "weight is a list": (chat(USER, {**ANSWER, "weight": [1]}), r"has the weight \[1\]; use 0"),
    "tool result without a call": (chat(USER, RESULT, ANSWER), "message 1 is a tool message after a user message; put"),
    "tool result first": (chat(RESULT, ANSWER), "message 0 is a tool message without a call; put"),
    "tool result of another call": (
        chat(USER, {**CALLING, "tool_calls": [openai(CALL)]}, {**RESULT, "tool_call_id": "call_2"}, ANSWER),
        "message 2 answers the call 'call_2', but .* made 'call_1'; correct",
    ),
    "call by the user": (chat({**USER, "tool_calls": [CALL]}, ANSWER), "role is 'user'; only an assistant"),
    "call without a name": (
        chat(USER, {**CALLING, "tool_calls": [{"type": "function"}]}),
        r"tool_calls\[0\] names no function; write",
    ),
    "arguments that are no JSON": (
        chat(USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}),
        r"message 1: tool_calls\[0\]: arguments is a string that is not JSON",
    ),
    "arguments that are a list": (
        chat(USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
        "arguments are a JSON list; write an object",
    ),
    "tools with a key twice": (
        {**CHAT, "tools": '[{"name": "a", "name": "b"}]'},
        "tools is a string that is not JSON \\(two members are called 'name'\\)",
    ),
    "tools that are no JSON": ({**CHAT, "tools": "weather"}, "tools is a string that is not JSON"),
    "tool without a name": ({**CHAT, "tools": [{"type": "function"}]}, r"tools\[0\] has no name; write"),
    "empty prompt": ({"prompt": "", "completion": "a"}, "prompt is empty"),
    "string and list": ({"prompt": "a", "completion": [ANSWER]}, "completion is a list, not a string"),
    "completion by the user": ({"prompt": [USER], "completion": [USER]}, "completion starts with a user turn"),
    "label that is no bool": (
        {"prompt": "a", "completion": "b", "label": 1},
        "label is 1; write true .*set `format` to prompt_completion",
    ),
    "pair without a prompt": ({"chosen": "a", "rejected": "b"}, "no prompt; add"),
    "one whole conversation": ({"chosen": [USER, ANSWER], "rejected": [OTHER]}, "only one of chosen and rejected"),
    "two questions": (
        {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Hey"}, ANSWER]},
        "no first turn in common",
    ),
    "another prompt": ({**PAIR, "prompt": "Hey", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "remove it"),
    "prompt twice": ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "repeat the prompt"),
    "endless margin": ({**PAIR, "margin": float("inf")}, "margin is inf; write a finite number"),
    "a margin beyond float32": ({**PAIR, "margin": 1e39}, "margin is 1e[+]39; write a finite number"),
    "a margin beyond float64": ({**PAIR, "margin": 10**400}, "margin is 10"),
    "no probability": ({**PAIR, "probability": 1.2}, "probability is 1.2; write a number from 0 to 1"),
    "margin and probability": ({**PAIR, "margin": 1, "probability": 0.7}, "a margin and a probability, of which"),
    "margin in words": ({**PAIR, "margin": "big"}, "margin is 'big'"),
    "empty rejected": ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    "history in one list": (
        {"instruction": "a", "output": "b", "history": ["q", "a"]},
        r"history must be a list of \[question, answer\]",
    ),
    "empty output": ({"instruction": "a", "output": ""}, "output is empty"),
    "empty instruction": ({"instruction": "", "input": " ", "output": "b"}, "instruction is empty"),
    "unknown speaker": (sharegpt(("bot", "Hi")), "message 0 is from 'bot'; use one of"),
    "two system prompts": (
        sharegpt(("system", "a"), ("human", "b"), ("gpt", "c"), system="d"),
        "a `system` field and a system turn; keep one",
    ),
    "call that is no JSON": (
        sharegpt(("human", "a"), ("function_call", "f()")),
        r"\(function_call\): value is a string",
    ),
    "no turns": ({"conversations": []}, "conversations must be a non-empty list"),
    "OpenAI preference without messages": (
        {"input": "Hi", "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
        "input must be an object with `messages`",
    ),
}


KINDS = {"text", "chat", "prompt_completion", "preference", "unpaired", "stepwise", "classified"}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_rows_are_refused_by_name_with_the_fix(row, message):
    with pytest.raises(UserError, match=f"(?s)^f:1: .*{message}"):
        formats.check_row(row, "f:1")


def test_format_decides_where_a_row_fits_several():
    both = {**PAIR, **CHAT, "label": 3, "completion": [ANSWER]}
    assert formats.check_row(both, "f:1", "messages").fields == CHAT
    assert formats.check_row(both, "f:1", "preference").fields == PAIR
    assert formats.check_row(both, "f:1", "prompt_completion").fields == {"messages": [*muted(USER), ANSWER]}
    with pytest.raises(UserError, match="f:1: does not fit the format 'alpaca'"):
        formats.check_row(both, "f:1", "alpaca")
    with pytest.raises(UserError, match=r"'share_gpt' is unknown; .*did you mean 'sharegpt'"):
        formats.check_row(both, "f:1", "share_gpt")


JUNK = [
    None,
    True,
    0,
    -1.5,
    float("nan"),
    "",
    " ",
    "x",
    "{}",
    '["a"]',
    "\ud800",
    b"\xff",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
]


def mutated(value, rng):
    """The value with one of its parts replaced by something else, removed or doubled."""
    if rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return JUNK[rng.integers(len(JUNK))]
    if isinstance(value, list):
        i = rng.integers(len(value))
        choices = [
            value[:i] + value[i + 1 :],
            [*value, value[i]],
            [*value[:i], mutated(value[i], rng), *value[i + 1 :]],
        ]
        return choices[rng.choice(3, p=[0.1, 0.1, 0.8])]
    key = list(value)[rng.integers(len(value))]
    if rng.random() < 0.1:
        return {k: v for k, v in value.items() if k != key}
    return {**value, key: mutated(value[key], rng)}


def test_damaged_rows_are_refused_or_give_a_record_that_stays_as_it_is(record_figure):
    rng = np.random.default_rng(0)
    rows = [(row, format) for row, _, format in READ.values()]
    refused = 0
    for n in range(20_000):
        row, format = rows[n % len(rows)]
        for _ in range(rng.integers(1, 4)):
            row = mutated(row, rng)
        if not isinstance(row, dict):
            continue
        name = format if rng.random() < 0.5 else None
        record = None
        with contextlib.suppress(UserError):
            record = formats.check_row(row, "f:1", name).fields
        if record is None:
            refused += 1
            continue
        assert formats.kind_of(record) in KINDS
        assert formats.check_row(record, "f:1").fields == record
        for name in writing.WRITERS:
            with contextlib.suppress(UserError):
                json.dumps(writing.write_as(record, name), allow_nan=False)
    record_figure("refused", refused)
    assert 5_000 < refused < 19_000


CLASSIFIED = [
    ({"text": "a", "label": "spam"}, {"text": "a", "label": "spam"}),
    ({"text": "a", "label": 2}, {"text": "a", "label": "2"}),
    ({"messages": [USER], "label": "spam"}, {"messages": [USER], "label": "spam"}),
    ({"prompt": "a", "completion": "b", "label": "spam"}, {"prompt": "a", "completion": "b", "label": "spam"}),
    (
        {"prompt": [USER], "completion": [ANSWER], "label": "spam"},
        {"prompt": [USER], "completion": [ANSWER], "label": "spam"},
    ),
]


@pytest.mark.parametrize(("row", "record"), CLASSIFIED)
def test_a_label_that_is_no_verdict_is_a_class(row, record):
    found = formats.check_row(row, "f:1").fields
    assert found == record
    assert formats.kind_of(found) == "classified"
    assert formats.check_row(found, "f:1").fields == record


def test_beside_a_prompt_and_a_completion_true_is_a_verdict_and_a_number_needs_its_format():
    row = {"prompt": "a", "completion": "b"}
    assert formats.kind_of(formats.check_row(row | {"label": True}, "f:1").fields) == "unpaired"
    with pytest.raises(UserError, match="label is 3; write true"):
        formats.check_row(row | {"label": 3}, "f:1")
    assert formats.check_row(row | {"label": 3}, "f:1", "classified").fields == row | {"label": "3"}
    # Whatever else a row is, a label beside it changes nothing.
    assert formats.check_row({**PAIR, "label": "spam"}, "f:1").fields == PAIR


STEPWISE = {"prompt": "Hi", "completions": ["a", "b"], "labels": [True, False]}
BAD_STEPS = {
    "no steps": ({"completions": [], "labels": []}, "completions must be a list"),
    "one label": ({"labels": [True]}, "there are 2 completions and 1 labels; write a label for each step"),
    "a number": ({"labels": [True, 1]}, r"labels\[1\] is 1; write true"),
    "an empty step": ({"completions": ["a", " "]}, r"completions\[1\]"),
}


def test_steps_have_a_label_each():
    record = formats.check_row(STEPWISE, "f:1").fields
    assert record == STEPWISE | {"prompt": [{"role": "user", "content": "Hi"}]}
    assert formats.kind_of(record) == "stepwise"
    for changes, message in BAD_STEPS.values():
        with pytest.raises(UserError, match=f"^f:1: {message}"):
            formats.check_row(STEPWISE | changes, "f:1")


def test_a_label_without_a_value_is_refused_unless_the_format_is_named():
    row = {"prompt": "q", "completion": "a", "label": None}
    with pytest.raises(UserError, match=r"^r: label is empty; write true or false, or set `format`"):
        formats.check_row(row, "r")
    assert formats.check_row(row, "r", "prompt_completion").fields == {"prompt": "q", "completion": "a"}
