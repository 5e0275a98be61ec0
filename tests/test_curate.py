"""Each command keeps what it should, says what it dropped, and never harms a file; pandas is the witness."""

import decimal
import gzip
import json
import os

import numpy as np
import pandas
import pytest
from support.chat_templates import CHATML, make_tokenizer

from ftjax import curate
from ftjax.data.audit.parts import parts
from ftjax.data.format.formats import check_row, kind_of
from ftjax.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def read(path):
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode().splitlines()]


def qa(question, answer, **extra):
    return {"prompt": question, "completion": answer, **extra}


def rows_with_copies(count=200, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        qa(f"Question {i} about {' '.join(map(str, rng.integers(0, 1e6, 12)))}", f"Answer {i}", id=i)
        for i in range(count)
    ]
    return [*rows, *({**rows[i], "id": count + i} for i in range(0, count, 7))]


def run(*arguments):
    assert curate.main([str(one) for one in arguments]) == 0


def test_dedup_keeps_the_first_of_each_as_pandas_does_with_all_fields(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", rows_with_copies())
    run("dedup", source, "--out", tmp_path / "out.jsonl", "--dropped", tmp_path / "dropped.jsonl")
    frame = pandas.read_json(source, lines=True).drop_duplicates(["prompt", "completion"])
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == frame.id.tolist()
    dropped = read(tmp_path / "dropped.jsonl")
    assert len(dropped) == 29
    assert dropped[0]["detail"] == f"as {source}:1"
    assert dropped[0]["origin"] == f"{source}:201"
    assert dropped[0]["row"]["id"] == 200
    printed = capsys.readouterr().out
    assert "200 rows; 229 read, 29 dropped" in printed
    assert "as an earlier row" in printed


def test_dedup_near_finds_changed_copies_and_exact_does_not(tmp_path):
    rows = rows_with_copies(100)[:100]
    changed = [qa(row["prompt"].replace("about", "on"), row["completion"], id=1000 + row["id"]) for row in rows[:20]]
    source = write(tmp_path / "rows.jsonl", rows + changed)
    run("dedup", source, "--out", tmp_path / "near.jsonl", "--method", "near", "--threshold", "0.6")
    run("dedup", source, "--out", tmp_path / "exact.jsonl")
    assert [row["id"] for row in read(tmp_path / "near.jsonl")] == list(range(100))
    assert len(read(tmp_path / "exact.jsonl")) == 120


def test_dedup_by_prompt_and_against_other_files(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [qa("a", "1"), qa("a", "2"), qa("b", "3"), qa("c", "4")])
    held = write(tmp_path / "eval.jsonl", [qa("b", "3"), qa("c", "5")])
    run("dedup", source, "--by", "prompt", "--out", tmp_path / "one.jsonl")
    assert [row["completion"] for row in read(tmp_path / "one.jsonl")] == ["1", "3", "4"]
    run("dedup", source, "--against", held, "--out", tmp_path / "two.jsonl")
    assert [row["completion"] for row in read(tmp_path / "two.jsonl")] == ["1", "2", "4"]
    printed = "".join(capsys.readouterr().out.split())  # the table breaks long paths, and at spaces, too
    assert f"{source}:3(as{held}:1)" in printed
    run("dedup", source, "--against", held, "--by", "prompt", "--out", tmp_path / "three.jsonl")
    assert [row["completion"] for row in read(tmp_path / "three.jsonl")] == ["1"]


def test_filter_by_characters_and_by_tokens(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"text": "x" * n} for n in (1, 5, 9, 20)])
    run("filter", source, "--min_chars", 5, "--max_chars", 9, "--out", tmp_path / "out.jsonl")
    assert [len(row["text"]) for row in read(tmp_path / "out.jsonl")] == [5, 9]
    tokenizer = make_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    run("filter", source, "--max_tokens", 6, "--tokenizer", tmp_path / "model", "--out", tmp_path / "tokens.jsonl")
    fits = [n for n in (1, 5, 9, 20) if len(tokenizer("x" * n)["input_ids"]) + 1 <= 6]
    assert [len(row["text"]) for row in read(tmp_path / "tokens.jsonl")] == fits
    with pytest.raises(UserError, match="--tokenizer"):
        run("filter", source, "--max_tokens", 6, "--out", tmp_path / "none.jsonl")


