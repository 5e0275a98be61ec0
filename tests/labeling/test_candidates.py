"""Candidates are read from rows of answers and of preferences, made once, and paired without repetitions."""

import json

import pytest

from ftjax.errors import UserError
from ftjax.labeling import candidates
from ftjax.labeling.pairs import pairs_of


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_two_different_answers_of_a_prompt_are_a_pair(tmp_path):
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    file = write(
        tmp_path / "rows.jsonl",
        {"prompt": "Hi", "answers": ["one", "two", " one\n", "three"]},
        {"prompt": [system, user], "answers": ["4", [call]], "tools": tools},
        {"prompt": "Hi", "chosen": "two", "rejected": "four"},
        {"prompt": "Hi", "answers": ["one", "two"]},
        {"prompt": "Hi", "answers": ["alone"]},
    )
    pairs = pairs_of(candidates.of_file(file))
    assert [pair.texts for pair in pairs[:3]] == [("Hi", "one", "two"), ("Hi", "one", "three"), ("Hi", "two", "three")]
    assert (pairs[3].prompt, pairs[3].b[0]["tool_calls"][0]["function"]["name"]) == ([system, user], "add")
    assert pairs[3].tools == tools
    assert pairs[4].texts == ("Hi", "two", "four")
    assert len(pairs) == 5
    assert len({pair.id for pair in pairs}) == 5


SEEN = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "answers": "one"}, r"rows.jsonl:1: answers must be a list"),
        ({"prompt": "Hi", "answers": ["one", " "]}, r"rows.jsonl:1: answers\[1\]"),
        ({"prompt": "Hi", "answers": ["one", [{"role": "user", "content": "Hi"}]]}, r"answers\[1\] starts with a user"),
        ({"answers": ["one", "two"]}, r"rows.jsonl:1: holds no prompt"),
        ({"text": "Hi", "answers": ["one", "two"]}, r"rows.jsonl:1: is text to be continued"),
        ({"prompt": "Hi", "completion": "one"}, r"rows.jsonl:1: has neither `answers`"),
        ({"prompt": SEEN, "answers": ["one", "two"]}, r"rows.jsonl:1: has images, which the page does not show"),
        ({"prompt": SEEN, "chosen": "one", "rejected": "two"}, r"rows.jsonl:1: has images, which the page does not"),
        ({"prompt": "Hi", "answers": ["one", "one "]}, r"rows.jsonl: no prompt has two answers that differ"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        candidates.of_file(write(tmp_path / "rows.jsonl", row))


def test_candidates_are_made_once_and_those_of_another_source_are_refused(tmp_path):
    file, out = write(tmp_path / "rows.jsonl", {"prompt": "Hi", "answers": ["one", "two"]}), tmp_path / "labels"
    first, kept = candidates.open_or_make(out, {"samples": 2}, lambda: candidates.of_file(file))
    assert not kept
    for source in ({"samples": 2}, None):
        again, kept = candidates.open_or_make(out, source, lambda: pytest.fail("made again"))
        assert kept
        assert pairs_of(again) == pairs_of(first)
    with pytest.raises(UserError, match="samples was 2 and is now 3"):
        candidates.open_or_make(out, {"samples": 3}, lambda: first)
    with pytest.raises(UserError, match="nothing to compare yet; give --candidates"):
        candidates.open_or_make(tmp_path / "new", None, lambda: first)
    assert not (tmp_path / "new").exists()
