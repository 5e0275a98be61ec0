"""The command: what it refuses, the model's own answers, going on, and what training makes of it."""

import io
import json

import pytest
from support.labeling import write_candidates
from support.pairs import config_of
from support.runs import command, finish, write_model, write_rows

from ftjax import config as configs
from ftjax import label, prompts
from ftjax.errors import UserError
from ftjax.labeling import samples
from ftjax.prompts import Prompt
from ftjax.sampling.sampler import Sampling
from ftjax.training import metrics
from ftjax.training.display import Display


def run(**given):
    options = {
        name: str(value) if name in ("out", "candidates", "model", "prompts") else value
        for name, value in given.items()
    }
    return label.label(label.Options(**options), given)


def typing(monkeypatch, text=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "labels: nothing to compare yet; give --candidates FILE, --workdir RUN, or --model with --prompts"),
        ({"candidates": "c.jsonl", "model": "m"}, "--candidates, or the --workdir or --model that makes them"),
        ({"candidates": "c.jsonl", "samples": 4}, "--samples: goes with --workdir or --model"),
        ({"batch_size": 4}, "--batch_size: goes with --workdir or --model"),
        ({"model": "m"}, "--model alone needs --prompts FILE"),
        ({"model": "m", "prompts": "p.txt", "step": "best"}, "--step: goes with --workdir"),
        ({"workdir": "w", "dtype": "bfloat16"}, "--dtype: goes with --model alone"),
        ({"workdir": "w", "samples": 1}, "--samples must be 2 or more"),
        ({"workdir": "w", "temperature": 0.0}, "--temperature above 0"),
        ({"candidates": "c.jsonl", "overlap": 1.5}, "--overlap 1.5: it is a share"),
        ({"terminal": True, "port": 80}, "--port: is of the page"),
        ({"export": True, "terminal": True}, "--terminal: --export only writes"),
        ({"export": True, "candidates": "c.jsonl"}, "--candidates: --export only writes"),
        (
            {"candidates": "c.jsonl", "terminal": True, "labeler": "a\x1b"},
            "a labeler's name must have 1 to 64 printable",
        ),
        ({"candidates": "gone.jsonl", "terminal": True}, "gone.jsonl"),
    ],
)
def test_what_does_nothing_or_is_not_there_is_refused_before_anything_is_written(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(out="labels", **given)
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_goes_on_and_an_export_writes_what_was_said(tmp_path, monkeypatch, capsys):
    given = {
        "out": tmp_path / "labels",
        "candidates": write_candidates(tmp_path / "given.jsonl", 3, 3),
        "terminal": True,
    }
    typing(monkeypatch, "1\nt\n")
    assert run(**given, labeler="anna") == 0
    assert "9 pairs of answers to 3 prompts are now in" in capsys.readouterr().out
    typing(monkeypatch, "1\n1\n")
    assert run(**given, labeler="ben") == 0
    printed = capsys.readouterr().out
    assert "9 pairs of answers to 3 prompts are in" in printed
    assert "4 pairs judged by anna (2), ben (2)." in printed
    assert "in random order" in printed
    monkeypatch.setattr(label.terminal, "label", interrupted)
    assert run(**given) == 0
    assert "4 pairs judged by anna (2), ben (2)." in capsys.readouterr().out
    assert run(out=tmp_path / "labels", export=True) == 0
    assert "3 preferences in" in capsys.readouterr().out
    assert len((tmp_path / "labels/preferences.jsonl").read_text().splitlines()) == 3
    with given["candidates"].open("a") as file:
        file.write(json.dumps({"prompt": "New", "answers": ["one", "two"]}) + "\n")
    with pytest.raises(UserError, match="candidates of another source: digest was"):
        run(**given)


@pytest.mark.slow
def test_the_models_own_answers_are_drawn_once(tmp_path, monkeypatch, capsys):
    model, file = write_model(tmp_path / "model"), tmp_path / "prompts.txt"
    file.write_text("Where is my order?\nThe lamp is broken.\nThe lamp is broken.\nWho?\n")
    given = {"model": model, "prompts": file, "samples": 3, "max_new_tokens": 4, "max_prompts": 2, "terminal": True}
    typing(monkeypatch)
    assert run(out=tmp_path / "labels", **given) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 prompts, evenly spread" in printed
    assert "sampling: 6 of 6" in printed
    rows = [json.loads(line) for line in (tmp_path / "labels/candidates.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Where is my order?", "Who?"]
    assert [len(row["answers"]) for row in rows] == [3, 3]
    assert len({answer for row in rows for answer in row["answers"]}) > 4
    monkeypatch.setattr(samples, "draw", lambda *_: pytest.fail("drawn again"))
    assert run(out=tmp_path / "labels", **given) == 0
    with pytest.raises(UserError, match="max_prompts was 2 and is now 1"):
        run(out=tmp_path / "labels", **given | {"max_prompts": 1})


def test_empty_and_repeated_answers_are_left_out(monkeypatch, capsys):
    drawn = ["one", " ", "two", "one ", "", "alone"]
    monkeypatch.setattr(prompts, "encode", lambda asked, base, most: [prompt.last for prompt in asked])
    monkeypatch.setattr(
        prompts,
        "complete",
        lambda base, variables, ids, *_: [prompts.Answer(text, 1, 1, bool(text.strip())) for text in drawn],
    )
    asked = [
        Prompt("p.txt:1", {"prompt": "Hi"}),
        Prompt("p.txt:2", {"messages": [{"role": "user", "content": "Why?"}]}),
    ]
    made = samples.draw(None, None, asked, 3, 8, Sampling(1.0), 4, Display(1))
    texts = [[answer[0]["content"] for answer in one.answers] for one in made]
    assert (texts, [one.origin for one in made]) == ([["one", "two"], ["one ", "alone"]], ["p.txt:1", "p.txt:2"])
    assert "2 of 6 answers are cut at --max_new_tokens=8" in capsys.readouterr().out
    drawn[:] = ["one"] * 6
    with pytest.raises(UserError, match="none of 2 prompts got two answers that differ; raise --temperature"):
        samples.draw(None, None, asked, 3, 8, Sampling(1.0), 4, Display(1))


def test_a_runs_prompts_are_those_of_its_training_rows(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows = [
        {"prompt": "Why?", "completion": "So."},
        {"text": "A text."},
        chat,
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = samples.of_run(config_of(tmp_path))
    assert [prompt.last for prompt in asked] == ["Why?", "Hi", "Hi"]
    assert [prompt.last for prompt in samples.some(asked, 0)] == ["Why?", "Hi"]
    (tmp_path / "pairs.jsonl").write_text('{"text": "A text."}\n')
    with pytest.raises(UserError, match="has no prompts, only texts; name some with --prompts"):
        samples.of_run(config_of(tmp_path))
    with pytest.raises(UserError, match=r"rows.txt:3: is text to be continued"):
        samples.some([Prompt("rows.txt:3", {"text": "A text."})], 0)


@pytest.mark.slow
def test_training_labeling_and_training_on_the_labels(tmp_path):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 12)
    small = ("--config.data.max_length=96", "--config.data.batch_size=4", "--config.steps=2", "--config.mesh.fsdp=1")
    small += ("--config.data.checks=off", "--config.model.dtype=float32", f"--config.model.source={tmp_path / 'model'}")
    first, second, out = (tmp_path / name for name in ("first", "second", "labels"))
    data = f"--config.data.train={tmp_path / 'rows.jsonl'}"
    finish(command("ftjax.train", "--config=chat", data, *small, f"--workdir={first}"))
    words = ("--samples=3", "--max_new_tokens=8", "--terminal", "--labeler=anna", f"--workdir={first}", f"--out={out}")
    process = command("ftjax.label", *words, talks=True)
    printed, _ = process.communicate("1\n2\nt\n1\n1\n2\ns\n", timeout=300)
    assert process.returncode == 0
    assert "5 preferences in" in printed
    data = f"--config.data.train={out / 'preferences.jsonl'}"
    finish(command("ftjax.train", "--config=dpo", data, *small, f"--workdir={second}"))
    assert configs.read(second / "config.json").objective.name == "dpo"
    assert metrics.read(second / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
