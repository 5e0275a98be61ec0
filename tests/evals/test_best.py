"""Which checkpoint is used, and what is said about the others."""

import json

import jax.numpy as jnp
import pytest

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.training.checkpoint import Checkpoints


def write_run(workdir, scores, kept, evaluated="rows.jsonl", metric="eval_loss"):
    """A workdir with these scores, and checkpoints of nothing that matters."""
    config = configs.defaults()
    config.model.source, config.data.train, config.data.eval = "model", ("rows.jsonl",), (evaluated,) * bool(evaluated)
    configs.write(config, workdir / "config.json")
    records = [{"step": 1, "loss": 0.0}, *({"step": step, metric: score} for step, score in scores.items())]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step in kept:
            checkpoints.save(step, {"x": jnp.zeros(1)}, {})


LOSSES = {0: 3.0, 4: 0.5, 8: float("nan"), 14: 0.75}


@pytest.mark.parametrize(
    ("wanted", "step", "said"),
    [
        (None, 4, "using step 4, the best (eval_loss 0.5); the latest is step 14 (eval_loss 0.75): --step latest"),
        ("best", 4, "the best (eval_loss 0.5)"),
        ("latest", 14, "using step 14, the latest (eval_loss 0.75); the best is step 4 (eval_loss 0.5): --step best"),
        (
            "8",
            8,
            "using step 8 (not evaluated); the best is step 4 (eval_loss 0.5): --step best; the latest is step 14",
        ),
    ],
)
def test_the_step_that_is_used_and_how_the_others_score(tmp_path, capsys, wanted, step, said):
    write_run(tmp_path, LOSSES, [4, 8, 14])
    assert best.choose(tmp_path, wanted) == step
    assert said in capsys.readouterr().err


def test_a_score_is_better_the_larger_it_is_and_a_loss_the_smaller(tmp_path, capsys):
    write_run(tmp_path, {4: 0.5, 14: 0.75}, [4, 14], "task:support_ticket", "eval_support_ticket/score")
    assert best.choose(tmp_path, None) == 14
    assert capsys.readouterr().err == "using step 14, the best and the latest (eval_support_ticket/score 0.75)\n"


@pytest.mark.parametrize(
    ("scores", "kept", "said"),
    [
        ({0: 0.1, 4: 0.5}, [4], "; the model before training scored better: eval_loss 0.1\n"),
        ({0: 0.1, 4: 0.5}, [0, 4], "; the model before training scored better: eval_loss 0.1\n"),  # an older run's
        ({2: 0.1, 4: 0.5}, [4], "; step 2, which is not kept, scored better: eval_loss 0.1\n"),
        ({0: 0.5, 4: 0.5}, [4], "using step 4, the best and the latest (eval_loss 0.5)\n"),
    ],
)
def test_what_scored_better_and_is_not_there_is_told(tmp_path, capsys, scores, kept, said):
    write_run(tmp_path, scores, kept)
    assert best.choose(tmp_path, None) == 4
    assert capsys.readouterr().err.endswith(said)


def test_a_run_without_an_evaluation_is_used_as_it_was_last(tmp_path, capsys):
    write_run(tmp_path, {}, [4, 14], evaluated="")
    assert best.choose(tmp_path, None) == 14
    assert capsys.readouterr().err == "using step 14, the latest (not evaluated)\n"
    with pytest.raises(UserError, match=r"--step best: no checkpoint in .* has a score"):
        best.choose(tmp_path, "best")


def test_what_is_no_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="--step newest: it must be best, latest or the number of a step"):
        best.choose(tmp_path, "newest")
    write_run(tmp_path, {}, [])
    with pytest.raises(UserError, match="holds no checkpoint"):
        best.choose(tmp_path, None)
