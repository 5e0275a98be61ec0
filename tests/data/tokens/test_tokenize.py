"""Tokenization: what is cut, dropped and counted; the same in one process and in several, and from the cache."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT
from support.chat_templates import CHATML, REWRITES

from ftjax.data import pipeline
from ftjax.data.audit import checks
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import chat, processes, tokenize
from ftjax.errors import UserError

WORDS = ["lamp", "order", "Anna", "Where is", "broken", "tomorrow", "one two", "it was sent"]


def write_rows(path, n, seed=0):
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for i in range(n):
            question = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
            answer = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
            turns = [{"role": "user", "content": f"{i} {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def rows_file(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 300)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def rows_of(*paths, **more):
    return read_sources([{"source": str(path)} for path in paths], **more)


def content(tokenized):
    return [(example.tokens.tolist(), example.trained.tolist(), example.origin) for example in tokenized]


def columns(tokenized):
    names = ("lengths", "rows", "source_ids", "starts")
    return (
        [getattr(tokenized, name).tolist() for name in names],
        tokenized.parts[0].tokens.tolist(),
        tokenized.digest,
        tokenized.report,
    )


def test_examples_are_what_chat_makes_of_each_row_cut_at_max_length(rows_file, chatml):
    tokenized = tokenize.tokenize(rows_of(rows_file), chatml, 40, max_dropped=0.5)
    whole = [chat.tokenize(row, chatml) for row in rows_of(rows_file)]
    kept = [example for example in whole if example.trained[:40].any()]
    assert 5 < len(whole) - len(kept) == tokenized.report["dropped"]
    assert content(tokenized) == [
        (example.tokens[:40].tolist(), example.trained[:40].tolist(), example.origin) for example in kept
    ]
    assert tokenized[3].tokens.dtype == np.int32
    report = {
        "rows": 300,
        "bad_rows": 0,
        "examples": len(kept),
        "split": 0,
        "truncated": sum(len(example.tokens) > 40 for example in whole),
        "divided": 0,
        "further": 0,
        "dropped": len(whole) - len(kept),
        "unanswered": 0,
        "tokens": sum(len(example.tokens[:40]) for example in kept),
        "trained_tokens": sum(int(example.trained[:40].sum()) for example in kept),
    }
    per_source = [{"source": str(rows_file)} | report]
    assert tokenized.report == report | {
        "longest": max(len(example.tokens) for example in whole),
        "per_source": per_source,
    }


def test_the_result_does_not_depend_on_the_number_of_processes_or_on_the_cache(rows_file, tmp_path, directory, chatml):
    other = write_rows(tmp_path / "other.jsonl", 200, seed=1)
    with open(other, "a") as file:
        file.write("{not JSON\n" + json.dumps({"messages": []}) + "\n" + json.dumps({"text": "lamp"}) + "\n")

    def rows():
        return rows_of(rows_file, other, max_bad_rows=2)

    here = tokenize.tokenize(rows(), chatml, 60)
    assert [source["bad_rows"] for source in here.report["per_source"]] == [0, 2]
    assert here.origin(len(here) - 1) == f"{other}:203"
    assert columns(tokenize.tokenize(rows(), chatml, 60, workers=2)) == columns(here)
    for _ in range(2):  # written, and read
        assert columns(tokenize.tokenize(rows(), chatml, 60, directory=directory)) == columns(here)
    assert len(list(directory.iterdir())) == 1


def test_several_processes_report_the_first_bad_row_as_one_does(tmp_path, chatml):
    path = write_rows(tmp_path / "rows.jsonl", 1000)
    lines = path.read_text().splitlines()
    lines[700] = json.dumps({"text": "x", "messages": 3})
    lines[500] = json.dumps({"messages": [{"role": "user", "content": "?"}]})
    path.write_text("\n".join(lines))
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"more than 1 bad rows.*First: .*:501: .*last: .*:701: "):
            tokenize.tokenize(rows_of(path, max_bad_rows=1), chatml, 60, workers=workers)
    with pytest.raises(UserError, match=r"rows.jsonl:501: no assistant turn"):
        tokenize.tokenize(rows_of(path), chatml, 60)


def test_worker_processes_import_neither_jax_nor_the_main_module(tmp_path):
    """And end with the process that started them, whether or not their work is done."""
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "print('imported', flush=True)\n"
        "from ftjax.data.tokens import processes\n"
        "from ftjax.data.tokens.tokenize import tokenize\n"
        "with processes.ordered(exec, (), ['import sys, os, jinja2, ftjax.data.tokens.tokenize; '\n"
        '    \'print(os.getpid(), sorted({"jax", "torch"} & set(sys.modules)), flush=True)\'] * 2, 1) as done:\n'
        "    list(done)\n"
        "with processes.ordered(exec, (), ['import time; time.sleep(60)'] * 8, 2) as done:\n"
        "    sys.exit(3)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 3, done.stderr
    first, *workers = done.stdout.splitlines()
    assert first == "imported"
    assert [line.split(" ", 1)[1] for line in workers] == ["[]", "[]"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(workers[0].split()[0]), 0)


def test_a_worker_that_is_killed_ends_the_run():
    with (
        pytest.raises(RuntimeError, match=r"worker process \d+ ended with status -9 before its work"),
        processes.ordered(exec, (), ["import os; os.kill(os.getpid(), 9)"], 1) as done,
    ):
        list(done)


def test_thresholds_and_what_cannot_be_tokenized(rows_file, tmp_path, chatml):
    with pytest.raises(
        UserError, match=r"of 300 rows have no trained token within data.max_length = 30 \(at most 5%.*:1 \("
    ):
        tokenize.tokenize(rows_of(rows_file), chatml, 30)
    assert len(tokenize.tokenize(rows_of(rows_file), chatml, 30, max_dropped=0.9)) > 50
    with pytest.raises(UserError, match="300 of 300 rows"):
        tokenize.tokenize(rows_of(rows_file), chatml, 3, max_dropped=1.0)
    with pytest.raises(UserError, match=r"max_length = 1: needs room"):
        tokenize.tokenize(rows_of(rows_file), chatml, 1)
    highest = int(tokenize.tokenize(rows_of(rows_file), chatml, 100).parts[0].tokens.max())
    with pytest.raises(UserError, match=rf"token {highest} .* is beyond the {highest} rows"):
        tokenize.tokenize(rows_of(rows_file), chatml, 100, vocab_size=highest)


def changes(rows_file, tmp_path, make_tokenizer, chatml):
    """name -> the arguments of tokenize after one change."""
    from support.chat_templates import CHATML

    changed = tmp_path / "changed.jsonl"
    changed.write_text(rows_file.read_text().replace("lamp", "lump", 1))
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:-1]))
    swapped = tmp_path / "swapped.jsonl"
    swapped.write_text("".join(rows_file.read_text().splitlines(keepends=True)[::-1]))
    template = make_tokenizer(CHATML.replace("helpful", "kind"))
    larger = make_tokenizer(CHATML)
    larger.add_tokens(["lamp"])
    return {
        "row": (rows_of(changed), chatml, 60),
        "rows": (rows_of(shorter), chatml, 60),
        "order": (rows_of(swapped), chatml, 60),
        "template": (rows_of(rows_file), template, 60),
        "tokenizer": (rows_of(rows_file), larger, 60),
        "max_length": (rows_of(rows_file), chatml, 59),
        "holdout": (rows_of(rows_file, holdout=0.1), chatml, 60),
        "limit": (read_sources([{"source": str(rows_file), "limit": 299}]), chatml, 60),
    }


def test_what_changes_the_tokens_changes_the_key_and_the_digest(rows_file, tmp_path, directory, make_tokenizer, chatml):
    base = tokenize.tokenize(rows_of(rows_file), chatml, 60, directory=directory)
    digests = {base.digest}
    for name, arguments in changes(rows_file, tmp_path, make_tokenizer, chatml).items():
        tokenized = tokenize.tokenize(*arguments, directory=directory)
        assert content(tokenized) == content(tokenize.tokenize(*arguments)), name
        assert tokenized.digest not in digests, name
        digests.add(tokenized.digest)
        assert len(list(directory.iterdir())) == len(digests), name
    tokenized = tokenize.tokenize(rows_of(rows_file), chatml, 60, train_on="all", directory=directory)
    assert tokenized.digest not in digests


def test_the_same_rows_elsewhere_are_not_tokenized_again(rows_file, tmp_path, directory, make_tokenizer, monkeypatch):
    from support.chat_templates import CHATML

    first = tokenize.tokenize(rows_of(rows_file), make_tokenizer(CHATML), 60, directory=directory)
    moved = shutil.copy(rows_file, tmp_path / "moved.jsonl")
    monkeypatch.setattr(chat, "tokenize", None)  # so it is not called
    again = tokenize.tokenize(rows_of(moved), make_tokenizer(CHATML), 60, directory=directory)
    assert again.digest == first.digest
    assert again.origin(0) == f"{moved}:1"
    assert not again.parts[0].tokens.flags.writeable


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 4)
    elif how == "longer":
        with open(path, "ab") as file:
            file.write(bytes(4))
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.bin", "rows.bin", "sources.bin", "cache.json"])
def test_a_damaged_cache_is_made_again_and_never_used(name, rows_file, directory, chatml, caplog):
    good = columns(tokenize.tokenize(rows_of(rows_file), chatml, 60, directory=directory))
    for how in ("missing", "cut", "longer", "flipped"):
        caplog.clear()
        spoil(next(directory.glob(f"*/{name}")), how)
        assert columns(tokenize.tokenize(rows_of(rows_file), chatml, 60, directory=directory)) == good
        assert "is damaged; it is made again" in caplog.text, how
        caplog.clear()
        assert columns(tokenize.tokenize(rows_of(rows_file), chatml, 60, directory=directory)) == good
        assert not caplog.text
        assert len(list(directory.iterdir())) == 1


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1] + "/tests")
from pathlib import Path
from support.chat_templates import CHATML, make_tokenizer
from ftjax.data.tokens import tokenize
from ftjax.data.read.sources import read_sources
def slowly(done):
    print(done, flush=True)
    time.sleep(60)  # it is killed meanwhile
rows = read_sources([{"source": sys.argv[2]}])
tokenize.tokenize(rows, make_tokenizer(CHATML), 60, directory=Path(sys.argv[3]), progress=slowly)
"""


