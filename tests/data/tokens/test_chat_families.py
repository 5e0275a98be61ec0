"""Masks of the templates of published families: random conversations decode to exactly the assistant turns."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from support.families import FAMILIES, random_conversation
from support.family_templates import DEEPSEEK_R1, QWEN_2_5, QWEN_3_THINKING
from support.format_rows import by_answer
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from ftjax.data.format import formats
from ftjax.data.format.example import Row
from ftjax.data.tokens import chat, masks
from ftjax.data.tokens.rendering import render
from ftjax.errors import UserError

CONVERSATIONS = 150  # of each family


@pytest.fixture(scope="module")
def tokenizers():
    return {name: family.tokenizer() for name, family in FAMILIES.items()}


def row(messages, tools=None, origin="chat.jsonl:7"):
    return Row({"messages": messages, **({"tools": tools} if tools else {})}, origin)


def spans(example):
    edges = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def trained_text(example, tokenizer):
    return [tokenizer.decode(example.tokens[a:b]) for a, b in spans(example)]


def assistants(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def seeded(name):
    return np.random.default_rng(sum(map(ord, name)))


def with_text(messages):
    """The same messages with the arguments of calls as JSON text."""
    messages = copy.deepcopy(messages)
    for function in (call["function"] for m in messages for call in m.get("tool_calls", ())):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return messages


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_decode_to_exactly_the_assistant_turns_with_their_end_tokens(tokenizers, name, record_figure):
    """Turns with weight 0 are left out, at random; arguments come as dicts and as JSON text."""
    family, tokenizer = FAMILIES[name], tokenizers[name]
    rng = seeded(name)
    for _ in range(CONVERSATIONS):
        messages, tools = random_conversation(rng, family)
        turns = assistants(messages)
        if family.once:
            turns = turns[-1:]
        elif rng.random() < 0.3:
            turns = [i for i in turns if i == turns[-1] or rng.random() < 0.5]
        weighted = [m if i in turns else {**m, "weight": 0} for i, m in enumerate(messages)]
        given = with_text(weighted) if rng.random() < 0.5 else weighted
        example = chat.tokenize(row(given, tools), tokenizer)
        expected = [family.says(messages[i], i == len(messages) - 1) for i in turns]
        assert trained_text(example, tokenizer) == expected
        theirs = with_text(messages) if family.text else messages
        assert example.tokens.tolist() == tokenizer.apply_chat_template(theirs, tools=tools or None)["input_ids"]
    record_figure("conversations", CONVERSATIONS)


def by_whole_prefixes(messages, wanted, tokenizer, tools):
    """The spans of turns as `masks` defines them, with every prefix tokenized from its start; None: refused."""

    def encoded(count, prompt=False):
        text = render(messages[:count], tokenizer, "row", tools, generation_prompt=prompt)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ends = chat.masks.traits(tokenizer).ends
    full, found = encoded(len(messages)), []
    for i in wanted:
        before, through = encoded(i, prompt=True), encoded(i + 1)
        stops = []
        for k in range(len(through) - 1, len(before) - 1, -1):
            if through[k] in ends:
                stops.append(k + 1)
            elif tokenizer.decode([through[k]]).strip():
                break
        stops = [stop for stop in stops if full[:stop] == through[:stop]]
        if through[: len(before)] != before or not stops or stops[0] == len(before) + 1:
            return None
        found.append((len(before), stops[0]))
    return full, found


EDGES = [
    " ",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "🙂",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "<think>",
    "▁",
    "\u3000",
    "'s",
]


def greedy(name, **flags):
    """The tokenizer of a family, with special tokens that take white space around them, or match other text."""
    tokenizer = FAMILIES[name].tokenizer()
    tokens = [AddedToken(str(token), special=True, **flags) for token in tokenizer.added_tokens_decoder.values()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    assert all(getattr(tokenizer.added_tokens_decoder[0], flag) == value for flag, value in flags.items())
    return tokenizer


def prepending(name, **steps):
    """The tokenizer of a family with another normalizer or pre-tokenizer."""
    tokenizer = FAMILIES[name].tokenizer()
    for step, value in steps.items():
        setattr(tokenizer.backend_tokenizer, step, value)
    return tokenizer


ODD = {
    "Phi 3, rstrip": lambda: greedy("Phi 3", rstrip=True, normalized=False),
    "Qwen 2.5, lstrip and rstrip": lambda: greedy("Qwen 2.5", lstrip=True, rstrip=True, normalized=False),
    "Qwen 2.5, normalized": lambda: greedy("Qwen 2.5", normalized=True),
    "Gemma 3, single word": lambda: greedy("Gemma 3", single_word=True, normalized=False),
    "Llama 2, first": lambda: prepending(
        "Llama 2", normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "Mistral v3, always": lambda: prepending(
        "Mistral v3", normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    ),
    "Granite 3, stripped and composed": lambda: prepending(
        "Granite 3", normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()])
    ),
    "Phi 4, trimmed offsets": lambda: prepending("Phi 4", post_processor=processors.ByteLevel(trim_offsets=True)),
}


# The reference knows neither markers nor a generation prompt that is always there.
PLAIN = [name for name in FAMILIES if "marked" not in name and "first" not in name]


@pytest.mark.parametrize("name", [*PLAIN, *ODD])
def test_tokenizing_once_gives_what_tokenizing_every_prefix_gives_also_its_refusals(tokenizers, name, record_figure):
    """Contents start and end with what merges with the template's own characters, and hold its special tokens."""
    family = FAMILIES[name if name in FAMILIES else name.split(",")[0]]
    tokenizer = ODD[name]() if name in ODD else tokenizers[name]
    rng = seeded(name)
    refused = left_out = 0
    count = CONVERSATIONS // 3
    for _ in range(count):
        messages, tools = random_conversation(rng, family, exchanges=3)
        for message in messages:
            if rng.random() < 0.5 and "tool_calls" not in message:
                message["content"] = rng.choice(EDGES) + message["content"] + rng.choice(EDGES)
        wanted = assistants(messages)[-1:] if family.once and rng.random() < 0.7 else assistants(messages)
        slow = by_whole_prefixes(messages, wanted, tokenizer, tools or None)
        try:
            fast = masks.turns(messages, wanted, tokenizer, "row", tools or None)
        except UserError as error:
            if "leaves out" in str(error):  # of which the other knows nothing
                left_out += 1
                continue
            fast, refused = None, refused + 1
        assert fast == slow
    assert refused + left_out < count
    record_figure("refused", refused)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_for_inference_is_what_training_has_before_the_last_answer(tokenizers, name):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    rng = seeded(name)
    for _ in range(20):
        messages, tools = random_conversation(rng, family)
        example = chat.tokenize(row(messages, tools), tokenizer, train_on="last")
        prompt = chat.render_prompt(messages[:-1], tokenizer, tools or None)
        start = spans(example)[0][0]
        header = 0
        if name.startswith("SmolLM3"):  # its markers hold the header of the turn
            header = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
        np.testing.assert_array_equal(prompt, example.tokens[: start + header])


