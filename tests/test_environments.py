"""What answers a model: tools, how its calls are read, and what the prompts offer."""

import json

import jax
import numpy as np
import pytest
from support.chat_templates import CHATML, HERMES, make_tokenizer
from support.families import FAMILIES
from support.games import Echo, add, fails
from support.rollouts import config_for, source_of
from support.runs import write_model, write_rows

from ftjax import config as configs
from ftjax import environments, episodes, rollouts
from ftjax.data.tokens.kinds import offered
from ftjax.environments import Call, Tools, Turn, bare, factory, schemas, tagged
from ftjax.errors import UserError
from ftjax.sampling.engine import Completion

NAMED = ("support.games:add", "support.games:fails")


def config_with(tools=NAMED, environment="", turns=3):
    changes = {"rollouts.tools": tools, "rollouts.environment": environment, "rollouts.turns": turns}
    return configs.changed(configs.defaults(), {"objective.name": "grpo"} | changes)


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        (
            tagged,
            'So: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": "b"}</tool_call>',
            [Call("add", {"a": 1}), Call("b", {})],
        ),
        (tagged, '<tool_call>{"name": "add", "arguments": {}}', [Call("add", {})]),  # its end was left out
        (tagged, "the answer is 3", []),
        (tagged, "<tool_call>add(1)</tool_call>", ["the call is not JSON: Expecting value: line 1 column 1 (char 0)"]),
        (tagged, '<tool_call>["add"]</tool_call>', ['the call is no object with a "name"']),
        (tagged, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', ["arguments of the call are no object"]),
        (bare, ' {"name": "add", "parameters": {"a": 1}}', [Call("add", {"a": 1})]),
        (bare, '{"name": "Anna"}', []),
        (bare, 'So: {"name": "add", "parameters": {"a": 1}}', []),
    ],
)
def test_calls_are_read(form, text, calls):
    assert form(text) == calls


def test_calls_are_answered_and_errors_too():
    tools = Tools({"add": add, "fails": fails}, tagged)
    call = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
    turn = tools.step(call % ("add", '{"a": 2, "b": 3}') + call % ("fails", '{"text": "lamp"}'))
    assert (turn.done, turn.reward) == (False, 0.0)
    assert [(one["role"], one["name"], one["content"]) for one in turn.messages] == [
        ("tool", "add", "5"),
        ("tool", "fails", '{"error": "no lamp here"}'),
    ]
    assert (tools.calls, tools.failures) == (2, 1)
    for wrong, said in (("add", "missing"), ("sub", "there is no tool 'sub'; there are add, fails")):
        assert said in json.loads(tools.step(call % (wrong, "{}")).messages[0]["content"])["error"]
    assert "not JSON" in tools.step("<tool_call>add</tool_call>").messages[0]["content"]
    assert (tools.calls, tools.failures) == (5, 4)
    assert tools.step("it is 5") == Turn(done=True)
    game = Tools({"add": add}, tagged, Echo())
    assert game.reset({}, 3) == [{"role": "user", "content": "the game is 3"}]
    assert game.step("it is 5").messages == [{"role": "user", "content": "7 letters, again"}]


def leaves():
    raise SystemExit(0)


@pytest.mark.parametrize("name", ["\\ud800", "sub", "", "leaves"])
def test_no_call_of_the_models_ends_a_run(name):
    tools = Tools({"add": add, "leaves": leaves}, tagged)
    turn = tools.step(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>')
    (said,) = environments.checked(turn, "step").messages
    assert said["name"] == ("leaves" if name == "leaves" else "unknown")
    assert "error" in json.loads(said["content"])
    assert tools.failures == 1


def test_schemas_are_made_of_signatures():
    first, _ = json.loads(schemas(config_with()))
    assert first["function"]["name"] == "add"
    assert first["function"]["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first one."}
    assert schemas(config_with(tools=())) == ""
    for name, said in (("untyped", "give every argument a type"), ("sub", "has no function 'sub'"), ("Echo", "is no")):
        with pytest.raises(UserError, match=f"config.rollouts.tools.*{said}"):
            schemas(config_with(tools=(f"support.games:{name}",)))


def test_rows_may_offer_some_of_the_tools():
    own = json.loads(schemas(config_with()))[:1]
    both = schemas(config_with())
    assert offered({"tools": own}, both, "a:1") == own
    assert offered({}, both, "a:1") == json.loads(both)
    assert offered({}, "", "a:1") is None
    with pytest.raises(UserError, match=r"a:1: offers the tool 'add', which is not in config.rollouts.tools"):
        offered({"tools": own}, schemas(config_with(tools=NAMED[1:])), "a:1")


@pytest.mark.parametrize(("name", "form"), [("Qwen 2.5", tagged), ("Qwen 3", tagged), ("Llama 3.1", bare)])
def test_the_form_of_calls_is_seen_from_the_template(monkeypatch, name, form):
    seen = environments.form_of(FAMILIES[name].tokenizer(), json.loads(schemas(config_with())), "tools")
    assert seen is form


@pytest.mark.parametrize("name", ["Mistral v7", "Granite 3", "DeepSeek V3", "Phi 4"])
def test_another_form_is_refused(name):
    with pytest.raises(UserError, match="writes calls in a form that is not read here"):
        factory(config_with(), FAMILIES[name].tokenizer())


def test_text_of_tags_that_are_special_tokens_is_never_seen():
    tokenizer = make_tokenizer(HERMES)
    assert factory(config_with(), tokenizer)().step("done").done
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    with pytest.raises(UserError, match="form that is not read here"):
        factory(config_with(), tokenizer)
    with pytest.raises(UserError, match="form that is not read here"):
        factory(config_with(), make_tokenizer(CHATML))


def test_an_episode_with_tools(tmp_path, monkeypatch):
    """A model that writes what it is told to: what it calls is answered, counted and recorded."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 40)
    (tmp_path / "model/chat_template.jinja").write_text(HERMES)
    said = ['<tool_call>{"name": "add", "arguments": {"a": 20, "b": 22}}</tool_call>', "it is 42"]
    changes = {"rollouts.tools": NAMED, "rollouts.turns": 3, "data.max_length": 1200, "data.row_length": 0}
    changes |= {"rollouts.max_new_tokens": 100}
    source, start, program = source_of(config_for(tmp_path, **changes), tmp_path)
    tokenizer, end = source._base.tokenizer, source._base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = []

    def generate(model, policy, prompts, *given, numbers, **named):
        turn = numbers[0] % 3
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        ids = np.array(tokenizer.encode(said[turn]), np.int32)
        logps = np.full(len(ids) + 1, -1.0, np.float32)
        return [Completion(ids, True, end, logps, logps, logps) for _ in prompts]

    monkeypatch.setattr(episodes, "generate", generate)
    with jax.set_mesh(program.mesh):
        made = source.batch(0, start.state)
    assert '"description": "Adds two numbers."' in asked[0][0]
    after = f"{said[0]}<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    assert asked[1][0] == asked[0][0] + after
    names = ("episodes/turns_mean", "tools/call_frequency", "tools/failure_frequency", "completions/clipped_ratio")
    assert [made.metrics[name] for name in names] == [2.0, 1.0, 0.0, 0.0]
    assert set(made.arrays["sampled_logps"][made.arrays["weights"] > 0].tolist()) == {-1.0}
    (line,) = (tmp_path / rollouts.FILE).read_text().splitlines()
    turns = [{"role": "assistant", "content": text} for text in said]
    turns.insert(1, {"role": "tool", "name": "add", "content": "42"})
    assert json.loads(line)["completions"][0]["turns"] == turns