def test_a_kill_during_the_write_leaves_nothing_that_is_read_and_the_next_run_clears_it(
    rows_file, directory, make_tokenizer
):
    from support.chat_templates import CHATML

    root = str(ROOT)
    command = [sys.executable, "-c", KILLED, root, str(rows_file), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}) as process:
        assert process.stdout.readline() == "128\n"
        torn = list(directory.iterdir())
        # A run beside it leaves the other's files alone.
        tokenized = tokenize.tokenize(rows_of(rows_file), make_tokenizer(CHATML), 59, directory=directory)
        assert torn[0].exists()
        process.send_signal(signal.SIGKILL)
    assert len(torn) == 1
    assert ".tmp-" in torn[0].name
    good = columns(tokenize.tokenize(rows_of(rows_file), make_tokenizer(CHATML), 60))
    assert columns(tokenize.tokenize(rows_of(rows_file), make_tokenizer(CHATML), 60, directory=directory)) == good
    assert not torn[0].exists()
    assert len(list(directory.iterdir())) == 2
    assert len(tokenized) > 200


def test_a_cache_that_cannot_be_written_is_named_with_the_mend(rows_file, directory, chatml):
    place = directory / "file"
    place.write_text("")
    with pytest.raises(UserError, match=r"file: tokenized data cannot be kept there \(Not a directory\).*FTJAX_CACHE"):
        tokenize.tokenize(rows_of(rows_file), chatml, 60, directory=place)
    assert list(directory.iterdir()) == [place]