ONCE = [name for name, family in FAMILIES.items() if family.once]


@pytest.mark.parametrize("name", ONCE)
def test_templates_that_rewrite_earlier_turns_are_refused_but_for_the_last_turn(tokenizers, name):
    """Qwen 3 and GPT-OSS mark the last answer, Mistral v3 moves tools and system prompt along."""
    system = [{"role": "system", "content": "Be brief."}] if name == "Mistral v3" else []
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    with pytest.raises(UserError, match=r"chat.jsonl:7: .*rewrites .* message \d .*set data.train_on to last"):
        chat.tokenize(row(system + exchange * 2), tokenizers[name])
    for messages, train_on in ((exchange, "assistant"), (system + exchange * 2, "last")):
        assert len(spans(chat.tokenize(row(messages), tokenizers[name], train_on=train_on))) == 1


ASKED = {"role": "user", "content": "Hi"}
EMPTY = "\n</think>\n\nYes."
OPENED = {
    "no thought": ({"content": "Yes."}, EMPTY),
    "an empty thought": ({"content": "<think>\n\n</think>\n\nYes."}, EMPTY),
    "a thought in the text": ({"content": "<think>\nhm\n</think>\n\nYes."}, "hm\n</think>\n\nYes."),
    "a thought without its opening, as the model wrote it": ({"content": "hm</think>\n\nYes."}, "hm</think>\n\nYes."),
    "a thought of its own": ({"content": "Yes.", "reasoning_content": "hm"}, "hm\n</think>\n\nYes."),
}


