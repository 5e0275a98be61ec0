"""A reference that is asked once: the same loss as one that is asked in each step, from a file that is no stale one."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.pairs import begun, config_of, write_pairs
from support.runs import write_model
from support.several import finished, started
from support.tiny import one_device

from ftjax import assemble, cached_reference, origin, train, tree
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.objectives.reference import REFERENCE
from ftjax.training import metrics
from ftjax.training.display import Display
from ftjax.training.loop import place_batch
from ftjax.training.preemption import Preempted, Preemption
from ftjax.weights.peft.adapter import write_adapter

ON = {"objective.cache_reference": True}
NEVER = SimpleNamespace(check=lambda: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    write_model(root / "model")
    write_pairs(root / "pairs.jsonl", 24)
    config = config_of(root)
    program, start, _ = begun(config)
    rng = np.random.default_rng(3)
    adapters = tree.flatten(tree.combine(start.state.trainable, start.frozen)["lora"])
    for name, size in {"sft": 0.3, "other": 0.2}.items():
        moved = {
            path: leaf + size * rng.standard_normal(leaf.shape) * path.endswith("lora_b")
            for path, leaf in adapters.items()
        }
        facts = assemble.base_facts(config, assemble.open_base(config.model))
        write_adapter(root / name, tree.unflatten(moved), program.model.spec, facts)
    return root


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/reference"


@pytest.fixture(scope="module")
def plain(root):
    """(config, what it begins with), for tests of fresh adapters that share it."""
    config = config_of(root, **ON)
    return config, begun(config)


def asked(config, fresh, preemption=NEVER):
    """(program, start, loader with the reference's numbers, what was said) of a run. fresh: what `begun` gives."""
    program, start, loader = fresh
    loader.examples = dataclasses.replace(loader.examples, reference_logps=None)
    base = assemble.open_base(config.model)
    contents, display = origin.contents(config, base.reader, base.model.spec), Display(1, quiet=True)
    said = []
    display.say = said.append
    variables = tree.combine(start.state.trainable, start.frozen)
    with jax.set_mesh(one_device()):
        cached_reference.add(config, contents, program, variables, loader, display, preemption)
    return program, start, loader, said


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.source": "sft"},
        pytest.param({"data.packing": False, "data.batch_size": 8, "accumulate": 2}, marks=pytest.mark.slow),
        pytest.param({"adapter.kind": "none"}, marks=pytest.mark.slow),
        pytest.param({"quantize.base": "int8", "objective.weighting": "wpo"}, marks=pytest.mark.slow),
    ],
    ids=["gone on from, packed", "padded, accumulated", "full", "int8, WPO"],
)
def test_loss_and_gradients_are_those_of_a_reference_that_is_asked_in_each_step(changes, root, record_figure):
    if "adapter.source" in changes:
        changes = {"adapter.source": str(root / "sft")}
    config = config_of(root, **ON, **changes)
    program, start, loader, _ = asked(config, begun(config))
    other, beside, plain = begun(config_of(root, **changes))
    assert REFERENCE not in program.frozen
    assert REFERENCE not in start.frozen
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32), start.state.trainable
    )

    def measured(program, frozen, loader, trainable):
        accumulate = program.batch["tokens"].shape[0]
        with jax.set_mesh(one_device()):
            batch = {name: its[0] for name, its in place_batch(one_device(), loader.batch(0), accumulate).items()}
            assert {name: its.dtype for name, its in program.batch.items()} == {k: v.dtype for k, v in batch.items()}
            run = jax.jit(
                jax.value_and_grad(
                    lambda t: (lambda loss: (loss.sum, loss))(program.objective(tree.combine(t, frozen), batch, None)),
                    has_aux=True,
                )
            )
            (_, loss), gradients = run(trainable)
        return jax.device_get(loss), gradients

    ours, our_gradients = measured(program, start.frozen, loader, trainable)
    theirs, their_gradients = measured(other, beside.frozen, plain, trainable)
    assert ours.weight == theirs.weight >= 3
    record_figure("loss, relative", abs(float(ours.sum / theirs.sum) - 1))
    np.testing.assert_allclose(ours.sum, theirs.sum, rtol=1e-6)
    assert abs(float(theirs.metrics["rewards/margins"][0])) > 0.01
    for name, (value, _) in ours.metrics.items():
        np.testing.assert_allclose(value, theirs.metrics[name][0], rtol=1e-5, atol=1e-5, err_msg=name)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(their_gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest, rtol=1e-4), our_gradients, their_gradients
    )


