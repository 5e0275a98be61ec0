"""A workdir's files as one structure: whole, old, in progress, damaged."""

import json
import os

import pytest
from support.reports import NAME, evaluation, start, write_workdir

from ftjax.errors import UserError
from ftjax.reporting import curves, gather


def test_a_run_that_was_scored_tells_what_changed(tmp_path):
    run = gather.gather(write_workdir(tmp_path / "a"))
    assert (run.step, run.done, run.steps, run.stale) == (80, 80, 80, False)
    main = gather.changes(run)[0]
    assert main == gather.Change(NAME, 0.0, 0.875, 0.875, True, "max")
    assert gather.summary(run) == [
        f"Training helped: {NAME} 0 % before, 87.5 % at step 80.",
        "eval_loss 2 before training, 1 at step 80: better",
        "cross-entropy of general text +0.02 nats per token against the base",
    ]
    (samples,) = run.samples
    assert (samples.name, samples.before, samples.after, len(samples.samples)) == (
        "support_ticket",
        "before training",
        "step 80",
        16,
    )
    first, last = samples.samples[0], samples.samples[-1]
    assert first[1:] == ('{"order": "0"}', "I am sorry about 0", '{"order": "0"}', 0.0, 1.0)
    assert last[4:] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "verdict", "step"),
    [
        ((0.5, 0.75, 0.25), f"Training helped: {NAME} 50 % before, 75 % at step 40.", 40),  # the best is used
        ((0.5, 0.25, 0.125), f"Training made it worse: {NAME} 50 % before, 25 % at step 40.", 40),
        ((0.5, 0.5, 0.5), f"Training changed nothing: {NAME} 50 % at step 40, as before.", 40),
    ],
)
def test_the_verdict_is_about_the_step_that_is_used(tmp_path, scores, verdict, step):
    run = gather.gather(write_workdir(tmp_path / "a", scores=scores))
    assert gather.summary(run)[0] == verdict
    assert run.step == step
    assert run.samples[0].after == f"step {step}"


def test_runs_that_tell_little_say_so(tmp_path):
    workdir = write_workdir(tmp_path / "a", **{"evaluate.before": False})
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records if one["step"]))
    assert "was not measured before training" in gather.summary(gather.gather(workdir))[0]
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')  # torn by a kill
    (workdir / "samples.jsonl").unlink()
    run = gather.gather(workdir)
    assert gather.summary(run)[0].startswith("Whether training helped is not known")
    assert (run.step, run.samples, gather.cost(run)) == (1, [], (None, None))
    (workdir / "metrics.jsonl").unlink()
    assert gather.gather(workdir).records == []


def test_an_evaluation_is_read_whole_and_its_samples_come_first(tmp_path):
    workdir = write_workdir(tmp_path / "a")
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(step=40)))
    run = gather.gather(workdir)
    assert (run.step, run.stale) == (40, True)  # the best is 80
    scored, forgetting = run.evaluation.sets[0], run.evaluation.forgetting
    assert [one.score for one in scored.contestants] == [0.0, 0.49, 0.905]
    assert (scored.contestants[1].loss, scored.contestants[2].interval) == (None, (0.86, 0.94))
    assert (forgetting.categories[0].tuned, forgetting.drift[2].layer, forgetting.verdict) == (2.35, 2, "")
    assert run.samples[0].samples[0][2:] == ("send blue lamps", "send 6 blue lamps tuning wins", 0.0, None)
    assert gather.summary(run)[0] == "Tuning wins: tuning wins"
    assert gather.gather(workdir, 80).evaluation is None  # an export of step 80 says nothing of step 40
    fewer = evaluation()
    fewer["sets"][0]["samples"].pop()
    (workdir / "evaluation.json").write_text(json.dumps(fewer))
    assert gather.gather(workdir).samples[0].before == "before training"
    (workdir / "evaluation.json").write_text("{}")
    assert gather.gather(workdir).evaluation == ((None, "", "", (), None))


def test_rows_that_are_not_scored_are_compared_by_their_loss(tmp_path):
    workdir = write_workdir(tmp_path / "a")
    contestants = [{"name": name, "kind": name, "loss": loss} for name, loss in (("base", 2.5), ("tuned", 0.5))]
    rows = {
        "name": "rows",
        "metric": "loss",
        "contestants": contestants,
        "differences": [{"of": "tuned", "loss": -2.0}],
    }
    (workdir / "evaluation.json").write_text(json.dumps({"sets": [rows]}))
    (found,) = gather.gather(workdir).evaluation.sets
    assert [(one.score, one.loss) for one in found.contestants] == [(2.5, None), (0.5, None)]
    assert found.differences[0].score == -2.0


