"""Rows with images are compared with their images: copies, near copies, leaks and contradictions."""

import json

import pytest
from test_checks import found_in

from ftjax import curate
from ftjax.data.audit import duplicates
from ftjax.data.audit.parts import near_text, parts
from ftjax.data.format.formats import check_row

QUESTION = "Tell me all about the blue lamp in the picture, and about the red one beside it, please."
ANSWER = "The blue lamp stands on the table, it is lit, and beside it there is a red one that is not."


def seen(*images, question=QUESTION, answer=ANSWER):
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def test_the_same_words_about_other_images_are_nothing_to_report():
    rows = [seen(f"/data/coco/00000{i}.jpg") for i in range(8)]
    assert found_in(rows, [seen("/data/coco/000009.jpg")]) == {}
    assert found_in([seen("/a.png", "/b.png"), seen("/b.png", "/a.png")]) == {}


def test_the_same_words_about_the_same_image_are_found():
    found = found_in([seen("/a.png"), seen("/b.png"), seen("/a.png")])
    assert {code: finding.origin for code, finding in found.items()} == {"duplicate": "train.jsonl:3"}
    found = found_in([seen("/a.png"), seen("/b.png"), seen("/a.png", answer=ANSWER.replace("table", "shelf"))])
    assert {"near_duplicate", "contradiction"} <= found.keys()
    assert set(found_in([seen("/a.png")], [seen("/a.png")])) == {"leak"}
    assert set(found_in([seen("/a.png")], [seen("/a.png", answer="No.")], near=False)) == {"leak_prompt"}


@pytest.mark.parametrize("length", [1, 10, 100, 1000])
def test_other_images_are_far_from_alike_at_any_length(length):
    words = " ".join(f"word{i * 7919 % 10007}" for i in range(length))
    rows = [check_row(seen(f"/data/{i}.png", question=words), "f:1").fields for i in range(20)]
    signatures = [duplicates.signature(near_text(fields)) for fields in rows]
    likeness = [duplicates.similarity(a, b) for i, a in enumerate(signatures) for b in signatures[:i]]
    assert max(likeness) < 0.8  # from which rows count as nearly the same


def test_paths_do_not_look_private():
    found = found_in([seen("/data/4111111111111111/anna@example.org/0171-5551234.png")])
    assert found == {}
    prompt = parts(check_row(seen("/data/a.png"), "f:1").fields).prompt
    assert "/data" not in prompt


def test_curation_keeps_the_same_words_about_other_images(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(seen(name)) + "\n" for name in ("a.png", "b.png", "a.png")))
    for method in ("exact", "near"):
        out = tmp_path / f"{method}.jsonl"
        curate.main(["dedup", str(rows), "--out", str(out), "--method", method])
        kept = [json.loads(line)["messages"][0]["content"][0]["image"] for line in out.read_text().splitlines()]
        assert kept == ["a.png", "b.png"]
