"""Every family has on meshes of eight virtual devices the loss and gradients of one, adapters included (float32)."""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags
from support.family_configs import CONFIGS


def run(*names, flags=""):
    flags = xla_flags(8, flags)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "error", str(SUPPORT / "model_sharded_run.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(out, record_figure):
    for name, meshes in out.items():
        for mesh, found in meshes.items():
            record_figure(f"{name}, {mesh}: loss, relative", found["loss"])
            record_figure(f"{name}, {mesh}: gradients", found["gradient"])
            assert found["loss"] < 1e-6, (name, mesh)
            assert found["gradient"] < 1e-5, (name, mesh)
            assert any("lora_a" in path for path in found["split"])


def test_a_mixture_and_fused_projections(record_figure):
    # Compiling is nearly all of the time, and what is compared does not depend on how hard LLVM tries.
    out = run("mixtral", "phi3", flags="--xla_backend_optimization_level=0")
    check(out, record_figure)
    assert "params/layers/mlp/experts/up_proj/kernel" in out["mixtral"]["data=2 x fsdp=2 x expert=2"]["split"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_what_evens_out_experts_is_that_of_all_devices(name, record_figure):
    check(run(f"balanced {name}", flags="--xla_backend_optimization_level=0"), record_figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, record_figure):
    check(run(name, flags="--xla_backend_optimization_level=0"), record_figure)