def test_many_rows_go_to_the_cache_of_the_user_and_few_do_not(tmp_path, chatml, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(tokenize, "MANY_ROWS", 250)
    tokenize.tokenize(rows_of(write_rows(tmp_path / "few.jsonl", 249)), chatml, 60)
    assert not (tmp_path / "home").exists()
    many = rows_of(write_rows(tmp_path / "many.jsonl", 250))
    done = []
    tokenized = tokenize.tokenize(many, chatml, 60, workers=0, progress=done.append)
    assert len(list((tmp_path / "home/tokens").iterdir())) == 1
    assert done == [128, 250]
    assert not tokenized.parts[0].tokens.flags.writeable


def spec_of(**more):
    plain = {"kind": "conversation", "max_length": 60, "batch_size": 2, "packing": True, "train_on": "assistant"}
    return pipeline.DataSpec(vocab_size=1000, **(plain | more))


def load(entries, tokenizer, **more):
    return pipeline.load(entries, tokenizer, spec_of(**more))


def test_held_out_rows_are_evaluated_and_no_others(rows_file, tmp_path, chatml):
    train = [{"source": str(rows_file)}]
    other = [{"source": str(write_rows(tmp_path / "other.jsonl", 20, seed=1))}]
    whole, _ = load(train, chatml)
    kept, report = load(train, chatml, holdout=0.2)
    evaluated = pipeline.load_heldout(other, train, chatml, spec_of(holdout=0.2))
    only = pipeline.load_heldout([], train, chatml, spec_of(holdout=0.2))
    assert pipeline.load_heldout([], train, chatml, spec_of()) is None
    origins = {
        name: [example.origin for example in loader.examples]
        for name, loader in locals_of(whole, kept, evaluated, only)
    }
    assert 30 < len(origins["only"]) < 90
    assert report["rows"] == len(origins["kept"])
    assert sorted(origins["kept"] + origins["only"]) == sorted(origins["whole"])
    assert origins["evaluated"] == [f"{other[0]['source']}:{i}" for i in range(1, 21)] + origins["only"]
    by_origin = {example.origin: example for example in whole.examples}
    for example in evaluated.examples:
        if example.origin in by_origin:
            np.testing.assert_array_equal(example.tokens, by_origin[example.origin].tokens)
            np.testing.assert_array_equal(example.trained, by_origin[example.origin].trained)
    documents = sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in evaluated.eval_batches())
    assert documents == len(origins["evaluated"])
    assert len({loader.fingerprint() for loader in (whole, kept, evaluated, only)}) == 4


