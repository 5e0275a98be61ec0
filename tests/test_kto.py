"""Runs on answers that are called good or bad: what is refused and said before step 1, and whole runs."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.pairs import begun, config_of, write_labeled
from support.runs import command, finish, write_model
from support.tiny import one_device

from ftjax import assemble, choices, inspect_data, preflight
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.evals.evaluator import Evaluator
from ftjax.method import method_of
from ftjax.planning import flops
from ftjax.training import metrics
from ftjax.training.step import make_eval_step


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kto")
    write_model(root / "model")
    write_labeled(root / "rows.jsonl", 60)
    write_labeled(root / "eval.jsonl", 21, seed=5)
    return root


def kto(root, **changes):
    return config_of(root, **{"objective.name": "kto", "data.train": (str(root / "rows.jsonl"),)} | changes)


def loader_of(config):
    base = assemble.open_base(config.model)
    spec = assemble.data_spec(config, base.model.spec)
    return pipeline.load(configs.sources(config, "train"), base.tokenizer, spec)[0]


def write_rows(path, prompts):
    rows = [{"prompt": prompt, "completion": f"answer {i}", "label": i % 2 == 0} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def test_a_batch_in_which_no_completion_meets_another_prompt_is_refused(root):
    plain = loader_of(kto(root))
    preflight.check_partners(plain, plain.batches_in(3))
    alone = loader_of(kto(root, **{"data.packing": False, "data.batch_size": 1}))
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: it is alone in its batch of 1 row\(s\).*batch_size=4"):
        preflight.check_partners(alone, 1)
    # Packed rows may hold one document each, too.
    tight = loader_of(kto(root, **{"data.batch_size": 1}))
    with pytest.raises(UserError, match=r"alone in its batch of 1 row\(s\)"):
        preflight.check_partners(tight, tight.batches_in(1))
    twice = write_rows(root / "twice.jsonl", [f"question {i // 8} of several" for i in range(16)])
    grouped = loader_of(kto(root, **{"data.train": twice, "data.packing": False, "data.batch_size": 2}))
    with pytest.raises(UserError, match=r"twice.jsonl:\d+: all 2 answers of its batch are to this prompt"):
        preflight.check_partners(grouped, grouped.batches_in(3))
    one = loader_of(kto(root, **{"data.train": write_rows(root / "one.jsonl", ["the same"] * 8)}))
    with pytest.raises(UserError, match=r"one.jsonl:\d+: all rows have this prompt"):
        preflight.check_partners(one, 1)
    # The loss without a reference point needs no partner, and has no arrays for it.
    free = kto(root, **{"objective.loss": ("apo_zero_unpaired",), "data.packing": False, "data.batch_size": 1})
    assert not any(name.startswith("mismatched") for name in loader_of(free).batch(0))
    preflight.check_partners(loader_of(free), 1)
    assert not any(name.startswith("mismatched") for name in method_of(free).batch)


def test_a_batch_that_is_chosen_has_several_rows(root):
    base = assemble.open_base(kto(root).model)
    for name, least in (("kto", 4), ("sft", 1)):
        config = config_of(root, **{"objective.name": name, "data.batch_size": 0, "data.packing": False})
        lengths = np.full(6, 20)
        assert choices.by_data(config, base.model.spec, one_device(), lengths, 6).data.batch_size == least


def test_sides_of_different_size_are_told_by_training_and_inspection(root, capsys):
    path = write_labeled(root / "uneven.jsonl", 40)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] or row["prompt"].endswith("5")))
    config, said = kto(root, **{"data.train": (str(path),), "data.max_length": 47}), []
    preflight.check_balance(config, loader_of(config), SimpleNamespace(say=said.append))
    (warning,) = said
    assert "20 answers are called good and 4 bad, which count as 5 : 1" in warning
    assert "--config.objective.undesirable_weight=4.3 makes it so" in warning
    options = {"rows": 24, "source": None, "max_rows": 0, "tokens_per_second": 0.0, "workdir": None, "html": None}
    assert inspect_data.inspect(config, options | {"json": str(root / "found.json")}) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "20 answers are called good and 4 bad" in printed
    assert "uneven.jsonl:1 good:" in printed
    assert re.search(r"uneven.jsonl:\d+ bad:", printed)
    found = json.loads((root / "found.json").read_text())["findings"]
    assert "unbalanced" in {finding["code"] for finding in found}
    preflight.check_balance(kto(root), loader_of(kto(root)), SimpleNamespace(say=said.append))
    assert len(said) == 1


def test_the_program_has_the_arrays_and_the_work_of_the_mismatched_documents(root):
    config = kto(root)
    with jax.set_mesh(one_device()):
        program = assemble.program(config, assemble.open_base(config.model).model, one_device(), 4)
    assert program.batch.keys() == loader_of(config).batch(0).keys()
    plain = {name: leaf for name, leaf in program.batch.items() if not name.startswith("mismatched")}
    alone, whole = flops.of_step(program._replace(batch=plain)), flops.of_step(program)
    assert whole.total - alone.total == pytest.approx(alone.forward + alone.attention + alone.reference)
    assert alone.reference > 0


def test_what_it_has_no_use_for_is_refused(root):
    with pytest.raises(UserError, match=r"objective.label_smoothing: objective.name='kto' does not use it"):
        method_of(kto(root, **{"objective.label_smoothing": 0.1}))
    with pytest.raises(UserError, match=r"objective.desirable_weight: objective.name='dpo' does not use it \(of kto"):
        method_of(config_of(root, **{"objective.desirable_weight": 2.0}))
    (root / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match=r"pairs.jsonl:1: is a row of preference; this needs `prompt`, `completion`"):
        loader_of(kto(root, **{"data.train": (str(root / "pairs.jsonl"),)}))


@pytest.mark.slow
def test_the_held_out_loss_does_not_depend_on_how_its_rows_are_cut_into_batches(root, monkeypatch):
    config = kto(root, **{"data.packing": False})
    program, start, _ = begun(config)
    monkeypatch.setattr(Evaluator, "__init__", lambda self: None)
    moved, base, found = jax.tree.map(lambda leaf: leaf + 0.05, start.state.trainable), None, []
    for rows in (1, 4):
        base, evaluator = assemble.open_base(config.model), Evaluator()
        spec = dataclasses.replace(assemble.data_spec(config, base.model.spec), batch_size=rows)
        entries = [{"source": str(root / "eval.jsonl")}]
        evaluator._loader = pipeline.load_heldout(entries, [], base.tokenizer, spec)
        evaluator._mesh, evaluator._preemption = one_device(), SimpleNamespace(check=lambda: None)
        evaluator._eval_step, evaluator._totals = make_eval_step(program.objective), program.totals
        with jax.set_mesh(one_device()):
            found.append(evaluator._heldout_metrics(moved, start.frozen))
    assert found[0]["eval_loss"] != 0.5
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_run_begins_at_one_half_learns_and_comes_back_with_the_same_bits(root):
    config = kto(root, **{"data.eval": (str(root / "eval.jsonl"),), "steps": 12, "log_every": 1, "eval_every": 6})
    config = configs.changed(config, {"checkpoint_every": 4, "data.checks": "off", "accumulate": 2})
    configs.write(config, root / "run.json")

    def train(*changes):
        finish(command("ftjax.train", "--config", str(root / "run.json"), "--workdir", str(root / "run"), *changes))
        timed = ("step_time", "tokens_per_second", "data_wait")
        found = metrics.read(root / "run/metrics.jsonl")
        records = [{key: value for key, value in record.items() if key not in timed} for record in found]
        return records, jax.tree.map(np.asarray, assemble.load_run(root / "run")[2])

    whole, weights = train()
    first, last = next(record for record in whole if record["step"] == 1), whole[-1]
    assert first["loss"] == whole[0]["eval_loss"] == 0.5
    assert first["kl"] == first["rewards/margins"] == whole[0]["eval_kl"] == 0
    assert last["eval_loss"] < 0.4
    assert last["eval_rewards/margins"] > 0.5
    records, again = train("--config.checkpoint.resume_step=8")
    assert records == whole
    jax.tree.map(np.testing.assert_array_equal, again, weights)