GOOD = (
    "The lamp arrived on Monday, well packed and in one piece. We hung it over the table the same evening, and it "
    "gives a warm and even light. After a week of use there is nothing to complain about, so thank you very much."
)
BAD = {
    "repeated_lines": "\n".join(["the same line of this text"] * 8 + ["another line"]),
    "repeated_sentences": "I will do it. " * 12 + "Now then.",
    "top_2gram": " ".join(f"very nice {w}" for w in "abcdefghijklmnop"),
    "repeated_10gram": f"{GOOD} {GOOD}",
    "mean_word_min": "a b c d " * 3 + "e f g h i j k l m n o p q r s t",
    "mean_word_max": " ".join(f"donaudampfschifffahrt{i}gesellschaft{i * i}" for i in range(25)),
    "symbols": " ".join(f"#word{i} thing{i}" for i in range(20)),
    "bullet_lines": "\n".join(f"- item {i} of this list" for i in range(12)),
    "ellipsis_lines": "\n".join(f"and then {i} came..." for i in range(12)),
    "letter_words": " ".join(f"{i}{i} %% word{chr(97 + i % 26)}" for i in range(20)),
}


@pytest.mark.parametrize("rule", BAD)
def test_a_rule_of_quality_drops_what_breaks_it_and_keeps_good_text(tmp_path, rule):
    japanese = "昨日は友達と一緒に新しい映画を見に行きました。とても面白かったので、もう一度見たいと思います。" * 2
    kept = [qa("q", GOOD), qa("q", "4"), qa("q", BAD[rule][:30]), {"text": japanese[:60]}]
    source = write(tmp_path / "rows.jsonl", [*kept, qa("q", BAD[rule])])
    limit = curate.quality.RULES[rule][0]
    run(
        "filter",
        source,
        "--rule",
        f"{rule}={limit}",
        "--out",
        tmp_path / "out.jsonl",
        "--dropped",
        tmp_path / "d.jsonl",
    )
    assert read(tmp_path / "out.jsonl") == kept
    assert read(tmp_path / "d.jsonl")[0]["reason"].startswith(f"quality: {rule} ")
    run("filter", source, "--quality", "--out", tmp_path / "all.jsonl")
    assert read(tmp_path / "all.jsonl") == kept


def test_filter_private_and_garbled_and_no_secret_in_the_table(tmp_path, capsys):
    rows = [qa("q", "mail jo.doe@mail.de"), qa("q", "cafÃ©"), qa("q", "fine")]
    source = write(tmp_path / "rows.jsonl", rows)
    run("filter", source, "--private", "--garbled", "--out", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == rows[2:]
    printed = capsys.readouterr().out
    assert "jo***" in printed
    assert "jo.doe" not in printed


def test_split_keeps_prompts_together_and_gives_the_shares(tmp_path):
    rows = [qa(f"Question {i // 3}", f"Answer {i}") for i in range(6000)]
    source = write(tmp_path / "rows.jsonl", rows)
    outs = [tmp_path / f"{name}.jsonl" for name in ("train", "eval", "test")]
    parts_ = ["--part", f"{outs[1]}=0.2", "--part", f"{outs[2]}=0.1"]
    run("split", source, "--out", outs[0], *parts_)
    found = [read(path) for path in outs]
    prompts = [{row["prompt"] for row in some} for some in found]
    assert sorted(row["completion"] for some in found for row in some) == sorted(row["completion"] for row in rows)
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 2000
    shares = [len(some) / 2000 for some in prompts]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)  # three standard deviations of 2,000 draws
    run("split", source, "--out", outs[0], *parts_, "--overwrite", "--seed", "1")
    assert {row["prompt"] for row in read(outs[1])} != prompts[1]


