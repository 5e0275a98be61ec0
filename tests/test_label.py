"""The command: what it refuses, the model's own answers, going on, and what training makes of it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from support.labeling import write_candidates
from support.pairs import config_of
from support.runs import write_model, write_rows

from ftjax import assemble, label, prompts, rewards
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.labeling import candidates, journal, preferences, samples
from ftjax.labeling.pairs import pairs_of
from ftjax.prompts import Prompt
from ftjax.sampling.sampler import Sampling
from ftjax.train import train
from ftjax.training.display import Display


def run(**given):
    options = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
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
        ({"export": True, "reward": "runs/reward"}, "--reward: --export only writes"),
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


def test_a_run_that_gives_numbers_has_no_answers_to_compare(tmp_path, monkeypatch):
    config = config_of(tmp_path, **{"objective.name": "reward"})
    monkeypatch.setattr(assemble, "load_run", lambda workdir, step, moved, check: check(config))
    monkeypatch.setattr(best, "choose", lambda *_: 1)
    (tmp_path / "prompts.txt").write_text("Who?\n")
    with pytest.raises(UserError, match="gives numbers and does not generate"):
        run(out=tmp_path / "labels", workdir=tmp_path, prompts=tmp_path / "prompts.txt", terminal=True)


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
def test_labels_train_an_ensemble_which_says_what_to_ask_next(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 12)
    first, reward, out = (tmp_path / name for name in ("first", "reward", "labels"))
    given = {"data.checks": "off", "data.max_length": 96, "steps": 2}
    sft = config_of(tmp_path, **given, **{"objective.name": "sft", "data.train": (str(tmp_path / "rows.jsonl"),)})
    assert train(sft, first) == 0
    typing(monkeypatch, "1\n2\nt\n1\n1\n2\ns\n")
    run(out=out, workdir=first, samples=3, max_new_tokens=8, terminal=True)
    assert "5 preferences in" in capsys.readouterr().out

    ensemble = {"objective.name": "reward", "objective.ensemble": 3, "objective.label_noise": 0.1}
    assert (
        train(config_of(tmp_path, **given, **ensemble, **{"data.train": (str(out / preferences.FILE),)}), reward) == 0
    )
    typing(monkeypatch, "1\n1\n1\n")
    run(out=out, reward=reward, terminal=True)
    assert "those on which the 3 heads of" in capsys.readouterr().out
    model, unsure = rewards.load(str(reward)), {}
    for pair in pairs_of(candidates.of_file(str(out / candidates.FILE))):
        a, b = model.scores([pair.prompt + pair.a, pair.prompt + pair.b]).astype(np.float64)
        unsure[pair.id] = (a - b).var()
    said = [json.loads(line)["pair"] for line in (out / journal.FILE).read_text().splitlines()]
    most = sorted((unsure[pair] for pair in unsure.keys() - set(said[:7])), reverse=True)[:3]
    np.testing.assert_allclose([unsure[pair] for pair in said[7:]], most, rtol=1e-3)