def locals_of(*loaders):
    return zip(("whole", "kept", "evaluated", "only"), loaders, strict=True)


def test_weights_of_the_entries_reach_the_batches(rows_file, tmp_path, chatml):
    other = write_rows(tmp_path / "other.jsonl", 100, seed=1)
    loader, report = load(
        [{"source": str(rows_file), "weight": 0.5}, {"source": str(other), "weight": 3.0}], chatml, packing=False
    )
    assert loader.rows_per_epoch(0) == 150 + 300
    assert [source["examples"] for source in report["per_source"]] == [300, 100]
    assert load([{"source": str(rows_file)}], chatml)[0].fingerprint() != loader.fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_meanwhile_stops_and_nothing_is_kept(rows_file, directory, chatml, workers):
    rows = rows_of(rows_file, max_bad_rows=300)
    with open(rows_file, "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=rf"^{rows_file}: was changed after this run began to read it"):
        tokenize.tokenize(rows, chatml, 60, directory=directory, workers=workers)
    assert not list(directory.iterdir())


def test_what_was_skipped_is_told_when_the_tokens_come_from_the_cache_too(
    rows_file, tmp_path, directory, chatml, caplog
):
    with open(rows_file, "a") as file:
        file.write("{not JSON\n" + json.dumps({"messages": []}) + "\n")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows_file.read_bytes())
    for path in (rows_file, rows_file, moved):
        caplog.clear()
        report = tokenize.tokenize(rows_of(path, max_bad_rows=2), chatml, 60, directory=directory).report
        assert report["bad_rows"] == 2
        assert report["per_source"][0]["source"] == str(path)
        (message,) = caplog.messages
        assert message.startswith(f"{path}: skipped 2 bad rows of 302 (at most 2 allowed); first: {path}:301: not JSON")
    assert len(list(directory.iterdir())) == 1


def muted(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "weight": 0}]