def test_mix_gives_the_weights_and_the_same_rows_for_a_seed(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(300)])
    b = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(40)])
    run("mix", a, b, "--weights", "3,1", "--out", tmp_path / "one.jsonl")
    texts = [row["text"] for row in read(tmp_path / "one.jsonl")]
    assert (len(texts), len(set(texts))) == (160, 160)
    assert sum(text.startswith("b") for text in texts) == 40
    assert {text[0] for text in texts[:20]} == {"a", "b"}
    run("mix", a, b, "--weights", "3,1", "--out", tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    run("mix", a, b, "--weights", "1,1", "--total", 200, "--out", tmp_path / "three.jsonl")
    counts = pandas.Series([row["text"] for row in read(tmp_path / "three.jsonl")]).value_counts()
    assert counts[counts.index.str.startswith("b")].tolist() == [3] * 20 + [2] * 20
    assert "each 2.50 times" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_convert_to_a_format_says_the_same(tmp_path, format):
    turns = [(f"Question {i}?", f"It is {i}.") for i in range(5)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    source = write(tmp_path / "rows.jsonl", rows)
    run("convert", source, "--to", format, "--out", tmp_path / "out.jsonl")
    for before, after in zip(rows, read(tmp_path / "out.jsonl"), strict=True):
        record = check_row(after, "x").fields
        assert kind_of(record) in ("chat", "prompt_completion")
        assert parts(record) == parts(check_row(before, "x").fields)


def test_convert_drops_what_the_format_cannot_hold(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"text": "only text"}, qa("a", "b")])
    run("convert", source, "--to", "sharegpt", "--out", tmp_path / "out.jsonl")
    assert len(read(tmp_path / "out.jsonl")) == 1
    assert "does not fit sharegpt" in capsys.readouterr().out