def test_each_document_has_its_number_at_its_last_token_whatever_the_batches(plain):
    _, _, loader, _ = asked(*plain)
    numbers = loader.examples.reference_logps
    assert numbers.shape == (24, 2)
    assert (numbers < -1).all()
    batch, seen = loader.batch(3), 0
    for tokens, segments, values in zip(batch["tokens"], batch["segment_ids"], batch["reference_logps"]):
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            side = (segment - 1) % 2
            (index,) = [
                i for i in range(24)
                if np.array_equal(loader.examples.documents_of(i)[side].tokens, tokens[here])
            ]  # fmt: skip
            assert values[here[-1]] == numbers[index, side]
            assert not values[here[:-1]].any()
            seen += 1
    assert seen >= 8
    assert not batch["reference_logps"][batch["segment_ids"] == 0].any()
    fingerprint, alone = loader.fingerprint(), loader.batch(3, rows=[1])
    np.testing.assert_array_equal(alone["reference_logps"][1], batch["reference_logps"][1])
    loader.examples = dataclasses.replace(loader.examples, reference_logps=None)
    assert loader.fingerprint() == fingerprint
    assert "reference_logps" not in loader.batch(3)


def test_it_is_computed_again_for_another_adapter_base_data_or_cut_and_only_then(root, kept, tmp_path):
    write_model(tmp_path / "other", rms_norm_eps=1e-3)
    write_pairs(tmp_path / "pairs.jsonl", 24, seed=1)

    def file_of(**changes):
        config = config_of(root, **ON, **changes)
        base = assemble.open_base(config.model, config.data)
        spec = assemble.data_spec(config, base.model.spec)
        loader, _ = pipeline.load(configs.sources(config, "train"), base.tokenizer, spec)
        contents = origin.contents(config, base.reader, base.model.spec)
        longest.append(loader.examples.document_lengths.max())
        return cached_reference.file_of(config, contents, loader.examples, "cpu").name

    longest = []
    plain = file_of()
    same = (
        {"data.max_length": 64},  # which cuts no row either
        {"data.batch_size": 8, "data.packing": False, "accumulate": 2},
        {"objective.beta": 0.3, "optimizer.learning_rate": 1e-3, "seed": 7, "adapter.rank": 8},
        {"adapter.kind": "none"},
    )
    for changes in same:
        assert file_of(**changes) == plain, changes
    others = (
        {"adapter.source": str(root / "sft")},
        {"adapter.source": str(root / "other")},
        {"model.source": str(tmp_path / "other")},
        {"data.train": (str(tmp_path / "pairs.jsonl"),)},
        {"data.chat_template": "zephyr"},
        {"data.max_length": int(longest[0]) - 1},
        {"model.dtype": "bfloat16"},
        {"quantize.base": "int8"},
        {"adapter.init": "pissa"},
    )
    names = [file_of(**changes) for changes in others]
    assert len({plain, *names}) == 1 + len(others)


def test_a_damaged_file_is_made_again_and_what_was_done_before_a_stop_is_kept(plain, kept, monkeypatch, caplog):
    batches = []
    monkeypatch.setattr(
        cached_reference, "_sums", lambda *its, sums=cached_reference._sums: batches.append(1) or sums(*its)
    )

    class Stopping:
        checks = 0

        def check(self):
            self.checks += 1
            if self.checks == 2:
                raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        asked(*plain, Stopping())
    assert len(batches) == 1
    _, _, loader, said = asked(*plain)
    whole = loader.examples.reference_logps
    assert re.fullmatch(r"computing .* of 24 pairs, of which \d+ are missing", said[0])
    assert not np.isnan(whole).any()
    done = len(batches)

    _, _, loader, said = asked(*plain)
    (file,) = kept.iterdir()
    assert said == [f"the reference's log-probabilities of 24 pairs are those of {file}"]
    np.testing.assert_array_equal(loader.examples.reference_logps, whole)
    assert len(batches) == done

    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with caplog.at_level("WARNING"):
        _, _, loader, said = asked(*plain)
    assert f"{file} is damaged; it is made again" in caplog.text
    np.testing.assert_array_equal(loader.examples.reference_logps, whole)
    assert len(batches) == 2 * done