def test_a_sum_that_decides_is_told_by_its_first_metric(tmp_path):
    run = gather.gather(write_workdir(tmp_path / "a"))
    standing = run.standing._replace(metric=f"{NAME} - 0.5 * eval_general/change", mode="max")
    found = gather.changes(run._replace(standing=standing))
    assert [one.name for one in found[:2]] == [NAME, "eval_general/change"]
    assert [one.mode for one in found[:2]] == ["max", "min"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("eval_loss", "min"),
        ("eval_rows/perplexity", "min"),
        ("eval_rows/rouge_l", "max"),
        ("eval_mean_token_accuracy", "max"),
        ("eval_entropy", ""),
        ("eval_rewards/chosen", ""),
        ("eval_rewards/accuracies", "max"),
        ("eval_general/news", "min"),
        ("learning_rate", ""),
    ],
)
def test_which_way_a_metric_is_better(name, mode):
    assert gather.mode_of(name, {"rewards/chosen", "rewards/accuracies"}) == mode


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "evaluation.json",
            '{"sets": [{"contestants": [{"score": "high"}]}]}',
            "sets[0], contestants[0], score is 'high'",
        ),
        ("evaluation.json", '{"sets": {}}', "sets is '{}', not tuple"),
        ("evaluation.json", "{", "evaluation.json: not JSON"),
        ("environment.json", '{"starts": [{"began": 1}]}', "environment.json: damaged"),
        ("environment.json", "[]", "environment.json: damaged"),
        ("metrics.jsonl", '{"loss": 1}\n', "a record without a step"),
        ("metrics.jsonl", "x\n", "metrics.jsonl: "),
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl:1: not a sample"),
        ("origin.json", "[]", "origin.json: damaged"),
        ("config.json", "[]", "config.json: not the config of a run"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, said):
    workdir = write_workdir(tmp_path / "a", steps=2)
    (workdir / file).write_text(text)
    with pytest.raises(UserError) as error:
        gather.gather(workdir)
    assert said in str(error.value)


def test_device_time_adds_up_over_starts_and_an_older_evaluation_is_not_of_this_run(tmp_path):
    workdir = write_workdir(tmp_path / "a", steps=4)
    starts = [start(0, 1000.0, 1100.0, count=2), start(2, 2000.0, None, count=8)]
    (workdir / "environment.json").write_text(json.dumps({"version": 1, "starts": starts}))
    os.utime(workdir / "metrics.jsonl", (2050, 2050))  # when the second, which was killed, wrote for the last time
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(step=2)))
    os.utime(workdir / "evaluation.json", (999, 999))
    assert gather.gather(workdir).evaluation is None  # it is of a run that was here before
    os.utime(workdir / "evaluation.json", (1001, 1001))
    assert gather.gather(workdir).evaluation.step == 2
    assert gather.cost(gather.gather(workdir)) == (100 * 2 + 50 * 8, 4 * 2.0)


def test_curves_of_training_and_of_held_out_rows_share_a_chart(tmp_path):
    run = gather.gather(write_workdir(tmp_path / "a"))
    first, further = curves.of_run(run)
    titles = {chart.title: chart for chart in first}
    assert list(titles) == [
        "Loss",
        "score",
        "General text: nats per token",
        "Forgetting: nats per token",
        "Learning rate",
        "Norm of the gradient",
        "Tokens per second",
    ]
    assert [(one.name, len(one.points)) for one in titles["Loss"].series] == [("training", 80), ("held out", 3)]
    assert titles["score"].share
    assert not titles["Learning rate"].share
    assert [chart.title for chart in further] == ["step_time"]
    other = gather.gather(write_workdir(tmp_path / "b"))
    first, _ = curves.of_runs([run, other], ["a", "b"])
    assert all([one.name for one in chart.series] == ["a", "b"] for chart in first)
    assert first[0].title == NAME


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert gather.names([tmp_path / "x/one", tmp_path / "x/two"]) == ["one", "two"]
    assert gather.names([tmp_path / "x/one", tmp_path / "y/one"]) == ["x/one", "y/one"]


def test_answers_before_and_after_are_those_of_one_question_where_prompts_end_alike():
    lines = [
        {"step": step, "source": "rows", "prompt": "So?", "completion": f"{i} at {step}", "expected": "x", "score": 0.0}
        for step in (0, 9)
        for i in range(3)
    ]
    old, new = lines[:3], lines[3:]
    assert [one["completion"] for one in gather._before(old, new)] == ["0 at 0", "1 at 0", "2 at 0"]
    assert gather._before(old[:1], [{"prompt": "else"}]) == [{}]
