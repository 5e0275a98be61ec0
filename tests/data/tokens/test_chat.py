"""Masks cover assistant turns with their end tokens, found by tokens; what cannot be masked surely is refused."""

import numpy as np
import pytest
from support.chat_templates import CHATML, HEADERS, REWRITES, SENTENCES, marked

from ftjax.data.format.example import Row
from ftjax.data.tokens import chat
from ftjax.errors import UserError

HELLO = [{"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "It comes tomorrow."}]


def messages_row(messages, origin="chat.jsonl:7"):
    return Row({"messages": messages}, origin)


def trained_text(example, tokenizer):
    return [tokenizer.decode(example.tokens[a:b]) for a, b in spans(example.trained)]


def spans(mask):
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
    return list(zip(edges[::2], edges[1::2]))


def random_conversation(rng):
    """1-5 exchanges, some after a system prompt, made of words, special characters and white space."""
    pieces = [*" ".join(SENTENCES).split(), "é", "日本", "🙂", "a\nb", "{'k': 1}", "x  y", "assistant", "<|", "im_end"]

    def content():
        return " ".join(rng.choice(pieces, rng.integers(1, 9)))

    messages = [{"role": "system", "content": content()}] if rng.random() < 0.3 else []
    for _ in range(rng.integers(1, 6)):
        messages.append({"role": "user", "content": content()})
        if rng.random() < 0.1:
            messages.append({"role": "assistant", "content": content()})
            messages.append({"role": "tool", "content": content()})
        messages.append({"role": "assistant", "content": content()})
    return messages


TEMPLATES = {
    "chatml": ({"template": CHATML}, "<|im_end|>"),
    "headers with BOS": ({"template": HEADERS, "eos": "<|eot|>", "bos": "<s>"}, "<|eot|>"),
    "headers, eos is another token": ({"template": HEADERS, "eos": "</s>", "bos": "<s>"}, "<|eot|>"),
    "pad is the end token": ({"template": CHATML, "pad_token": "<|im_end|>"}, "<|im_end|>"),
    "BOS is <|im_start|>": ({"template": CHATML, "bos": "<|im_start|>"}, "<|im_end|>"),
    "markers around the end token": ({"template": marked("<|im_end|>", "\n")}, "<|im_end|>"),
    "markers just before the end token": ({"template": marked("", "<|im_end|>\n")}, "<|im_end|>"),
    "markers around the line break": ({"template": marked("<|im_end|>\n")}, "<|im_end|>"),
}


@pytest.mark.parametrize(("arguments", "end"), TEMPLATES.values(), ids=TEMPLATES)
def test_trained_tokens_decode_to_exactly_the_assistant_turns_with_their_end_tokens(make_tokenizer, arguments, end):
    tokenizer = make_tokenizer(**arguments)
    rng = np.random.default_rng(0)
    for _ in range(60):
        messages = random_conversation(rng)
        example = chat.tokenize(messages_row(messages), tokenizer)
        turns = [m["content"] + end for m in messages if m["role"] == "assistant"]
        assert trained_text(example, tokenizer) == turns
        assert example.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
        assert (example.tokens.dtype, example.trained.dtype) == (np.int32, bool)
        assert example.origin == "chat.jsonl:7"


def test_mask_by_prefixes_is_the_mask_that_transformers_gives_for_the_same_template_with_markers(make_tokenizer):
    with_markers = make_tokenizer(marked("<|im_end|>", "\n"))
    without = make_tokenizer(
        marked("<|im_end|>", "\n").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    rng = np.random.default_rng(1)
    for _ in range(40):
        messages = random_conversation(rng)
        theirs = with_markers.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ours = chat.tokenize(messages_row(messages), without)
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert ours.trained.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, HEADERS, marked("<|im_end|>", "\n")])
def test_prompt_for_inference_is_what_training_has_before_each_answer(make_tokenizer, template):
    tokenizer = make_tokenizer(template, bos="<s>")
    messages = random_conversation(np.random.default_rng(2)) + HELLO
    example = chat.tokenize(messages_row(messages), tokenizer)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(turns) > 1
    for i, (start, _) in zip(turns, spans(example.trained), strict=True):
        prompt = chat.render_prompt(messages[:i], tokenizer)
        assert prompt.dtype == np.int32
        np.testing.assert_array_equal(prompt, example.tokens[:start])


def test_turns_of_weight_0_and_of_the_prompt_are_not_trained(chatml):
    messages = [*HELLO, {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Bye."}]
    weighted = [messages[0], {**messages[1], "weight": 0}, messages[2], {**messages[3], "weight": 1}]
    split = Row({"prompt": messages[:3], "completion": messages[3:]}, "r")
    for row in (messages_row(weighted), split):
        example = chat.tokenize(row, chatml)
        assert trained_text(example, chatml) == ["Bye.<|im_end|>"]
        np.testing.assert_array_equal(example.tokens, chat.tokenize(messages_row(messages), chatml).tokens)


def test_prompt_and_completion_strings_are_a_user_and_an_assistant_turn_of_the_template(chatml):
    row = Row({"prompt": HELLO[0]["content"], "completion": HELLO[1]["content"]}, "r")
    example, same = chat.tokenize(row, chatml), chat.tokenize(messages_row(HELLO), chatml)
    np.testing.assert_array_equal(example.tokens, same.tokens)
    np.testing.assert_array_equal(example.trained, same.trained)
    prompt = chat.render_prompt(row.fields["prompt"], chatml)
    np.testing.assert_array_equal(prompt, example.tokens[: len(prompt)])


@pytest.mark.parametrize(("prompt", "completion"), [("Where is", " my order?"), ("The l", "amp is blue"), ("a ", "b")])
def test_prompt_and_completion_strings_without_a_template_are_plain_text(make_tokenizer, prompt, completion):
    """The prompt is tokenized as in inference, even where a token of the joint text would span the border."""
    tokenizer = make_tokenizer(eos="</s>", bos="<s>", add_bos=True)
    example = chat.tokenize(Row({"prompt": prompt, "completion": completion}, "r"), tokenizer)
    assert tokenizer.decode(example.tokens) == "<s>" + prompt + completion + "</s>"
    assert trained_text(example, tokenizer) == [completion + "</s>"]
    given = chat.render_prompt(prompt, tokenizer)
    np.testing.assert_array_equal(given, example.tokens[: len(given)])


def test_all_of_a_text_is_trained_but_its_first_token_which_nothing_predicts(make_tokenizer):
    for add_bos, start in ((False, ""), (True, "<s>")):
        tokenizer = make_tokenizer(eos="</s>", bos="<s>", add_bos=add_bos)
        example = chat.tokenize(Row({"text": "The blue lamp"}, "t.jsonl:1"), tokenizer)
        assert tokenizer.decode(example.tokens) == start + "The blue lamp</s>"
        assert example.trained.tolist() == [False] + [True] * (len(example.tokens) - 1)
    # An eos that is there already is not doubled.
    ended = chat.tokenize(Row({"text": "The blue lamp</s>"}, "t.jsonl:1"), tokenizer)
    np.testing.assert_array_equal(ended.tokens, example.tokens)


THOUGHT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "hm</think>Yes."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]
REFUSED = {
    "rewrites earlier turns": ({"template": REWRITES}, THOUGHT, "rewrites .* message 1 .*markers"),
    "generation prompt is not how turns begin": (
        {"template": CHATML.replace("assistant\n' }}{% endif", "assistant\n<plan>\n' }}{% endif")},
        HELLO,
        "rewrites .* message 1 .*generation prompt",
    ),
    "no end-of-turn token": (
        {"template": CHATML.replace("'<|im_end|>\n'", "'\n'")},
        HELLO,
        "message 1 .* without an end-of-turn token.*end the turn",
    ),
    "no end-of-turn token, but a special one in the content": (
        {"template": CHATML.replace("'<|im_end|>\n'", "'\n'")},
        [HELLO[0], {"role": "assistant", "content": "a<|eot|>b"}],
        "message 1 .* without an end-of-turn token",
    ),
    "no end-of-turn token at the markers": ({"template": marked("\n")}, HELLO, "turn 0 has no end-of-turn token"),
    "drops the content": (
        {"template": CHATML.replace("m['content']", "(m['content'] if m['role'] != 'assistant' else '')")},
        HELLO,
        "message 1 .* rendered empty",
    ),
    "white space merges with the header": (
        {"template": HEADERS.replace(" | trim", "")},
        [HELLO[0], {"role": "assistant", "content": "\n\nYes."}],
        "message 1 .* strip the white space",
    ),
    "markers around no turn": (
        {"template": marked("<|im_end|>", "\n").replace("m['role'] == 'assistant'", "false")},
        HELLO,
        "0 spans for 1 assistant",
    ),
    "doubled BOS": (
        {"template": HEADERS.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"), "bos": "<s>", "eos": "<|eot|>"},
        HELLO,
        "two BOS tokens .*remove",
    ),
    "template raises": (
        {"template": "{{ raise_exception('roles must alternate') }}"},
        HELLO,
        "refuses the conversation: roles must alternate",
    ),
    "no template": ({}, HELLO, "no chat template .*chat_template"),
    "empty assistant turn": (
        {"template": CHATML},
        [HELLO[0], {"role": "assistant", "content": " "}],
        "empty assistant",
    ),
    "no trainable token": (
        {"template": CHATML},
        [HELLO[0], {**HELLO[1], "weight": 0}],
        "no trainable token: every assistant turn has weight 0; give one weight 1",
    ),
    "a system prompt that the template does not render": (
        {"template": CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")},
        [{"role": "system", "content": "Be brief."}, *HELLO],
        r"leaves out message 0 \(system\)",
    ),
    "message that the template cannot take": (
        {"template": "{{ messages[0]['content'] + messages[0]['name'].upper() + 1 }}"},
        [{**HELLO[0], "name": "Anna"}, HELLO[1]],
        "refuses the conversation: can only concatenate str",
    ),
}


@pytest.mark.parametrize(("arguments", "messages", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_row_and_the_fix(make_tokenizer, arguments, messages, message):
    with pytest.raises(UserError, match=f"(?s)chat.jsonl:7: .*{message}"):
        chat.tokenize(messages_row(messages), make_tokenizer(**arguments))


def test_markers_around_a_space_that_has_no_token_end_with_the_turn(make_tokenizer):
    """Trimmed offsets leave the space at the end of a block out: the mask must not run to the end of the row."""
    tokenizer = make_tokenizer(marked("<|im_end|> "), trim_offsets=True)
    example = chat.tokenize(messages_row(THOUGHT), tokenizer)
    assert trained_text(example, tokenizer) == ["hm</think>Yes.<|im_end|>", "No.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_still_serves_the_last_answer(make_tokenizer):
    tokenizer = make_tokenizer(REWRITES)
    assert trained_text(chat.tokenize(messages_row(THOUGHT[:2]), tokenizer), tokenizer) == ["hm</think>Yes.<|im_end|>"]
    example = chat.tokenize(messages_row(THOUGHT), tokenizer, train_on="last")
    assert trained_text(example, tokenizer) == ["No.<|im_end|>"]
    earlier = [THOUGHT[0], {**THOUGHT[1], "weight": 0}, *THOUGHT[2:]]
    same = chat.tokenize(messages_row(earlier), tokenizer)
    np.testing.assert_array_equal(same.tokens, example.tokens)
    np.testing.assert_array_equal(same.trained, example.trained)


def test_an_end_token_that_is_the_padding_token_is_trained(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row in (messages_row(HELLO), Row({"text": "The lamp"}, "r"), Row({"prompt": "a", "completion": "b"}, "r")):
        example = chat.tokenize(row, tokenizer)
        ends = np.flatnonzero(example.tokens == tokenizer.pad_token_id)
        assert example.trained[ends[-1]]


MORE = [*HELLO, {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Bye."}]


def test_train_on_says_which_turns_are_trained(chatml):
    trained = {on: chat.tokenize(messages_row(MORE), chatml, train_on=on) for on in chat.TRAIN_ON}
    assert trained_text(trained["assistant"], chatml) == ["It comes tomorrow.<|im_end|>", "Bye.<|im_end|>"]
    assert trained_text(trained["last"], chatml) == ["Bye.<|im_end|>"]
    assert trained["all"].trained.tolist() == [False] + [True] * (len(trained["all"].tokens) - 1)
    silent = [MORE[0], {**MORE[1], "weight": 0}, {**MORE[2], "weight": 0}, MORE[3]]
    example = chat.tokenize(messages_row(silent), chatml, train_on="all")
    assert trained_text(example, chatml) == [
        "system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhere is my order?<|im_end|>\n",
        "<|im_start|>assistant\nBye.<|im_end|>\n",
    ]
    # The prompt of a prompt/completion row is trained by none of them.
    split = Row({"prompt": MORE[:3], "completion": MORE[3:]}, "r")
    for on, text in {"assistant": "Bye.<|im_end|>", "last": "Bye.<|im_end|>"}.items():
        assert trained_text(chat.tokenize(split, chatml, train_on=on), chatml) == [text]
    whole = trained_text(chat.tokenize(split, chatml, train_on="all"), chatml)
    assert whole == ["<|im_start|>assistant\nBye.<|im_end|>\n"]
    with pytest.raises(UserError, match=r"chat.jsonl:7: no trainable token: the last assistant turn has weight 0"):
        chat.tokenize(messages_row([*MORE[:3], {**MORE[3], "weight": 0}]), chatml, train_on="last")
    with pytest.raises(UserError, match=r"data.train_on = 'first': use one of assistant, last, all"):
        chat.tokenize(messages_row(MORE), chatml, train_on="first")


def test_rows_of_preferences_are_no_rows_of_turns_and_the_other_way_round(chatml):
    pair = Row({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, "f:1")
    label = Row({"prompt": "Hi", "completion": "Yes.", "label": True}, "f:1")
    for row, what in ((pair, "a preference pair"), (label, "an answer with a label")):
        with pytest.raises(UserError, match=f"f:1: is {what}, which this objective does not train on; set objective"):
            chat.tokenize(row, chatml)
    with pytest.raises(UserError, match="f:1: is a row of unpaired; a preference needs"):
        chat.tokenize_preference(label, chatml)
    with pytest.raises(UserError, match="f:1: is a row of preference; this needs"):
        chat.tokenize_unpaired(pair, chatml)
    turns = [{"role": "assistant", "content": "Yes.", "weight": 0}]
    with pytest.raises(UserError, match="f:1: chosen has a turn of weight 0; answers count whole"):
        chat.tokenize_preference(Row({"prompt": "Hi", "chosen": turns, "rejected": "No."}, "f:1"), chatml)


def test_a_template_that_renders_the_prompt_of_a_pair_in_two_ways_is_refused(make_tokenizer):
    """Here by the length of the last message, which the markers hide from the comparison of prefixes."""
    template = "{{ '<|start|>' if messages[-1]['content'] | length > 5 }}" + marked("<|im_end|>", "\n")
    pair = Row({"prompt": "Hi", "chosen": "Of course.", "rejected": "No."}, "f:1")
    with pytest.raises(UserError, match="f:1: the chat template renders the prompt differently before the chosen"):
        chat.tokenize_preference(pair, make_tokenizer(template))


def test_a_developer_message_is_a_system_message_where_the_template_knows_no_developer(make_tokenizer):
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    example = chat.tokenize(messages_row(messages), make_tokenizer(CHATML))
    text = make_tokenizer(CHATML).decode(example.tokens)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    knows = make_tokenizer("{# developer #}" + CHATML.replace("!= 'system'", "== 'user'"))
    assert knows.decode(chat.tokenize(messages_row(messages), knows).tokens).startswith("<|im_start|>developer\nBe")


def test_text_refusals(make_tokenizer):
    with pytest.raises(UserError, match=r"t:1: starts with two BOS"):
        chat.tokenize(Row({"text": "<s>Hi"}, "t:1"), make_tokenizer(eos="</s>", bos="<s>", add_bos=True))
    with pytest.raises(UserError, match=r"t:1: .*no eos_token; set it"):
        chat.tokenize(Row({"text": "Hi"}, "t:1"), make_tokenizer(eos=None))


def test_tokens_beyond_the_vocabulary_of_the_model_are_refused(chatml):
    example = chat.tokenize(messages_row(HELLO), chatml)
    highest = int(example.tokens.max())
    chat.tokenize(messages_row(HELLO), chatml, vocab_size=highest + 1)
    with pytest.raises(UserError, match=f"chat.jsonl:7: token {highest} .* is beyond the {highest} rows.*resize_vocab"):
        chat.tokenize(messages_row(HELLO), chatml, vocab_size=highest)


def test_the_prompt_of_two_strings_is_trained_where_all_is(make_tokenizer, chatml):
    row = Row({"prompt": HELLO[0]["content"], "completion": HELLO[1]["content"]}, "r")
    example = chat.tokenize(row, chatml, train_on="all")
    assert example.trained[1:].all()
    np.testing.assert_array_equal(example.tokens, chat.tokenize(messages_row(HELLO), chatml, train_on="all").tokens)
    plain = make_tokenizer(None)
    assert chat.tokenize(row, plain, train_on="all").trained[1:].all()
    assert not chat.tokenize(row, plain).trained[1:].all()
