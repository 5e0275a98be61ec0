"""Conversations with images have the tokens that transformers' processors give them; what becomes of their rows."""

import json
import os

import numpy as np
import pytest
from support import seeing

from ftjax.data.format.example import Row
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import chat, pictured
from ftjax.data.tokens.kinds import PLAIN, Settings
from ftjax.data.tokens.outcome import TokenRules, outcome
from ftjax.data.tokens.tokenize import tokenize
from ftjax.errors import UserError

SIZES = {"wide": (50, 30), "tall": (31, 90), "small": (9, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SIZES.items()):
        seeing.picture(*size, seed).save(path / f"{name}.png")
    return path


def image(name):
    return {"type": "image", "path": f"{name}.png"}


def text(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def answer(text):
    return {"role": "assistant", "content": text}


CHATS = {
    "before": [user(image("wide"), text("What is it?")), answer("A cat.")],
    "after": [user(text("Look at this: "), image("tall")), answer("A dog.")],
    "alone": [user(image("small")), answer("Small.")],
    "two": [user(image("wide"), text("and"), image("tall")), answer("Both.")],
    "side by side": [user(image("wide"), image("small"), image("wide")), answer("Three.")],
    "turns": [
        user(image("wide"), text("What?")),
        answer("A cat."),
        user(text("And?"), image("tall")),
        answer("A dog."),
    ],
    "later": [{"role": "user", "content": "Hi"}, answer("Hello"), user(image("tall"), text("?")), answer("A dog.")],
    "system": [{"role": "system", "content": "Be brief."}, user(image("wide"), text("What?")), answer("A cat.")],
}


def write(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_sources([{"source": str(folder / name)}])


def rules_for(family, length=512, kind="conversation", train_on="assistant"):
    settings = Settings(images=family.rules())
    return TokenRules(length, len(family.tokenizer()), train_on, kind, "divide", settings)


def outcomes(folder, rows, rules, family):
    opened = write(folder, rows)
    return [outcome(opened, i, family.tokenizer(), rules) for i in range(len(opened))]


@pytest.fixture(params=seeing.FAMILIES)
def family(request):
    return seeing.FAMILIES[request.param]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_tokens_are_those_of_the_processor(folder, family, messages):
    processor = family.processor()
    given = json.loads(json.dumps(messages).replace('"path": "', f'"path": "{folder}/'))
    wanted = processor.apply_chat_template([given], tokenize=True, return_dict=True)["input_ids"][0]
    (found,) = outcomes(folder, [{"messages": messages}], rules_for(family), family)
    (example,) = found.examples
    assert example.tokens.tolist() == list(wanted)
    decoded = family.tokenizer().decode(example.tokens[example.trained])
    end = family.tokenizer().eos_token
    assert decoded == "".join(turn["content"] + end for turn in messages if turn["role"] == "assistant")


@pytest.mark.parametrize("messages", [CHATS["before"], CHATS["turns"]], ids=["one turn", "several"])
def test_a_prompt_has_the_tokens_of_the_processor(folder, family, messages):
    prompt = json.loads(json.dumps(messages[:-1]).replace('"path": "', f'"path": "{folder}/'))
    processor = family.processor()
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    wanted = processor.apply_chat_template([prompt], **options)["input_ids"][0]
    record = chat.conversation(prompt, "the prompt", needs_assistant=False)
    shown, its = pictured.prompt(record, family.rules(), "the prompt")
    tokens = chat.render_prompt(shown, family.tokenizer())
    assert tokens.tolist() == list(wanted)
    assert np.count_nonzero(tokens == family.rules().token_id) == sum(its.tokens)


def test_a_pair_has_the_images_of_its_prompt_on_both_sides(folder, family):
    row = {"prompt": [user(image("wide"), text("What?"))], "chosen": [answer("A cat.")], "rejected": [answer("A dog.")]}
    (found,) = outcomes(folder, [row], rules_for(family, kind="pair"), family)
    (example,) = found.examples
    one, two = (np.count_nonzero(part.tokens == family.rules().token_id) for part in example.documents)
    assert one == two == sum(found.pictures.tokens) > 0


def test_tokens_of_images_are_never_trained(folder, family):
    (found,) = outcomes(folder, [{"messages": CHATS["two"]}], rules_for(family, train_on="all"), family)
    (example,) = found.examples
    pictured_here = example.tokens == family.rules().token_id
    assert not example.trained[pictured_here].any()
    assert example.trained[~pictured_here][1:].all()


def test_an_image_that_does_not_fit_is_left_out_with_all_after_it(folder, family):
    whole = outcomes(folder, [{"messages": CHATS["turns"]}], rules_for(family), family)[0].examples[0]
    token = family.rules().token_id
    spots = np.flatnonzero(whole.tokens == token)
    first_of_last = spots[np.flatnonzero(np.diff(spots) > 1)[-1] + 1]
    for length in range(first_of_last - 1, spots[-1] + 3):
        (found,) = outcomes(folder, [{"messages": CHATS["turns"]}], rules_for(family, length), family)
        (example,) = found.examples
        kept = length if length <= first_of_last or length > spots[-1] else first_of_last
        assert example.tokens.tolist() == whole.tokens[:kept].tolist()
    assert found.pictures.first(np.count_nonzero(example.tokens == token)) == 2


def test_a_row_whose_images_leave_no_room_is_dropped(folder, family):
    (found,) = outcomes(folder, [{"messages": CHATS["before"]}], rules_for(family, 12), family)
    assert not found.examples
    assert "tokens" in found.dropped
    with pytest.raises(UserError, match="no trained token") as refused:
        tokenize(
            write(folder, [{"messages": CHATS["before"]}]),
            family.tokenizer(),
            12,
            settings=Settings(images=family.rules()),
        )
    assert ("data.max_pixels" in str(refused.value)) == (family.rules().kind == "grid")


def test_rows_without_images_are_as_ever(folder, family):
    messages = [{"role": "user", "content": "Hello"}, answer("Hi")]
    (found,) = outcomes(folder, [{"messages": messages}], rules_for(family), family)
    plain = chat.tokenize(Row({"messages": messages}, "f:1"), family.tokenizer())
    assert found.examples[0].tokens.tolist() == plain.tokens.tolist()
    assert found.pictures.digest == 0


def test_bad_rows_name_the_row_and_the_message(folder):
    family = seeing.FAMILIES["qwen2_5_vl"]
    seeing.picture(300, 1).save(folder / "thin.png")
    (folder / "words.png").write_text("no picture")
    said = {
        "there is no image .*missing.png": {"content": [image("missing")]},
        "message 0: .*words.png cannot be read": {"content": [image("words")]},
        "message 0: .*thin.png has 300 x 1 pixels, one side over 200 times": {"content": [image("thin")]},
        r"message 0: .* /9j/.{10,60}\.\.\. \(1,604 characters; an image itself is written data:.{,200}$": {
            "content": [{"type": "image", "image": "/9j/" + "QSkZ" * 400}]
        },
        r"writes <\|image_pad\|> 2 times for 1 images": {"content": [image("wide"), text("<|image_pad|>")]},
        r"has 1 tokens <\|image_pad\|>, but its images have 0": {"content": [text("<|image_pad|>")]},
        "has a column of images, and no place for one": {"content": "What?", "image": "wide.png"},
    }
    rows = [
        {"messages": [{"role": "user", "content": row.pop("content")}, answer("a")], **row} for row in said.values()
    ]
    for message, found in zip(said, outcomes(folder, rows, rules_for(family), family)):
        assert not found.examples
        with pytest.raises(UserError, match=rf"rows.jsonl:\d: .*{message}"):
            raise UserError(found.bad)


def test_a_pipe_is_no_image(folder):
    """It is not waited for."""
    os.mkfifo(folder / "pipe.png")
    family = seeing.FAMILIES["qwen2_5_vl"]
    (found,) = outcomes(folder, [{"messages": [user(image("pipe")), answer("a")]}], rules_for(family), family)
    assert "message 0: " in found.bad
    assert "pipe.png is no file" in found.bad


def test_bad_rows_are_skipped_like_any_other(folder):
    family = seeing.FAMILIES["qwen2_5_vl"]
    rows = [{"messages": CHATS["before"]}, {"messages": [user(image("missing")), answer("a")]}]
    write(folder, rows, "bad.jsonl")
    opened = read_sources([{"source": str(folder / "bad.jsonl")}], max_bad_rows=1)
    examples = tokenize(opened, family.tokenizer(), 512, settings=Settings(images=family.rules()))
    assert (len(examples), examples.report["bad_rows"]) == (1, 1)


def test_other_rows_than_conversations_and_pairs_must_have_none(folder):
    family = seeing.FAMILIES["qwen2_5_vl"]
    asked = [user(image("wide"), text("What?"))]
    rows = {
        "labeled": {"prompt": asked, "completion": [answer("A cat.")], "label": True},
        "ranked": {"prompt": asked, "chosen": [answer("A cat.")], "rejected": [answer("A dog.")]},
        "classified": {"messages": [*asked, answer("A cat.")], "label": "good"},
        "stepwise": {"prompt": asked, "completions": ["A cat."], "labels": [True]},
        "prompt": {"messages": [*asked, answer("A cat.")]},
    }
    for kind, row in rows.items():
        (found,) = outcomes(folder, [row], rules_for(family, kind=kind), family)
        assert (
            f"has images, which rows of the kind '{kind}' must not have; those of the kinds conversation and pair"
            in found.bad
        )


def test_the_tokenizer_must_be_that_of_the_model(folder, family):
    opened = write(folder, [{"messages": CHATS["before"]}])
    rules = family.rules()
    other = seeing.qwen_tokenizer() if family is seeing.FAMILIES["gemma3"] else seeing.gemma_tokenizer()
    for tokenizer, its in ((family.tokenizer(), rules._replace(token_id=3)), (other, rules)):
        with pytest.raises(UserError, match=r"the tokenizer has no token .*, with the id .* of config\.json"):
            tokenize(opened, tokenizer, 512, settings=Settings(images=its))


def test_an_answer_of_a_pair_must_have_none(folder):
    family = seeing.FAMILIES["qwen2_5_vl"]
    sides = {side: [answer("Which?"), user(image("wide")), answer(side)] for side in ("chosen", "rejected")}
    (found,) = outcomes(folder, [{"prompt": [user(text("Hi"))], **sides}], rules_for(family, kind="pair"), family)
    assert "chosen has an image; only the prompt of a pair may have some" in found.bad


def test_a_run_that_sees_nothing_refuses_rows_with_images(folder, family):
    rules = rules_for(family)._replace(settings=PLAIN)
    (found,) = outcomes(folder, [{"messages": CHATS["before"]}], rules, family)
    assert "has images, which this run does not see; set config.model.vision=true" in found.bad
    with pytest.raises(UserError, match="the prompt: has images, which this run does not see"):
        chat.render_prompt(CHATS["before"][:1], family.tokenizer())


def test_generation_markers_are_refused_beside_images(folder):
    family = seeing.FAMILIES["qwen2_5_vl"]
    tokenizer = seeing.qwen_tokenizer.__wrapped__()
    start = "{% if message.content is string %}"
    assert start in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(start, start + "{% generation %}{% endgeneration %}")
    opened = write(folder, [{"messages": CHATS["before"]}])
    assert "markers of a chat template are not read" in outcome(opened, 0, tokenizer, rules_for(family)).bad


def test_what_was_tokenized_is_kept_until_an_image_is_replaced(tmp_path):
    family = seeing.FAMILIES["qwen2_5_vl"]
    names = [f"{i}.png" for i in range(3)]
    for name in names:
        seeing.picture(50, 30).save(tmp_path / name)
    chats = [{"messages": [user({"type": "image", "path": name}), answer("A cat.")]} for name in names]
    bad = [{"type": "image", "path": path} for path in ("missing.png", "no\0path.png", "\ud800.png")]
    rows = write(tmp_path, [*chats, *({"messages": [user(image), answer("a")]} for image in bad)])
    rows.max_bad_rows = len(bad)
    (tmp_path / "cache").mkdir()

    def made(workers=0):
        options = {"settings": Settings(images=family.rules()), "directory": tmp_path / "cache", "workers": workers}
        examples = tokenize(rows, family.tokenizer(), 512, **options)
        assert len(examples.pictures) == 3
        return len(list((tmp_path / "cache").iterdir())), examples.lengths.tolist()

    count, lengths = made()
    assert made(workers=2) == (count, lengths) == (1, lengths)
    seeing.picture(90, 30).save(tmp_path / "1.png")
    count, others = made()
    assert count == 2
    assert [a == b for a, b in zip(lengths, others)] == [True, False, True]


def test_other_images_under_the_same_names_are_noticed(folder, tmp_path):
    """The digest of the examples, which decides whether a run goes on with the data that it began with."""
    family = seeing.FAMILIES["qwen2_5_vl"]

    def digest(where, seed=0, name="a.png", rules=None):
        where.mkdir(exist_ok=True)
        seeing.picture(50, 30, seed).save(where / name)
        rows = write(where, [{"messages": [user({"type": "image", "path": name}), answer("A cat.")]}])
        return tokenize(rows, family.tokenizer(), 512, settings=Settings(images=rules or family.rules())).digest

    first = digest(tmp_path / "one")
    assert digest(tmp_path / "two") == first  # a copy elsewhere is the same
    assert digest(tmp_path / "one", seed=1) != first
    assert digest(tmp_path / "one", name="b.png") != first
    assert digest(tmp_path / "one", rules=family.rules()._replace(resample=2)) != first
