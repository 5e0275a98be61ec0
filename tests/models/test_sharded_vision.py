"""Models with images have on meshes of eight virtual devices the loss and gradients of one, adapters included."""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags
from support.vision import CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_meshes_change_nothing(name, record_figure):
    # Compiling is nearly all of the time, and what is compared does not depend on how hard LLVM tries.
    flags = xla_flags(8, "--xla_backend_optimization_level=0")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "error", str(SUPPORT / "vision_sharded_run.py"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    for mesh, found in json.loads(done.stdout)[name].items():
        record_figure(f"{mesh}: loss, relative", found["loss"])
        record_figure(f"{mesh}: gradients", found["gradient"])
        assert found["loss"] < 1e-6, mesh
        assert found["gradient"] < 1e-5, mesh
        assert "lora/vision/layers/mlp/up_proj/lora_a" in found["split"]
        assert "params/vision/layers/mlp/up_proj/kernel" in found["split"]
