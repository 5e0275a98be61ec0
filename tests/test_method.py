"""The seam: what a new method needs is a line in the table, an objective and perhaps a source."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.pairs import FRESH, config_of, write_pairs
from support.runs import write_model, write_rows
from support.tiny import one_device

from ftjax import assemble, export, method, resume, train, tree
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.method import METHODS, Method
from ftjax.models import heads
from ftjax.objectives.loss import Loss
from ftjax.objectives.sft import make_sft
from ftjax.training import metrics
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.loop import Cadence, Loop, Records, place_batch, run
from ftjax.training.preemption import Preempted
from ftjax.training.source import Batch
from ftjax.training.state import Kept

RATES = {"lora": 1e-2, "dora": 1e-2, "none": 1e-3}


def make_length_regression(model, config):
    """A head learns to tell each token's position: nothing to be proud of, but it needs a trained head."""

    def objective(variables, batch, rng):
        hidden, _ = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])
        there = (batch["segment_ids"] > 0).astype(jnp.float32)
        errors = heads.values(variables, "value", hidden)[..., 0] - batch["positions"] / 10
        return Loss(jnp.sum(errors**2 * there), there.sum(), {})

    return objective


def make_pulled(model, config):
    """Supervised tuning whose metric is how far the weights are from their moving average, which the method keeps."""
    sft = make_sft(model)

    def objective(variables, batch, rng):
        kept = variables["kept"]
        loss = sft({name: part for name, part in variables.items() if name != "kept"}, batch, rng)
        ours, average = tree.flatten(variables["lora"]), tree.flatten(kept["average"]["lora"])
        distance = sum(jnp.sum((ours[path] - leaf) ** 2) for path, leaf in average.items())
        return loss.replace(metrics={"distance": (distance, jnp.float32(1)), "steps": (kept["steps"], jnp.float32(1))})

    return objective


AVERAGE = Kept(
    init=lambda trainable: {"average": jax.tree.map(jnp.copy, trainable), "steps": jnp.zeros((), jnp.float32)},
    update=lambda kept, before, trainable, metrics: {
        "average": jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, kept["average"], trainable),
        "steps": kept["steps"] + 1,
    },
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    write_pairs(root / "pairs.jsonl", 20)
    return root


@pytest.fixture
def methods(monkeypatch):
    table = METHODS | {
        "length": Method(
            make_length_regression, rows="conversation", learning_rates=RATES, heads=lambda config: {"value": 1}
        ),
        "pulled": Method(make_pulled, rows="conversation", learning_rates=RATES, kept=AVERAGE),
    }
    monkeypatch.setattr(method, "METHODS", table)


def config_for(root, name, **changes):
    rows = {"data.train": (str(root / "rows.jsonl"),), "data.checks": "off", "log_every": 1, "checkpoint_every": 2}
    return config_of(root, **rows, **{"objective.name": name} | changes)


def values_of(variables):
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(variables).items()}