def test_sample_is_drawn_by_the_seed_and_readable(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", rows_with_copies(100)[:100])
    run("sample", source, "--count", 10, "--seed", 3, "--out", tmp_path / "a.jsonl")
    run("sample", source, "--count", 10, "--seed", 3, "--out", tmp_path / "b.jsonl.gz")
    run("sample", source, "--count", 10, "--seed", 4, "--out", tmp_path / "c.jsonl")
    ids = [row["id"] for row in read(tmp_path / "a.jsonl")]
    assert len(ids) == 10
    assert ids == sorted(ids)
    assert read(tmp_path / "b.jsonl.gz") == read(tmp_path / "a.jsonl") != read(tmp_path / "c.jsonl")
    capsys.readouterr()
    run("sample", source, "--count", 2)
    printed = capsys.readouterr().out
    assert printed.count(f"=== {source}:") == 2
    assert "--- prompt" in printed or "--- user" in printed


def test_rows_with_images_are_shown_and_converted_and_bytes_are_told_of(tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    pandas.DataFrame([{"image": {"bytes": b"\xff\xd8cat"}, "conversations": turns}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    source = tmp_path / "rows.parquet"
    run("sample", source, "--count", 1)
    assert "--- user\n<image>What?\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="if it is an image, write the rows with `convert` first"):
        run("dedup", source, "--out", tmp_path / "out.jsonl")
    run("convert", source, "--to", "openai", "--out", tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    image = {"url": "data:image;base64,/9hjYXQ="}
    assert row["messages"][0]["content"][0] == {"type": "image_url", "image_url": image}
    tokenizer = make_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match="has images, whose tokens are not known here; filter by characters"):
        run("filter", source, "--max_tokens", 9, "--tokenizer", tmp_path / "model", "--out", tmp_path / "few.jsonl")


def test_bad_rows_are_dropped_with_their_place_and_reason(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n{"txt": "x"}\n')
    run("dedup", path, "--out", tmp_path / "out.jsonl", "--dropped", tmp_path / "dropped.jsonl")
    assert read(tmp_path / "out.jsonl") == [{"text": "fine"}]
    assert [row["origin"] for row in read(tmp_path / "dropped.jsonl")] == [f"{path}:2", f"{path}:3"]
    assert "cannot be read" in capsys.readouterr().out


def test_files_are_never_harmed(tmp_path, monkeypatch):
    source = tmp_path / "rows.jsonl"
    write(source, [qa("a", "1"), qa("b", "2")])
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for out in ("rows.jsonl", "./rows.jsonl", str(source), "link.jsonl"):
        with pytest.raises(UserError, match="one of the inputs"):
            run("dedup", "*.jsonl", "--out", out, "--overwrite")
    with pytest.raises(UserError, match="one of the inputs"):
        run("split", source, "--out", "a.jsonl", "--part", "rows.jsonl=0.5", "--overwrite")
    assert source.read_bytes() == before
    (tmp_path / "old.jsonl").write_text("old")
    with pytest.raises(UserError, match="--overwrite"):
        run("dedup", source, "--out", "old.jsonl")
    with pytest.raises(UserError, match="no row is left"):
        run("filter", source, "--min_chars", 1000, "--out", "old.jsonl", "--overwrite")
    assert (tmp_path / "old.jsonl").read_text() == "old"
    with pytest.raises(UserError, match="another file"):
        run("dedup", source, "--out", "new.jsonl", "--dropped", "new.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["link.jsonl", "old.jsonl", "rows.jsonl"]


MISTAKES = {
    "no test": (["filter"], "name a test"),
    "unknown rule": (["filter", "--rule", "stars=2"], "no rule 'stars'"),
    "no part": (["split"], "--part"),
    "part without share": (["split", "--part", "x.jsonl"], "FILE=SHARE"),
    "shares of one": (["split", "--part", "x.jsonl=0.5", "--part", "y.jsonl=0.5"], "add up to 1"),
    "weights": (["mix", "--weights", "1,2"], "1 positive numbers"),
    "weights as words": (["mix", "--weights", "many"], "numbers with commas"),
    "sample": (["dedup", "--against", "nowhere.jsonl"], "nowhere.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_reported(tmp_path, name):
    (command, *others), said = MISTAKES[name]
    source = write(tmp_path / "rows.jsonl", [qa("a", "1")])
    with pytest.raises(UserError, match=said):
        run(command, source, "--out", tmp_path / "out.jsonl", *others)


def test_help_of_every_command_teaches(capsys):
    for command in curate.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            curate.main([command, "--help"])
        assert stopped.value.code == 0
        assert "--overwrite" in capsys.readouterr().out


def test_an_input_named_by_a_url_or_a_link_is_never_written_onto(tmp_path):
    source = tmp_path / "rows.jsonl"
    write(source, [qa("a", "1"), qa("b", "2")])
    before = source.read_bytes()
    (tmp_path / "hard.jsonl").hardlink_to(source)
    for named, out in ((f"file://{source}", source), (f"file://{tmp_path}/ro*.jsonl", source), (source, "hard.jsonl")):
        with pytest.raises(UserError, match="is one of the inputs"):
            run("dedup", named, "--out", tmp_path / out, "--overwrite")
    assert source.read_bytes() == before


def test_fields_that_json_has_no_form_for_are_written_as_text_or_refused(tmp_path):
    frame = pandas.DataFrame({"prompt": ["a", "b"], "completion": ["1", "2"]})
    frame["time"] = pandas.to_datetime(["2024-05-06T07:08:09", "2025-01-01T00:00:00"])
    frame["price"] = [decimal.Decimal("1.20"), decimal.Decimal("3.40")]
    frame.to_parquet(tmp_path / "rows.parquet")
    run("dedup", tmp_path / "rows.parquet", "--out", tmp_path / "out.jsonl")
    first = read(tmp_path / "out.jsonl")[0]
    assert (first["time"], first["price"]) == ("2024-05-06T07:08:09", "1.20")
    frame["picture"] = [b"\xff\xfe", b"\x80"]
    frame.to_parquet(tmp_path / "pictures.parquet")
    with pytest.raises(UserError, match="a field of bytes, which JSON cannot hold"):
        run("dedup", tmp_path / "pictures.parquet", "--out", tmp_path / "no.jsonl")
    assert not (tmp_path / "no.jsonl").exists()


def test_half_a_surrogate_pair_in_an_unused_field_comes_out_as_it_went_in(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "café", "note": "\\ud800"}\n')
    run("dedup", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [{"text": "café", "note": "\ud800"}]


def test_rows_of_against_that_cannot_be_read_are_reported(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [qa("a", "1"), qa("b", "2")])
    (tmp_path / "eval.jsonl").write_text(json.dumps(qa("a", "1")) + "\n{not JSON\n")
    run("dedup", source, "--against", tmp_path / "eval.jsonl", "--out", tmp_path / "out.jsonl")
    warning = f"1 rows of --against cannot be read and were not compared: {tmp_path}/eval.jsonl:2"
    assert warning in capsys.readouterr().err
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_columns_of_other_names_are_given_and_named_as_ours(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", "id": 1}])
    run(
        "convert",
        source,
        "--columns",
        "prompt=question,completion=answer",
        "--to",
        "messages",
        "--out",
        tmp_path / "o.jsonl",
    )
    (row,) = read(tmp_path / "o.jsonl")
    assert [message["content"] for message in row["messages"]] == ["q", "a"]
    with pytest.raises(SystemExit):
        curate.main(["dedup", str(source), "--columns", "prompt", "--out", str(tmp_path / "p.jsonl")])
