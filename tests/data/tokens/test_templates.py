"""Chat templates that a run chooses, and the system prompt that it injects."""

import numpy as np
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.families import FAMILIES, random_conversation

from ftjax.data.format.example import Row
from ftjax.data.tokens import chat, templates
from ftjax.data.tokens import tokenizer as tokenizers
from ftjax.errors import UserError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is my order?"},
    {"role": "assistant", "content": "It comes tomorrow."},
    {"role": "user", "content": "And the lamp?"},
    {"role": "assistant", "content": "It was sent."},
]
# As the papers and the models' own pages write them.
RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\nWhere is my order?\n\n### Response:\nIt comes tomorrow.</s>\n\n"
    "### Instruction:\nAnd the lamp?\n\n### Response:\nIt was sent.</s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is my order?<|im_end|>\n"
    "<|im_start|>assistant\nIt comes tomorrow.<|im_end|>\n<|im_start|>user\nAnd the lamp?<|im_end|>\n"
    "<|im_start|>assistant\nIt was sent.<|im_end|>\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nWhere is my order?<end_of_turn>\n<start_of_turn>model\n"
    "It comes tomorrow.<end_of_turn>\n<start_of_turn>user\nAnd the lamp?<end_of_turn>\n<start_of_turn>model\n"
    "It was sent.<end_of_turn>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhere is my order?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIt comes tomorrow.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd the lamp?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIt was sent.<|eot_id|>",
    "mistral": "[INST] Be brief.\n\nWhere is my order? [/INST] It comes tomorrow.</s>[INST] And the lamp? [/INST]"
    " It was sent.</s>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nWhere is my order?</s>\n<|assistant|>\nIt comes tomorrow.</s>\n"
    "<|user|>\nAnd the lamp?</s>\n<|assistant|>\nIt was sent.</s>\n",
}


def prepared(name, bos=None, **more):
    """A base model's tokenizer, with the tokens of the template added."""
    tokenizer = make_tokenizer(None, "</s>", bos, add_bos=bos is not None, specials=["<unk>", "<s>", "</s>"])
    tokenizers.prepare(tokenizer, name, tokens=templates.KNOWN.get(name, ()), **more)
    return tokenizer


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("name", templates.KNOWN)
def test_known_templates_are_written_as_published_and_train_the_answers(name, bos):
    tokenizer = prepared(name, bos)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == (bos or "") + RENDERED[name]
    end = (templates.KNOWN[name] or ("</s>",))[-1]
    assert tokenizers.end_tokens(tokenizer, {})[-1] == tokenizer.convert_tokens_to_ids(end)
    example = chat.tokenize(Row({"messages": TURNS}, "f:1"), tokenizer)
    edges = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0, append=0))
    said = [tokenizer.decode(example.tokens[a:b]).strip() for a, b in zip(edges[::2], edges[1::2])]
    assert said == [f"It comes tomorrow.{end}", f"It was sent.{end}"]
    prompt = chat.render_prompt(TURNS[:-1], tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert edges[-2] == len(prompt)


def test_a_template_from_a_file_and_one_without_an_end(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}")
    assert prepared(str(file)).apply_chat_template(TURNS[1:2], tokenize=False) == "user: Where is my order?</s>"
    ends = {
        "'<|end|>'": r"ends an answer with <\|end\|>.*add_tokens=\('<\|end\|>',\)",
        "''": "ends an answer with no token",
    }
    for end, message in ends.items():
        file.write_text("{% for m in messages %}{{ m['content'] + END }}{% endfor %}".replace("END", end))
        with pytest.raises(UserError, match=message):
            prepared(str(file))
    file.write_text("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}")
    tokenizer = make_tokenizer(None, "</s>", specials=["<unk>", "<s>", "</s>"])
    tokenizers.prepare(tokenizer, str(file), tokens=("<|end|>", "<other>"))
    special = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert special["<|end|>"]
    assert not special["<other>"]
    assert len(tokenizer("a<other>b<|end|>")["input_ids"]) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt_is_put_before_conversations_without_one(name):
    family, rng = FAMILIES[name], np.random.default_rng(0)
    text = 'Answer "briefly",\nÄ 日本 🙂 \\ {% x %}.'
    own, injected = family.tokenizer(), family.tokenizer()
    if not family.system:
        with pytest.raises(UserError, match=r"data.system: the chat template takes no system turn \(System role not"):
            tokenizers.prepare(injected, system=text)
        return
    tokenizers.prepare(injected, system=text)
    assert tokenizers.end_tokens(injected, {}) == tokenizers.end_tokens(own, {})
    for _ in range(10):
        messages, tools = random_conversation(rng, family)
        given = messages if messages[0]["role"] == "system" else [{"role": "system", "content": text}, *messages]
        more = {"tools": tools} if tools else {}
        expected = chat.tokenize_answers(Row({"messages": given, **more}, "f:1"), own)
        found = chat.tokenize_answers(Row({"messages": messages, **more}, "f:1"), injected)
        assert [e.tokens.tolist() for e in found] == [e.tokens.tolist() for e in expected]
        assert [e.trained.tolist() for e in found] == [e.trained.tolist() for e in expected]
        np.testing.assert_array_equal(
            chat.render_prompt(messages[:-1], injected, tools or None),
            chat.render_prompt(given[:-1], own, tools or None),
        )


def test_a_template_that_leaves_the_system_prompt_out_is_refused():
    tokenizer = make_tokenizer(CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'"))
    with pytest.raises(UserError, match=r"takes no system turn \(it leaves it out\).*data.chat_template"):
        tokenizers.prepare(tokenizer, system="Be brief.")