@pytest.mark.parametrize(("answer", "said"), OPENED.values(), ids=OPENED)
@pytest.mark.parametrize(("name", "template"), [("DeepSeek V3", DEEPSEEK_R1), ("Qwen 3", QWEN_3_THINKING)])
def test_an_answer_stands_behind_a_prompt_that_opens_its_thought(name, template, answer, said):
    """DeepSeek R1's template leaves out every thought, Qwen 3's earlier ones; both prompts end with "<think>\\n"."""
    if name == "Qwen 3" and answer["content"].startswith("hm"):
        said = said.replace("hm<", "hm\n<")  # its template puts a line break there
    tokenizer = dataclasses.replace(FAMILIES[name], template=template).tokenizer()
    end = tokenizer.eos_token
    first, second = [ASKED, {"role": "assistant", **answer}], [{"role": "user", "content": "Sure?"}]
    history = [ASKED, {"role": "assistant", "content": "Yes."}, *second]
    for messages in (first, [*history, first[1]]):
        given = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert tokenizer.decode(given).endswith("<think>\n")
        example = chat.tokenize(row(messages), tokenizer, train_on="last")
        assert example.tokens[: len(given)].tolist() == given
        assert trained_text(example, tokenizer) == [said + end]
        assert np.flatnonzero(example.trained)[0] == len(given)
        np.testing.assert_array_equal(chat.render_prompt(messages[:-1], tokenizer), given)
    both = chat.tokenize_answers(row([*history, first[1]]), tokenizer)
    assert [trained_text(example, tokenizer) for example in both] == [[EMPTY + end], [said + end]]
    np.testing.assert_array_equal(both[1].tokens, example.tokens)


SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]
CALL = {"type": "function", "function": {"name": "send", "arguments": {"to": "Anna"}}, "id": "abcdefghi"}
CALLS = [SAID[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
BESIDE = [SAID[0], {"role": "assistant", "content": "Let me see", "tool_calls": [CALL]}]
APART = [SAID[0], {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
RESULT = {"role": "tool", "content": "sun", "tool_call_id": "abcdefghi"}
LEFT_OUT = {
    "thoughts": ("DeepSeek V3", SAID, None, "some of the content of message 1"),
    "thoughts in a field of their own": ("Llama 3.1", APART, None, "some of the reasoning of message 1"),
    "calls": ("Phi 4", CALLS, None, "rendered empty|some of the tool call of message 1"),
    "text beside calls": ("Llama 3.1", BESIDE, None, "some of the content of message 1"),
    "the list of tools": ("DeepSeek V3", CALLS, TOOLS, "leaves out the tool 'weather'"),
    "a result": (
        "SmolLM3, marked",
        [*CALLS, {**RESULT, "role": "developer"}, {"role": "assistant", "content": "Yes."}],
        None,
        r"leaves out message 2 \(developer\)",
    ),
}


@pytest.mark.parametrize(("name", "messages", "tools", "what"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_template_that_leaves_out_what_the_row_says_is_refused(tokenizers, name, messages, tools, what):
    with pytest.raises(UserError, match=f"chat.jsonl:7: .*({what})"):
        chat.tokenize(row(messages, tools), tokenizers[name])


def test_a_switch_that_the_template_takes_out_of_a_system_prompt_is_not_missed(tokenizers):
    for content in ("/no_think", "Be brief. /no_think"):
        messages = [{"role": "system", "content": content}, *SAID]
        example = chat.tokenize(row(messages), tokenizers["SmolLM3, marked"])
        assert "/no_think" not in tokenizers["SmolLM3, marked"].decode(example.tokens)
    other = FAMILIES["SmolLM3, marked"].tokenizer()
    other.chat_template = other.chat_template.replace("'/no_think'", "'brief'")
    with pytest.raises(UserError, match=r"leaves out message 0 \(system\)"):
        chat.tokenize(row([{"role": "system", "content": "Be brief."}, *SAID]), other)


THOUGHTS = [
    ("Qwen 2.5", SAID, ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]),
    ("Qwen 3", SAID, ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]),
    ("Qwen 3", APART, ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]),
    (
        "GPT-OSS",
        [APART[0], {"role": "assistant", "content": "Yes.", "thinking": "hm"}],
        ["<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"],
    ),
]


@pytest.mark.parametrize(("name", "messages", "expected"), THOUGHTS)
def test_thoughts_are_trained_as_the_template_writes_them(tokenizers, name, messages, expected):
    assert trained_text(chat.tokenize(row(messages), tokenizers[name]), tokenizers[name]) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_all_trains_every_token_but_the_first_and_messages_of_weight_0(tokenizers, name):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    rng = seeded(name)
    for _ in range(10):
        messages, tools = random_conversation(rng, family)
        example = chat.tokenize(row(messages, tools), tokenizer, train_on="all")
        assert example.trained.tolist() == [False] + [True] * (len(example.tokens) - 1)
        last = chat.tokenize(row([*messages[:-1], {**messages[-1], "weight": 0}], tools), tokenizer, train_on="all")
        np.testing.assert_array_equal(last.tokens, example.tokens)
        turn = np.flatnonzero(~last.trained)[1:]
        assert turn.tolist() == list(range(turn[0], len(last.tokens)))
        assert messages[-1]["content"] in tokenizer.decode(last.tokens[turn])
        if messages[-2]["role"] == "user":
            assert messages[-2]["content"] in tokenizer.decode(last.tokens[: turn[0]])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_of_a_pair_share_the_tokens_of_the_prompt_and_differ_after_them(tokenizers, name):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    rng = seeded(name)
    for _ in range(10):
        messages, tools = random_conversation(rng, family)
        prompt, chosen = messages[:-1], messages[-1]
        rejected = {"role": "assistant", "content": "No, " + chosen["content"]}
        extra = {"tools": tools} if tools else {}
        pair = Row({"prompt": prompt, "chosen": [chosen], "rejected": [rejected], **extra}, "f:1")
        examples = chat.tokenize_preference(pair, tokenizer)
        shared = int(np.argmax(examples[0].trained))
        np.testing.assert_array_equal(examples[0].tokens[:shared], examples[1].tokens[:shared])
        for example, answer in zip(examples, (chosen, rejected), strict=True):
            assert example.origin == "f:1"
            assert trained_text(example, tokenizer) == [family.says(answer, True)]
            assert not example.trained[:shared].any()
            assert example.trained[shared]
        one = Row({"prompt": prompt, "completion": [chosen], "label": True, **extra}, "f:1")
        unpaired = chat.tokenize_unpaired(one, tokenizer)
        np.testing.assert_array_equal(unpaired.tokens, examples[0].tokens)
        np.testing.assert_array_equal(unpaired.trained, examples[0].trained)


def test_every_answer_can_be_trained_row_by_row_where_the_template_rewrites_earlier_turns(tokenizers):
    for name in ONCE:
        family, tokenizer, rng = FAMILIES[name], tokenizers[name], seeded(name)
        for _ in range(10):
            messages, tools = random_conversation(rng, family)
            given = formats.check_row(row(messages, tools).fields, "f:1").fields
            records = by_answer(given)
            alone = [chat.tokenize(Row(one, "f:1"), tokenizer) for one in records]
            found = [trained_text(example, tokenizer) for example in alone]
            assert found == [[family.says(messages[i], True)] for i in assistants(messages)]
            split = chat.tokenize_answers(Row(given, "f:1"), tokenizer)
            if len(split) == 1:  # nothing had to be rewritten
                continue
            for example, one in zip(split, alone, strict=True):
                assert example.tokens.tolist() == one.tokens.tolist()
                assert example.trained.tolist() == one.trained.tolist()


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools():
    family = FAMILIES["Qwen 2.5"]
    tokenizer = family.tokenizer()
    with_tools = tokenizer.chat_template
    tokenizer.chat_template = {"default": FAMILIES["Phi 4"].template, "tool_use": with_tools}
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        messages, tools = random_conversation(rng, family)
        example = chat.tokenize(row(messages, tools), tokenizer)
        seen.add(bool(tools))
        says = family.says if tools else FAMILIES["Phi 4"].says
        assert trained_text(example, tokenizer) == [says(messages[i], False) for i in assistants(messages)]
    assert seen == {True, False}


def test_markers_give_what_prefixes_give(tokenizers):
    marked, plain = tokenizers["Qwen 2.5, marked"], tokenizers["Qwen 2.5"]
    assert "generation %}" in QWEN_2_5
    assert "generation %}" not in plain.chat_template
    rng = np.random.default_rng(0)
    for _ in range(50):
        messages, tools = random_conversation(rng, FAMILIES["Qwen 2.5"])
        one, other = (chat.tokenize(row(messages, tools), tokenizer) for tokenizer in (marked, plain))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.trained, other.trained)


def test_a_long_conversation_is_tokenized_about_once(tokenizers, monkeypatch, record_figure):
    """Characters given to the tokenizer, against those of the conversation; 31 where every prefix is tokenized."""
    tokenizer = tokenizers["Llama 3.1"]
    messages = [{"role": role, "content": "The blue lamp. " * 40} for _ in range(30) for role in ("user", "assistant")]
    given = []
    call = type(tokenizer).__call__

    def counted(self, text, *args, **kwargs):
        given.extend(text if isinstance(text, list) else [text])
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    example = chat.tokenize(row(messages), tokenizer)
    times = sum(map(len, given)) / len(render(messages, tokenizer, "row"))
    record_figure("times", times)
    assert len(spans(example)) == 30
    assert times < 1.1


DATES = {
    "a literal": "{{ strftime_now( '%d %b %Y' ) }}",
    "by its name": "{{ strftime_now(format='%d %b %Y') }}",
    "a variable": "{% set f = '%d %b %Y' %}{{ strftime_now(f) }}",
    "in a macro": "{% macro today(f) %}{{ strftime_now(f) }}{% endmacro %}{{ today('%d %b %Y') }}",
    "if it is there": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
}


@pytest.mark.parametrize("way", DATES)
def test_a_template_that_writes_the_date_always_writes_the_same_one(way):
    tokenizer = FAMILIES["Qwen 2.5"].tokenizer()
    tokenizer.chat_template = "Today: " + DATES[way] + "\n" + tokenizer.chat_template
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = render(messages, tokenizer, "chat.jsonl:7")
    assert text.startswith("Today: 01 Jan 2026<|im_start|>")
    assert chat.tokenize(row(messages), tokenizer).tokens.tolist() == tokenizer(text)["input_ids"]


ARGUMENTS = {"city": 'Bad "Ems"\\é\n🙂', "days": [1, 2.5, {"from": None}], "warm": True}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "tool_call" in family.template])
def test_the_arguments_of_a_call_are_in_the_text_or_the_row_is_refused(name):
    tokenizer = FAMILIES[name].tokenizer()
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    chat.tokenize(row(messages), tokenizer)


def test_a_template_that_writes_calls_without_their_arguments_is_refused():
    tokenizer = FAMILIES["Qwen 2.5"].tokenizer()
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name + '(' }}{% endfor %}"
    ours = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        ]},
    ]  # fmt: skip
    turns = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}" + "CALLS"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer.chat_template = turns.replace("CALLS", ours)
    chat.tokenize(row(messages), tokenizer)
    tokenizer.chat_template = turns.replace("CALLS", calls)
    with pytest.raises(UserError, match=r"leaves out some of the arguments of a tool call of message 1"):
        chat.tokenize(row(messages), tokenizer)
