"""The loss and its gradients where tokens, the model's width and the vocabulary are split, against the whole logits."""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags


@pytest.fixture(scope="module")
def found():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
        "XLA_FLAGS": xla_flags(8),
    }
    script = SUPPORT / "head_sharded_run.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_mesh_gives_the_same_loss_and_gradients(found, record_figure):
    assert found["largest"] > 1, "there is something to compare"
    meshes = {name: errors for name, errors in found.items() if name not in ("largest", "dropping", "kl", "squares")}
    assert len(meshes) == 7
    for mesh, errors in meshes.items():
        assert errors["loss"] < 1e-6, mesh
        assert errors["correct"] < 1e-5, mesh
        assert max(errors["gradients"].values()) < 2e-5, (mesh, errors)
    record_figure("largest error of a gradient", max(max(one["gradients"].values()) for one in meshes.values()))


def test_what_the_adapter_of_the_head_drops_depends_on_neither_mesh_nor_cut(found):
    dropping = found["dropping"]
    assert len(dropping) == 9, "four meshes, each in two cuts, and whole logits on one device"
    loss, _ = dropping["whole"]
    for where, (its, error) in dropping.items():
        assert abs(its / loss - 1) < 1e-6, where
        assert error < 2e-5, where


def test_so_has_the_kl_to_a_reference(found):
    errors = dict(found["kl"])
    assert errors.pop("largest") > 0.1
    assert len(errors) == 3
    for mesh, (of_value, of_gradients) in errors.items():
        assert of_value < 1e-6, mesh
        assert of_gradients < 2e-5, mesh


def test_so_has_the_sum_of_squared_probabilities(found):
    assert len(found["squares"]) == 2
    assert max(found["squares"].values()) < 1e-5
