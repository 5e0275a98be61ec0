"""What decides which step is best, and the run that ends when nothing gets better: whole runs, and their records."""

import json
import runpy

import pytest
from support.runs import write_run

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.evals.evaluator import Evaluator
from ftjax.train import train
from ftjax.training import metrics, trackers
from ftjax.training.trackers import Tracker


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("early")
    write_run(path)
    return path


def run(root, workdir, **changes):
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    short = {"eval_every": 2, "steps": 10, "log_every": 10}
    config.update_from_flattened_dict(short | {key.replace("__", "."): value for key, value in changes.items()})
    return train(config, workdir)


def measures(patch, values):
    """Evaluations that give this metric at these steps."""
    patch.setattr(Evaluator, "__call__", lambda self, step, *_: {"eval_loss": 9.0, "eval_x/score": values[step]})


def evaluated(workdir):
    return [record["step"] for record in metrics.read(workdir / "metrics.jsonl") if "eval_loss" in record]


def test_killed_where_it_ends_early_a_run_is_finished(root, tmp_path, monkeypatch, capsys):
    measures(monkeypatch, {0: 0.0, 2: 0.2, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.6})
    early = {"evaluate__best": "eval_x/score - 0 * eval_loss", "evaluate__patience": 2, "checkpoint__keep": 1}
    sent, ended = [], []

    def tracker(workdir, known, config):
        assert config["adapter.rank"] == 4
        return Tracker("wandb", "1", lambda step, values: sent.append(step), ended.append)

    monkeypatch.setattr(trackers, "_START", {"wandb": tracker})
    early["trackers"] = ("wandb",)
    with monkeypatch.context() as patch:
        patch.setattr(best, "stalled", lambda config, records: 1 // (len(records) < 5) - 1)  # killed after the fifth
        with pytest.raises(ZeroDivisionError):
            run(root, tmp_path, **early)
    assert evaluated(tmp_path) == [0, 2, 4, 6, 8]
    assert (sent, ended) == ([0, 1, 2, 4, 6, 8], [False])
    capsys.readouterr()
    assert run(root, tmp_path, **early) == 0
    said = capsys.readouterr().out
    assert "This run is finished: 8 steps" in said
    assert "no better eval_x/score - 0 * eval_loss than that of step 4 (0.5) in 2 evaluations" in said
    assert "to go on, raise config.evaluate.patience, or set it to 0" in said
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 8]  # the best and the newest
    assert best.choose(tmp_path, None) == 4


@pytest.mark.slow
def test_left_alone_it_ends_there_as_well_and_goes_on_without(root, tmp_path, monkeypatch, capsys):
    measures(monkeypatch, {0: 0.1, 2: 0.15, 4: 0.2, 6: 0.3, 8: 0.3, 10: 0.4})
    changes = {"evaluate__best": "eval_x/score", "evaluate__patience": 1, "evaluate__min_delta": 0.06}
    assert run(root, tmp_path, **changes) == 0
    assert "step 2: the run ends early, with no better eval_x/score than that of step 0" in capsys.readouterr().out
    assert evaluated(tmp_path) == [0, 2]
    assert run(root, tmp_path) == 0
    assert evaluated(tmp_path) == [0, 2, 4, 6, 8, 10]


def test_a_metric_that_is_not_measured_is_refused_before_step_1(root, tmp_path, monkeypatch):
    measures(monkeypatch, {0: 0.0})
    with pytest.raises(UserError, match="measures no eval_los; did you mean 'eval_loss'"):
        run(root, tmp_path, evaluate__best="eval_los")
    assert not metrics.read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate__patience": 2, "eval_every": 0}, "patience=2 does nothing: .* only at its end; config.eval_every"),
        ({"evaluate__patience": 2, "data__eval": ()}, "patience=2 does nothing: nothing is evaluated"),
        ({"evaluate__best": "eval_loss", "data__eval": ()}, "best='eval_loss' does nothing: nothing is evaluated"),
        ({"evaluate__min_delta": 0.1}, "min_delta=0.1 does nothing: it says what counts as an improvement"),
        ({"evaluate__best": "loss"}, "'loss' is no metric of an evaluation"),
    ],
)
def test_what_decides_nothing_is_refused(root, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        run(root, tmp_path, **changes)
    assert not (tmp_path / "config.json").exists()


# Records alone

NAN = float("nan")


def decided(**changes):
    config = configs.defaults()
    config.data.eval = ("rows.jsonl",)
    config.update_from_flattened_dict({f"evaluate.{key}": value for key, value in changes.items()})
    return config


def of(*losses, mark=None):
    more = {best.SET: mark} if mark else {}
    return [{"step": 2 * i, "eval_loss": loss} | more for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "ends"),
    [
        ((3.0, 2.0, 2.5, 2.5), 2, 0, True),
        ((3.0, 2.0, 2.5, 2.5), 3, 0, False),
        ((3.0, 2.0, 2.5, 1.9), 1, 0, False),  # it went on then, and was better
        ((3.0, 2.96, 2.93), 2, 0.1, True),
        ((3.0, 2.94, 2.88), 2, 0.1, False),  # of the last that counted, not of the best
        ((3.0, NAN, NAN), 2, 0, True),
        ((NAN, 3.0, 2.0), 1, 0, False),
        ((3.0, 4.0), 0, 0, False),
    ],
)
def test_when_a_run_ends(losses, patience, min_delta, ends):
    config = decided(patience=patience, min_delta=float(min_delta))
    assert bool(best.stalled(config, of(*losses))) == ends


def test_only_scores_of_the_newest_evaluation_set_are_compared():
    config = decided(patience=1)
    changed = [*of(1.0, 1.1, mark="a"), {"step": 6, "eval_loss": 5.0, best.SET: "b"}]
    assert best.scores(config, changed) == {6: 5.0}
    assert not best.stalled(config, changed)
    older = [*of(3.0, 2.0), {"step": 6, "eval_loss": 1.0, best.SET: "b"}]  # without a mark: of the run's own set
    assert best.scores(config, older) == {0: 3.0, 2: 2.0, 6: 1.0}
    assert best.scores(decided(best="eval_x/score"), older) == {}


def test_that_a_set_was_changed_is_said(tmp_path):
    records = [*of(1.0, 1.1, mark="a"), {"step": 6, "eval_loss": 5.0, best.SET: "b"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    standing = best.Standing.of(decided(), tmp_path, [2, 6])
    assert standing.best() == 6
    assert best.told(standing, 6) == (
        "using step 6, the best and the latest (eval_loss 5); the scores of step 0 to 2 are of another evaluation set, "
        "and are not compared"
    )
    assert standing.scored(2) == "evaluated on another set"