def test_a_reference_without_a_finite_number_names_the_row(plain, root, monkeypatch):
    monkeypatch.setattr(cached_reference, "_sums", lambda model, variables, batch: np.full((4, 24, 2), -np.inf))
    with pytest.raises(
        UserError, match=rf"{root}/pairs.jsonl:1: the reference gives its answers .*-inf.*; remove the row"
    ):
        asked(*plain)


@pytest.mark.slow
def test_a_run_starts_at_margin_0_and_resumes_bit_for_bit(root, tmp_path, kept, capsys):
    """From an adapter; with rows held out. Of a reference that is asked in each step it is the same run to rounding."""
    cadence = {"log_every": 1, "checkpoint_every": 2, "data.checks": "off", "data.holdout": 0.25}
    changes = cadence | {"adapter.source": str(root / "sft")}
    assert train.train(config_of(root, **ON, **changes), tmp_path / "run") == 0
    assert "asked once, before the first step" in capsys.readouterr().out
    assert len(list(kept.iterdir())) == 2  # training and held-out rows
    whole = records(tmp_path / "run")
    assert abs(whole[0]["eval_rewards/margins"]) < 1e-5
    assert abs(whole[1]["rewards/margins"]) < 1e-5
    assert whole[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert whole[1]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    again = config_of(root, **ON, **changes, **{"checkpoint.resume_step": 2})
    assert train.train(again, tmp_path / "run") == 0
    assert records(tmp_path / "run") == whole
    assert "are those of" in capsys.readouterr().out

    assert train.train(config_of(root, **changes), tmp_path / "plain") == 0
    for ours, theirs in zip(whole, records(tmp_path / "plain"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "rewards/margins", "logps/chosen", "eval_loss", "eval_rewards/margins"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


def records(workdir):
    timed = ("step_time", "tokens_per_second", "data_wait")
    return [{k: v for k, v in one.items() if k not in timed} for one in metrics.read(workdir / "metrics.jsonl")]


@pytest.mark.slow
def test_a_step_makes_no_forward_pass_of_the_reference(root, record_figure):
    """FLOPs of the compiled step, of adapters: 2 passes of 3; the frozen kernels' own gradients are not needed."""
    flops = {}
    for name, changes in {"asked in each step": {}, "asked once": ON}.items():
        program, _, _ = begun(config_of(root, **changes, **{"adapter.source": str(root / "sft")}))
        with jax.set_mesh(one_device()):
            compiled = program.step.lower(program.state, program.frozen, program.batch).compile()
        flops[name] = compiled.cost_analysis()["flops"]
    record_figure("FLOPs of a step", share := flops["asked once"] / flops["asked in each step"])
    assert share < 0.75


def test_methods_without_a_reference_refuse_it(root):
    with pytest.raises(UserError, match=r"cache_reference: objective.name='orpo' does not use it \(of dpo\)"):
        begun(config_of(root, **ON, **{"objective.name": "orpo"}))


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_asks_ends_with_75_and_goes_on_there(root, tmp_path, kept, monkeypatch, capsys):
    config, checks = config_of(root, **ON, **{"data.checks": "off"}), []

    def check(self):
        checks.append(1)
        if len(checks) == 2:
            raise Preempted("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "check", check)
        assert train.train(config, tmp_path / "run") == 75
    assert "nothing is trained yet; the same command begins again" in capsys.readouterr().out
    assert len(list(kept.iterdir())) == 1
    assert train.train(config, tmp_path / "run") == 0
    assert "are missing" in capsys.readouterr().out
    assert records(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.slow
def test_several_processes_ask_together_and_train_as_one(root, tmp_path, kept, record_figure):
    found = {}
    for count in (1, 2):
        config, workdir = config_of(root, **ON, **{"mesh.fsdp": count, "log_every": 1}), tmp_path / str(count)
        configs.write(config, tmp_path / f"{count}.json")
        printed = []
        for again in (False, True) if count == 2 else (False,):
            arguments = [f"--config={tmp_path / f'{count}.json'}", f"--workdir={workdir}{again}"]
            with started(count, "ftjax.train", *arguments) as processes:
                printed.append(finished(processes)[0])
        found[count] = records(tmp_path / f"{count}False")
        for file in kept.iterdir() if count == 1 else ():
            file.unlink()
    assert "are those of" not in printed[0]
    assert "are those of" in printed[1]
    assert records(tmp_path / "2True") == found[2]
    for ours, theirs in zip(found[2], found[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    record_figure("loss, relative", abs(found[2][-1]["loss"] / found[1][-1]["loss"] - 1))
