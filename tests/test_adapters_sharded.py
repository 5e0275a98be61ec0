"""Runs with every kind of adapter have on meshes of eight virtual devices the loss and gradients of one (float32)."""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags


def run(*names):
    # Compiling is nearly all of the time, and what is compared does not depend on how hard LLVM tries.
    flags = xla_flags(8, "--xla_backend_optimization_level=0")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "error", str(SUPPORT / "adapters_sharded_run.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(out, record_figure, *split):
    """`split`: paths that fsdp and tensor split between them."""
    for name, meshes in out.items():
        for mesh, found in meshes.items():
            for figure in ("start", "loss", "gradient"):
                record_figure(f"{name}, {mesh}: {figure}", found[figure])
            assert found["start"] < 1e-5, (name, mesh)
            assert found["loss"] < 1e-6, (name, mesh)
            assert found["gradient"] < 1e-5, (name, mesh)
            assert found["astray"] == [], (name, mesh)
        assert set(split) <= set(meshes["fsdp=4 x tensor=2"]["split"])


LAYER = "lora/layers/self_attn/q_proj/lora"


def test_dora_and_its_dropout(record_figure):
    """The masks of dropout are those of one device, too."""
    check(run("dora with dropout"), record_figure, f"{LAYER}_a", f"{LAYER}_b", f"{LAYER}_magnitude")


@pytest.mark.slow
def test_an_embedding_and_modules_to_save(record_figure):
    split = ("lora/embed_tokens/lora_a", "lora/embed_tokens/lora_b", "params/lm_head/kernel")
    check(run("embedding and modules_to_save"), record_figure, *split)


@pytest.mark.slow
def test_pissa(record_figure):
    check(run("pissa"), record_figure, f"{LAYER}_a", f"{LAYER}_b", f"{LAYER}_a0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral, experts", "gpt_oss, experts"])
def test_experts(record_figure, name):
    out = run(name)
    check(out, record_figure)
    experts = {path for path in out[name]["data=2 x fsdp=2 x expert=2"]["split"] if "/experts/" in path}
    assert "lora/layers/mlp/experts/down_proj/lora_scale" in experts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int8, dora", "nf4", "nf4, experts"])
def test_a_quantized_base(record_figure, name):
    out = run(name)
    check(out, record_figure)
    assert any(path.startswith("quant/") for path in out[name]["fsdp=4 x tensor=2"]["split"])
