"""A run whose products oneDNN makes (config.model.matmul), and what becomes of it where there is no oneDNN."""

import json
import runpy

import numpy as np
import pytest
from support.runs import write_rows, write_run
from support.tiny import batch_of, logits

from ftjax import assemble
from ftjax.errors import UserError
from ftjax.export import export_model
from ftjax.models import onednn
from ftjax.train import train
from ftjax.training import metrics

multiplies = pytest.mark.skipif(bool(onednn.lacks()), reason=onednn.lacks())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("matmul")
    write_run(path)
    write_rows(path / "train.jsonl", 40)
    return path


def run(root, name, matmul, **changes):
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.model.matmul, config.steps = matmul, 6
    config.update_from_flattened_dict(changes)
    assert train(config, root / name) == 0
    return [record["loss"] for record in metrics.read(root / name / "metrics.jsonl") if "loss" in record]


def answers(workdir):
    """Logits of a text under the run's last checkpoint, and what multiplied for them."""
    _, base, variables, _ = assemble.load_run(workdir)
    tokens = np.asarray(base.tokenizer.encode("<|im_start|>user\nThe red lamp is broken<|im_end|>\n"), np.int32)
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    return logits(base.model, variables, batch), base.model.matmul


WHOLE = {"adapter.kind": "none", "adapter.rank": 16, "optimizer.learning_rate": 3e-3}


@multiplies
@pytest.mark.parametrize("changes", [{}, WHOLE, {"quantize.base": "int8"}, {"model.remat": "full"}])
def test_a_run_learns_as_in_float32(root, capsys, changes, record_figure):
    name = "-".join(["run", *map(str, changes.values())])
    ours, exact = run(root, f"{name}-onednn", "auto", **changes), run(root, f"{name}-xla", "xla", **changes)
    assert json.loads((root / f"{name}-onednn/config.json").read_text())["model"]["matmul"] == "onednn"
    assert f"in float32, multiplied in {onednn.operands()} by oneDNN" in " ".join(capsys.readouterr().out.split())
    record_figure("loss of one step", abs(ours[0] / exact[0] - 1))
    record_figure("loss of the last", abs(ours[-1] / exact[-1] - 1))
    assert ours != exact
    assert ours[0] != exact[0] or onednn.operands() == "float32"
    assert ours[0] == pytest.approx(exact[0], rel=0.01)
    assert ours[-1] < 0.8 * ours[0]
    assert ours[-1] == pytest.approx(exact[-1], rel=0.1)


@multiplies
def test_where_there_is_no_onednn_the_run_is_used_and_goes_on_without(root, monkeypatch, record_figure):
    run(root, "moved", "onednn")
    found, how = answers(root / "moved")
    assert how == "onednn"
    monkeypatch.setattr(onednn, "lacks", lambda: "there is none")
    elsewhere, how = answers(root / "moved")
    assert how == "xla"
    record_figure("logits", np.abs(found - elsewhere).max())
    np.testing.assert_allclose(found, elsewhere, rtol=0, atol=0.15)
    assert export_model(root / "moved", None, "hf", root / "out", "float32", "f16") == 6
    assert json.loads((root / "out/parity.json").read_text())["max_abs_logit_difference"] < 1e-3
    assert len(run(root, "moved", "xla", steps=8)) == 8


def test_a_run_that_takes_what_there_is_says_why_it_is_not_onednn(root, monkeypatch, capsys):
    monkeypatch.setattr(onednn, "lacks", lambda: "there is no compiler")
    run(root, "without", "auto")
    assert "in float32, multiplied by XLA: there is no compiler" in " ".join(capsys.readouterr().out.split())
    assert json.loads((root / "without/config.json").read_text())["model"]["matmul"] == "xla"
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.model.matmul = "onednn"
    with pytest.raises(UserError, match=r"config\.model\.matmul='onednn': there is no compiler; 'auto' takes it only"):
        train(config, root / "refused")