def test_rows_of_weight_0_only_are_dropped_and_counted(rows_file, tmp_path, chatml):
    with open(rows_file, "a") as file:
        file.write(json.dumps({"messages": muted("Where?", "There.")}) + "\n")
    for train_on in ("assistant", "last"):
        tokenized = tokenize.tokenize(rows_of(rows_file), chatml, 400, train_on=train_on)
        counted = {name: tokenized.report[name] for name in ("rows", "bad_rows", "examples", "dropped")}
        assert counted == {"rows": 301, "bad_rows": 0, "examples": 300, "dropped": 1}
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps({"messages": muted("Where?", "There.")}) + "\n")
    with pytest.raises(UserError, match=r"1 of 1 rows have no trained token.*only.jsonl:1 \(weight 0\)"):
        tokenize.tokenize(rows_of(only), chatml, 400)


def test_rows_that_the_template_refuses_are_bad_rows(rows_file, make_tokenizer):
    raises = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not so') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(raises)
    with open(rows_file, "a") as file:
        turns = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:301: the chat template refuses the conversation: not so"):
        tokenize.tokenize(rows_of(rows_file), tokenizer, 400)
    tokenized = tokenize.tokenize(rows_of(rows_file, max_bad_rows=1), tokenizer, 400)
    assert (tokenized.report["rows"], tokenized.report["bad_rows"]) == (300, 1)


def test_dropped_rows_of_an_evaluation_are_told_and_do_not_end_the_run(tmp_path, chatml, caplog):
    rows = [json.dumps({"messages": [*muted("Where?", "There.")[:1], {"role": "assistant", "content": "Here."}]})]
    (tmp_path / "few.jsonl").write_text("\n".join(rows * 3) + "\n")
    with open(tmp_path / "few.jsonl", "a") as file:
        file.write(json.dumps({"messages": muted("Where?", "There.")}) + "\n")
    entries = [{"source": str(tmp_path / "few.jsonl")}]
    with pytest.raises(UserError, match="1 of 4 rows have no trained token"):
        load(entries, chatml)
    assert pipeline.load_heldout(entries, [], chatml, spec_of()).examples.report["dropped"] == 1
    assert "1 of 4 rows are left out" in caplog.text


def test_rows_whose_answers_the_template_rewrites_are_split_by_answer(tmp_path, make_tokenizer, caplog):
    """Each answer is an example that ends with it; the rows are counted, dropped and looked at as rows."""
    turns = [("user", "Where is Anna?"), ("assistant", "hm</think>Here."), ("user", "Sure?"), ("assistant", "Yes.")]
    turns = [{"role": role, "content": content} for role, content in turns]
    rows = [turns, turns[:2], [*turns, *turns[2:]]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    tokenizer = make_tokenizer(REWRITES)
    spec = pipeline.DataSpec("conversation", 200, 1, True, "assistant", vocab_size=1000)
    loader, report = pipeline.load([{"source": str(tmp_path / "rows.jsonl")}], tokenizer, spec)
    assert "2 of 3 rows are split by answer, which makes 6 examples of all rows" in caplog.text
    assert {name: report[name] for name in ("rows", "split", "examples", "dropped")} == {
        "rows": 3,
        "split": 2,
        "examples": 6,
        "dropped": 0,
    }
    examples = loader.examples
    assert [tokenizer.decode(e.tokens[e.trained]) for e in examples] == [
        *("hm</think>Here.<|im_end|>", "Yes.<|im_end|>", "hm</think>Here.<|im_end|>"),
        *("hm</think>Here.<|im_end|>", "Yes.<|im_end|>", "Yes.<|im_end|>"),
    ]
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert examples[1].tokens.tolist() == whole  # with the history as it is rendered then, without its thought
    assert [examples.origin(i)[-1] for i in range(6)] == list("112333")
    assert [row.origin[-1] for row in checks.RowsOf(examples)] == list("123")
    found = checks.at_start(examples, [], checks.TokenFacts.of(tokenizer, (4,), 200))
    assert [finding.code for finding in found] == []
    # A part without a trained token is left out; the row is dropped only where all are.
    short = len(tokenizer.apply_chat_template(turns[:2])["input_ids"])
    cut = tokenize.tokenize(rows_of(tmp_path / "rows.jsonl"), tokenizer, short)
    assert [cut.report[name] for name in ("rows", "examples", "dropped", "truncated")] == [3, 3, 0, 2]
