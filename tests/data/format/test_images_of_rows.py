"""Images in rows of every form become references beside the marks in a message's text."""

import base64

import pytest
from support import seeing

from ftjax.data.format.formats import check_row
from ftjax.data.format.images import MARK, as_parts, images_of, placed, with_images
from ftjax.data.format.prompt import prompt_of
from ftjax.data.format.writing import write_as
from ftjax.errors import UserError

ANSWER = {"role": "assistant", "content": "A cat."}
DATA = seeing.as_data(seeing.picture(4, 4))
BYTES = base64.b64decode(DATA.partition(",")[2])


def chat(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **more}


def text(text):
    return {"type": "text", "text": text}


WANTED = {"role": "user", "content": f"{MARK}What is it?", "images": ["a.png"]}
FORMS = {
    "OpenAI": chat({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("What is it?")),
    "image": chat({"type": "image", "image": "a.png"}, text("What is it?")),
    "path": chat({"type": "image", "path": "a.png"}, text("What is it?")),
    "url": chat({"type": "image", "url": "a.png", "text": None}, text("What is it?")),
    "column": chat({"type": "image"}, text("What is it?"), images=["a.png"]),
    "column of one": chat({"type": "image", "image": None}, text("What is it?"), image="a.png"),
    "column of a table": chat({"type": "image"}, text("What is it?"), images=[{"bytes": None, "path": "a.png"}]),
    "LLaVA": {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}],
    },
    "LLaMA-Factory": {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What is it?"}, ANSWER]},
    "prompt and completion": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, text("What is it?")]}],
        "completion": [ANSWER],
        "image": "a.png",
    },
    "ours": {"messages": [WANTED, ANSWER]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_rows_have_images_in_many_forms(row):
    fields = check_row(row, "f:1").fields
    first = {key: value for key, value in fields["messages"][0].items() if key != "weight"}
    assert first == WANTED
    assert check_row(fields, "f:1").fields == fields


def test_an_image_may_be_a_url_of_a_file():
    row = chat({"type": "image_url", "image_url": "file:///tmp/an%20image.png"}, text("What is it?"))
    assert images_of(check_row(row, "f:1").fields) == ["/tmp/an image.png"]


def test_images_of_tables_are_in_the_row():
    for content in (BYTES, "GIF89a"):  # a table's bytes that happen to be text are read as such
        row = chat({"type": "image"}, text("?"), images=[{"bytes": content, "path": "a.png"}])
        (data,) = images_of(check_row(row, "f:1").fields)
        assert base64.b64decode(data.partition(",")[2]) == (content if isinstance(content, bytes) else b"GIF89a")


def test_several_images_stand_in_their_order():
    row = {
        "messages": [
            {"role": "user", "content": [text("One "), {"type": "image"}, text(" two "), {"type": "image"}]},
            ANSWER,
            {"role": "user", "content": [{"type": "image"}, text("?")]},
            ANSWER,
        ],
        "images": ["a", "b", "c"],
    }
    fields = check_row(row, "f:1").fields
    assert images_of(fields) == ["a", "b", "c"]
    assert [turn["content"] for turn in fields["messages"][::2]] == [f"One {MARK} two {MARK}", f"{MARK}?"]
    assert as_parts(fields["messages"][0]["content"], ["a", "b"]) == [
        text("One "), {"type": "image", "image": "a"}, text(" two "), {"type": "image", "image": "b"},
    ]  # fmt: skip


def test_pairs_have_images_in_the_prompt():
    asked = {"role": "user", "content": [{"type": "image"}, text("What?")]}
    sides = {"chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "A dog."}]}
    rows = [
        {"prompt": [asked], **sides, "images": ["a.png"]},
        {**{name: [asked, *answer] for name, answer in sides.items()}, "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "<image>What?"}], "image": "a.png",
         **{name: {"from": "gpt", "value": answer[0]["content"]} for name, answer in sides.items()}},
    ]  # fmt: skip
    for row in rows:
        fields = check_row(row, "f:1").fields
        assert fields["prompt"] == [{"role": "user", "content": f"{MARK}What?", "images": ["a.png"]}]
        assert images_of(fields) == ["a.png"]


def test_a_prompt_has_images():
    row = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a.png"]}
    assert images_of(prompt_of(row, "f:1")) == ["a.png"]


def test_paths_start_at_the_file_of_the_row():
    fields = check_row(chat(*({"type": "image", "image": path} for path in ("a.png", "/b.png", DATA))), "f:1").fields
    assert images_of(placed(fields, "/data", "f:1")) == ["/data/./a.png", "/b.png", DATA]
    with pytest.raises(UserError, match=r"f:1: the path of the image a\.png is relative, to no file"):
        placed(fields, "", "f:1")


def test_a_column_of_images_that_no_turn_has_a_place_for_is_not_used():
    fields = check_row({"messages": [{"role": "user", "content": "Hi"}, ANSWER], "image": b"\xff"}, "f:1").fields
    assert images_of(fields) == []


def test_a_tag_in_an_answer_is_text():
    row = {**FORMS["LLaVA"], "conversations": [*FORMS["LLaVA"]["conversations"], {"from": "human", "value": "How?"},
                                              {"from": "gpt", "value": "Write <image>."}]}  # fmt: skip
    fields = check_row(row, "f:1").fields
    assert images_of(fields) == ["a.png"]
    assert fields["messages"][-1] == {"role": "assistant", "content": "Write <image>."}


def test_text_that_has_the_mark_is_text():
    fields = check_row({"messages": [{"role": "user", "content": f"a{MARK}b"}, ANSWER]}, "f:1").fields
    assert fields["messages"][0] == {"role": "user", "content": f"a{MARK}b"}


def test_rows_with_images_are_written_again():
    """As other programs read them, too."""
    fields = check_row(FORMS["image"], "f:1").fields
    parts = [{"type": "image", "image": "a.png"}, text("What is it?")]
    rows = {format: write_as(fields, format) for format in ("messages", "openai", "prompt_completion", "sharegpt")}
    assert all(images_of(check_row(row, "f:1").fields) == ["a.png"] for row in rows.values())
    assert all(check_row(rows[format], "f:1").fields == fields for format in ("messages", "openai", "sharegpt"))
    assert (
        rows["messages"]["messages"][0] == rows["prompt_completion"]["prompt"][0] == {"role": "user", "content": parts}
    )
    assert rows["openai"]["messages"][0]["content"][0] == {"type": "image_url", "image_url": {"url": "a.png"}}
    assert rows["sharegpt"]["conversations"][0] == {"from": "human", "value": "<image>What is it?"}
    assert rows["sharegpt"]["images"] == ["a.png"]
    with pytest.raises(UserError, match="alpaca cannot hold images"):
        write_as(fields, "alpaca")
    beside = check_row(chat({"type": "image", "image": "a.png"}, text("Is this <image>?")), "f:1").fields
    with pytest.raises(UserError, match="sharegpt cannot hold images beside the text <image>"):
        write_as(beside, "sharegpt")


def test_pairs_with_images_are_written_again():
    prompt = [{"role": "user", "content": [{"type": "image", "image": "/x/./a.png"}, text("What?")]}]
    row = {"prompt": prompt, "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "No."}]}
    fields = check_row(row, "f:1").fields
    for format in ("preference", "openai_preference", "sharegpt_preference"):
        again = check_row(write_as(fields, format), "f:1").fields
        assert again == with_images(fields, ["/x/a.png"])  # with the whole path
    assert write_as(fields, "preference")["prompt"][0]["content"][0] == {"type": "image", "image": "/x/a.png"}


REFUSED = {
    "web": (chat({"type": "image", "url": "https://x.org/a.png"}), "https://x.org/a.png, .*download it first"),
    "a long address": (chat({"type": "image", "url": "https://" + "x" * 2000}), "image https://x+... .2,008 .{,200}$"),
    "another machine": (chat({"type": "image", "url": "file://photos/a.png"}), "file://photos/a.png, .*file:///"),
    "half a character": (chat({"type": "image", "image": "a\ud800.png"}), "a lone surrogate .* at character 1"),
    "no image": (chat({"type": "image"}), "message 0 .*without an image; write its path .*column `images`"),
    "empty": (chat({"type": "image", "image": ""}), "an image that is empty"),
    "number": (chat({"type": "image", "image": 3}), "an image that is a int"),
    "too few": (chat({"type": "image"}, {"type": "image"}, images=["a"]), "has 1 images and 2 places"),
    "too many": (chat({"type": "image"}, images=["a", "b"]), "has 2 images and 1 places"),
    "a mark in text": (chat({"type": "image", "image": "a"}, text(f"a{MARK}")), "U.FFFC, which stands for an image"),
    "a mark beside a tag": (
        {"messages": [{"role": "user", "content": f"<image>{MARK}"}, ANSWER], "image": "a"},
        "U.FFFC, which stands for an image",
    ),
    "assistant": (
        {"messages": [{"role": "user", "content": "Draw"},
                      {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
        "message 1 .*the role assistant; a model writes text only",
    ),
    "images without places": (
        {"messages": [{"role": "user", "content": "Hi", "images": ["a"]}, ANSWER]},
        "has 1 images and 0 places for them .*as a list of parts",
    ),
    "no list": ({"messages": [{"role": "user", "content": MARK, "images": "a"}, ANSWER]}, "images is a str"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused(row, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}"):
        check_row(row, "f:1")