def test_a_head_is_trained_saved_restored_and_no_export_drops_it(root, tmp_path, methods):
    config = config_for(root, "length")
    assert train.train(config, tmp_path / "run") == 0
    losses = [record["loss"] for record in metrics.read(tmp_path / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]
    config, _, variables, step = assemble.load_run(tmp_path / "run")
    assert step == 4
    kernel = np.asarray(variables["heads"]["value"]["kernel"])
    first = heads.init_heads({"value": {"kernel": abstract_of(variables["heads"]["value"]["kernel"])}}, config.seed)
    assert np.abs(kernel - np.asarray(first["value"]["kernel"])).max() > 1e-3
    for format in export.FORMATS:
        out = (tmp_path / "out.gguf", None, "f16")
        exported = functools.partial(export.export_model, tmp_path / "run", None, format, *out)
        if format == "peft":
            exported = functools.partial(export.export_peft, tmp_path / "run", None, tmp_path / "out")
        with pytest.raises(UserError, match=r"this run has a head \(heads/value/kernel\)"):
            exported()
    # The same command goes on from a checkpoint that holds it.
    later = config_for(root, "length", **{"checkpoint.resume_step": 2})
    assert train.train(later, tmp_path / "run") == 0
    assert [record["loss"] for record in metrics.read(tmp_path / "run/metrics.jsonl")] == losses


def abstract_of(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def test_what_a_method_keeps_is_updated_by_the_step_and_comes_back_with_a_resume(root, tmp_path, methods):
    assert train.train(config_for(root, "pulled"), tmp_path / "run") == 0
    records = metrics.read(tmp_path / "run/metrics.jsonl")
    assert [record["steps"] for record in records] == [0, 1, 2, 3]
    assert records[0]["distance"] == 0
    assert records[3]["distance"] > records[1]["distance"] > 0
    assert train.train(config_for(root, "pulled", **{"checkpoint.resume_step": 2}), tmp_path / "run") == 0
    again = metrics.read(tmp_path / "run/metrics.jsonl")
    assert [record["distance"] for record in again] == [record["distance"] for record in records]


class FromTheModel:
    """A source that asks the model: its likeliest next tokens become targets, for `updates` batches of one state."""

    updates = 3

    def __init__(self, program, frozen, loader):
        self._loader, self._made = loader, None
        self.asked = []

        def answers(trainable, batch):
            hidden, _ = program.model.apply(
                tree.combine(trainable, frozen), batch["tokens"], batch["positions"], batch["segment_ids"]
            )
            return program.model.apply(tree.combine(trainable, frozen), hidden, method="unembed").argmax(-1)

        self._answers = jax.jit(answers)

    def batch(self, index, state):
        assert int(state.step) == index  # nothing runs ahead, and no buffer of it is gone yet
        if index % self.updates == 0:
            rollouts = [self._loader.batch(index + k) for k in range(self.updates)]
            for rollout in rollouts:
                rollout["targets"] = np.asarray(self._answers(state.trainable, rollout)).astype(np.int32)
            self._made, self.asked = rollouts, [*self.asked, index]
        arrays = self._made[index % self.updates]
        return Batch(arrays, int((arrays["segment_ids"] > 0).sum()), {"mean_target": float(arrays["targets"].mean())})

    def epoch_at(self, index):
        return float(index)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Preempting:
    """SIGTERM as soon as `step` steps are begun."""

    def __init__(self, at):
        self._checks, self._at = itertools.count(), at

    def check(self):
        if self._at is not None and next(self._checks) >= self._at:
            raise Preempted


def rolled_out(root, workdir, preempt_at=None):
    """Trains 8 steps on batches that the model makes, or goes on with them; what was asked and what was logged."""
    config = config_for(root, "sft", **{"steps": 8})
    base = assemble.open_base(config.model)
    workdir.mkdir(exist_ok=True)
    spec = assemble.data_spec(config, base.model.spec)
    loader, _ = pipeline.load(configs.sources(config, "train"), base.tokenizer, spec)
    mesh = one_device()
    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        program = assemble.program(config, base.model, mesh, config.steps)
        step = checkpoints.latest()
        configs.write(config, workdir / "config.json")
        start = resume.start(
            FRESH._replace(step=step), config, base, program, workdir, checkpoints, loader.fingerprint()
        )
        source = FromTheModel(program, start.frozen, loader)
        writer = metrics.MetricsWriter(workdir, -1 if step is None else step)
        silent = type("Silent", (), {"step": lambda self, step, metrics: None})()
        loop = Loop(
            lambda state, frozen, arrays: program.step(state, frozen, place_batch(mesh, arrays, 1)),
            source,
            None,
            Cadence(config.steps, 1, 2, 0, False),
            Records(checkpoints, writer, silent, {"data": loader.fingerprint()}, lambda *_: False, None),
            Preempting(preempt_at),
        )
        try:
            state = run(loop, start)
        except Preempted:
            state = None
        writer.close()
        return source.asked, state and values_of(state.trainable), checkpoints.steps()


def test_batches_made_by_the_model_use_the_state_and_resume_exactly(root, tmp_path):
    asked, whole, saved = rolled_out(root, tmp_path / "whole")
    assert asked == [0, 3, 6]
    assert saved == [3, 6, 8]  # bounds of rollouts, and the end
    asked, nothing, saved = rolled_out(root, tmp_path / "cut", preempt_at=1)
    assert (asked, nothing, saved) == ([0], None, [3])
    asked, again, saved = rolled_out(root, tmp_path / "cut")
    assert asked == [3, 6]
    assert again.keys() == whole.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    logged = [
        [
            (record["step"], record["loss"], record["mean_target"])
            for record in metrics.read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    ]
    assert logged[0] == logged[1]
