"""Preference runs end to end: the same commands, loop, checkpoints and exports as any other method."""

import dataclasses
import json
import math
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.pairs import begun, config_of, write_pairs
from support.runs import command, finish, signal_at_step, write_model
from support.tiny import one_device

from ftjax import assemble, inspect_data, tree
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals.evaluator import Evaluator
from ftjax.inspection.survey import survey
from ftjax.training import metrics
from ftjax.training.loop import place_batch
from ftjax.training.step import make_eval_step

FILES = ("workdir", "html", "json")
CONFIG = """
from ftjax import config as configs

def get_config():
    config = configs.defaults()
    config.model.source = {model!r}
    config.model.dtype = config.model.param_dtype = "float32"
    config.adapter.rank = 4
    config.data.train = ({train!r},)
    config.data.holdout = 0.2
    config.data.max_length = 48
    config.data.batch_size = 4
    config.objective.name = "dpo"
    config.mesh.fsdp = 1
    config.optimizer.learning_rate = 1e-2
    config.steps = 12
    config.log_every = 1
    config.eval_every = 6
    config.checkpoint_every = 4
    return config
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("dpo")
    write_model(root / "model")
    write_pairs(root / "pairs.jsonl", 60)
    (root / "run.py").write_text(CONFIG.format(model=str(root / "model"), train=str(root / "pairs.jsonl")))
    return root


def train(root, name, *changes):
    return command("ftjax.train", "--config", str(root / "run.py"), "--workdir", str(root / name), *changes)


def records_of(workdir):
    timed = ("step_time", "tokens_per_second", "data_wait")
    return [{k: v for k, v in record.items() if k not in timed} for record in metrics.read(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(root):
    printed = finish(train(root, "run"))
    return root / "run", printed


def test_it_starts_at_ln_2_and_learns_what_is_preferred(run):
    workdir, printed = run
    records = records_of(workdir)
    first = next(record for record in records if record.get("step") == 1)
    general = [{name: its[name] for name in its if name.startswith("eval_general/")} for its in records]
    before, *_, after = filter(None, general)
    assert before["eval_general/change"] == before["eval_general/kl"] == 0
    assert after["eval_general/change"] == pytest.approx(after["eval_general/loss"] - before["eval_general/loss"])
    assert after["eval_general/kl"] > 0
    last = records[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0
    assert {"logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "grad_norm"} <= first.keys()
    assert last["eval_loss"] < 0.6
    assert last["eval_rewards/accuracies"] > 0.8
    assert "reference    the base, without its adapter" in printed
    assert "4 rows of 96 tokens" in printed  # two documents of 48


def test_inspection_shows_pairs_as_training_sees_them(root, capsys):
    """Both answers, rows of two documents, and what would stop the run."""
    options = {"rows": 1, "source": None, "max_rows": 0, "tokens_per_second": 0.0} | dict.fromkeys(FILES)
    assert inspect_data.inspect(config_of(root), options) == 0
    printed = capsys.readouterr().out
    assert "pairs.jsonl:1 chosen:" in printed
    assert "pairs.jsonl:1 rejected:" in printed
    assert "rows of up to 96" in printed
    assert inspect_data.inspect(config_of(root, **{"data.max_length": 25}), options) == 2
    assert "has no token of its answer within data.max_length" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["train", "eval"])
def test_inspection_refuses_and_skips_the_pairs_that_training_does(root, side):
    """Pairs that the cut makes equal: an error, or skipped where max_bad_rows allows, in the rows of either side."""
    good = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    same = [{"prompt": f"Question {i}", "chosen": "yes " * 60 + "a", "rejected": "yes " * 60 + "b"} for i in range(3)]
    (root / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, *same]))
    others = [row | {"prompt": f"More {i}"} for i, row in enumerate(same)]
    (root / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    rows = {"data.train": (str(root / "pairs.jsonl"),), "data.eval": (str(root / "few.jsonl"),)}
    config = config_of(root, **(rows if side == "eval" else {"data.train": (str(root / "mixed.jsonl"),)}))
    base = assemble.open_base(config.model)

    def survey_of(max_bad_rows):
        spec = dataclasses.replace(assemble.data_spec(config, base.model.spec), max_bad_rows=max_bad_rows)
        sides = [configs.sources(config, which) for which in ("train", "eval")]
        train, *heldout = [read_sources(entries, max_bad_rows) for entries in sides if entries]
        return survey(train, heldout, base.tokenizer, base.end_tokens, spec)

    strict, lenient = survey_of(0), survey_of(5)
    refused = next(finding for finding in strict.findings if finding.code == "refused")
    assert refused.count == 3
    assert "the same within data.max_length" in refused.message
    assert strict.failed()
    assert next(finding for finding in lenient.findings if finding.code == "skipped").count == 3
    assert "refused" not in {finding.code for finding in lenient.findings}
    if side == "train":  # pairs are counted, not documents, and those that are refused are not
        assert (strict.tokenized, strict.truncated, strict.used) == (60, 0, 60)


@pytest.mark.slow  # quickly in test_reference.py, and for other methods in test_train.py
def test_killed_and_resumed_it_ends_with_the_same_bits_and_metrics(root, run):
    process = train(root, "killed")
    signal_at_step(process, root / "killed", 6, signal.SIGKILL)
    process.communicate()
    finish(train(root, "killed"))
    assert records_of(root / "killed") == records_of(run[0])
    ours, theirs = (assemble.load_run(root / name)[2] for name in ("killed", "run"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_the_adapter_is_exported_and_the_run_is_used_like_any_other(root, run):
    workdir, _ = run
    finish(command("ftjax.export", "--workdir", str(workdir), "--format", "peft", "--out", str(root / "adapter")))
    assert json.loads((root / "adapter/adapter_config.json").read_text())["r"] == 4
    assert "dpo" in (root / "adapter/README.md").read_text()
    finish(command("ftjax.generate", "--workdir", str(workdir), "--prompt", "The red lamp", "--max_new_tokens=4"))


def test_padding_gives_the_loss_of_packing(root):
    """One pair to a row, or several: the same pairs weigh the same."""
    losses = []
    for packing in (True, False):
        config = config_of(root, **{"data.packing": packing, "data.batch_size": 4 if packing else 48})
        program, start, loader = begun(config)
        # An epoch of either holds every pair once; padding adds rows without any.
        total = np.zeros(2)
        objective = jax.jit(lambda variables, batch: program.objective(variables, batch, None))  # noqa: B023
        moved = jax.tree.map(lambda leaf: leaf + 0.05, start.state.trainable)
        with jax.set_mesh(one_device()):
            for batch in eval_batches(loader):
                loss = objective(tree.combine(moved, start.frozen), place(batch))
                total += float(loss.sum), float(loss.weight)
        losses.append(total)
    assert losses[0][1] == losses[1][1] == 60
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-6)


def eval_batches(loader):
    loader.shuffle = False
    return loader.eval_batches()


def place(batch):
    return {key: value[0] for key, value in place_batch(one_device(), batch, 1).items()}


def test_what_a_method_has_no_use_for_is_refused(root):
    with pytest.raises(UserError, match=r"objective.beta: objective.name='sft' does not use it \(of dpo, kto, cpo, "):
        begun(config_of(root, **{"objective.name": "sft", "objective.beta": 0.2}))
    with pytest.raises(UserError, match=r"data.train_on: objective.name='dpo' does not use it"):
        begun(config_of(root, **{"data.train_on": "all"}))
    with pytest.raises(UserError, match=r"objective.name='dop' is no method; did you mean 'dpo'"):
        begun(config_of(root, **{"objective.name": "dop"}))
    with pytest.raises(UserError, match=r"pairs.jsonl:1: is a preference pair, which this objective does not train on"):
        begun(config_of(root, **{"objective.name": "sft"}))
    (root / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"chats.jsonl:1: is a row of prompt_completion; a preference needs"):
        begun(config_of(root, **{"data.train": (str(root / "chats.jsonl"),)}))


def test_a_reference_that_moves_follows_the_policy_and_is_in_the_checkpoint(root, tmp_path):
    changes = {"objective.reference_every": 2, "objective.reference_share": 0.25, "adapter.kind": "dora", "steps": 4}
    program, start, loader = begun(config_of(root, **changes))
    state, expected = start.state, flat(start.state.trainable)
    with jax.set_mesh(one_device()):
        for number in range(4):
            batch = place_batch(one_device(), loader.batch(number), 1)
            state, step_metrics = program.step(state, start.frozen, batch)
            if number % 2 == 1:
                now = flat(state.trainable)
                expected = {path: 0.75 * expected[path] + 0.25 * now[path] for path in expected}
            found = flat(state.kept["moving_reference"])
            assert found.keys() == expected.keys()
            for path in expected:
                np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-7, err_msg=path)
            if number == 0:
                assert float(step_metrics["rewards/margins"]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(UserError, match=r"reference_share is of a reference that moves; set objective.reference_every"):
        begun(config_of(root, **{"objective.reference_share": 0.5}))


def flat(trained):
    return {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(trained).items()}


def test_the_held_out_loss_of_a_mixture_does_not_depend_on_how_its_rows_are_cut_into_batches(root, monkeypatch):
    config = config_of(root, **{"objective.loss": ("sigmoid", ("sft", 0.5))})
    program, start, _ = begun(config)
    monkeypatch.setattr(Evaluator, "__init__", lambda self: None)
    base = assemble.open_base(config.model)
    found = []
    for rows in (1, 4):
        evaluator = Evaluator()
        spec = dataclasses.replace(assemble.data_spec(config, base.model.spec), batch_size=rows)
        evaluator._loader = pipeline.load_heldout(configs.sources(config, "train"), [], base.tokenizer, spec)
        evaluator._mesh, evaluator._preemption = one_device(), SimpleNamespace(check=lambda: None)
        evaluator._eval_step, evaluator._totals = make_eval_step(program.objective), program.totals
        with jax.set_mesh(one_device()):
            found.append(evaluator._heldout_metrics(start.state.trainable, start.frozen))
    assert found[0]["eval_loss"] > 1  # the cross-entropy is in it
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)
