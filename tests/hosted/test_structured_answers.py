"""Calls of tools, and answers of a JSON schema, through OpenAI's client."""

import json

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
from support.chat_templates import HERMES, make_tokenizer
from support.chatting import Names, application, client, serving, tiny

from ftjax import environments
from ftjax.hosted import chat
from ftjax.hosted.generation import Generation, Limits, Part
from ftjax.sampling.request import Completion

ASKED = [{"role": "user", "content": "Where is my order?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "order": {"type": "integer", "minimum": 0, "maximum": 99},
        "state": {"enum": ["sent", "lost"]},
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["order", "state", "items"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    base, variables = tiny(tmp_path_factory.mktemp("structured"))
    base.tokenizer.chat_template = HERMES
    made = Generation(base, variables, Limits(slots=4, places=1, rank=1))
    with serving(application(chat.routes(made, Names("tiny", {})))) as url, client(url) as asks:
        yield made, asks
    made.close()


def schema_of(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema(served, temperature):
    _, asks = served
    how = {"model": "tiny", "messages": ASKED, "temperature": temperature, "seed": 1, "max_tokens": 300}
    said = asks.chat.completions.create(**how, response_format=schema_of(SCHEMA, strict=True), n=3)
    for choice in said.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    chunks = asks.chat.completions.create(**how, response_format=schema_of(SCHEMA), stream=True)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == said.choices[0].message.content


def test_rows_beside_it_write_as_they_do_alone(served):
    _, asks = served
    how = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 40}
    alone = asks.chat.completions.create(**how)
    stream = asks.chat.completions.create(**(how | {"temperature": 1}), response_format=schema_of(SCHEMA), stream=True)
    next(iter(stream))
    assert asks.chat.completions.create(**how).choices == alone.choices
    stream.close()


def test_json_of_any_kind_and_a_pydantic_model(served):
    _, asks = served
    how = {"model": "tiny", "messages": ASKED, "seed": 2, "max_tokens": 100}
    said = asks.chat.completions.create(**how, response_format={"type": "json_object"})
    assert said.choices[0].message.content.lstrip().startswith("{")
    if said.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(said.choices[0].message.content), dict)

    class Order(pydantic.BaseModel):
        number: bool
        state: bool

    parsed = asks.chat.completions.parse(**how, response_format=Order).choices[0].message.parsed
    assert isinstance(parsed, Order)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"type": "json_schema"}, "has no schema"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}, "cannot be followed"),
        (schema_of({"$ref": "#/$defs/there_is_none"}), "cannot be followed"),
        (schema_of({"type": "string", "pattern": "(("}), "cannot be followed"),
        ({"type": "grammar"}, "use 'text', 'json_object' or 'json_schema'"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(served, form, said):
    _, asks = served
    with pytest.raises(openai.BadRequestError, match=said) as error:
        asks.chat.completions.create(model="tiny", messages=ASKED, response_format=form)
    assert error.value.param == "response_format"


def test_tools_are_rendered_and_what_the_model_writes_to_them_is_given_back(served):
    _, asks = served
    how = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 8}
    plain = asks.chat.completions.create(**how)
    offered = asks.chat.completions.create(**how, tools=[WEATHER], tool_choice="auto")
    assert offered.usage.prompt_tokens > plain.usage.prompt_tokens
    assert asks.chat.completions.create(**how, tools=[WEATHER], tool_choice="none").usage == plain.usage
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    more = asks.chat.completions.create(**(how | {"messages": turns}), tools=[WEATHER])
    assert more.usage.prompt_tokens > offered.usage.prompt_tokens


CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ünna"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("written", "content", "calls"),
    [
        (CALL, None, 1),
        (f"I look.\n{CALL}\n{CALL}", "I look.", 2),
        ("no call at all ", "no call at all ", 0),
        ("<tool_call>\nnonsense", "<tool_call>\nnonsense", 0),
        ("a <tool", "a <tool", 0),
    ],
)
def test_calls_are_read_from_what_is_written(served, written, content, calls):
    made, _ = served
    body = chat.Chat(model="tiny", messages=ASKED, tools=[WEATHER], logprobs=True)
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode(written, add_special_tokens=False)
    for size in (1, 5, 100):
        answer, said = chat.Answer(made, body, environments.tagged), ""
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            said += answer.add(Part(0, part, [-1.0] * len(part), None))
        numbers = np.zeros(len(tokens) + 1, np.float32)
        said += answer.finish(Completion(np.array(tokens), True, 4, numbers, numbers, numbers))
        assert answer.content == content
        assert said == (content or "")
        assert len(answer.calls) == calls
        assert answer.reason == ("tool_calls" if calls else "stop")
        assert len(answer.logprobs()["content"]) == len(tokens)
        for call in answer.calls:
            assert call["function"] == {"name": "weather", "arguments": '{"place": "Ünna"}'}
            assert call["id"].startswith("call_")


def test_tools_without_a_known_form_are_refused(served):
    made, asks = served
    tokenizer, before = made.base.tokenizer, made.base.tokenizer.chat_template
    try:
        tokenizer.chat_template = before.replace("<tool_call>", "<call>")
        with pytest.raises(openai.BadRequestError, match="in a form that is not read here") as error:
            asks.chat.completions.create(model="tiny", messages=ASKED, tools=[WEATHER])
        assert error.value.param == "tools"
    finally:
        tokenizer.chat_template = before
