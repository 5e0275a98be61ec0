"""scripts/bench_step.py, tiny: the same command that is for accelerators."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import xla_flags

from ftjax import config as configs
from ftjax.models import onednn
from ftjax.models.families import spec_from_config

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, STEPS = 4, 32, 3


def bench(directory, *words, status=0):
    (directory / "config.json").write_text(json.dumps(TINY))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(2)}
    command = [sys.executable, str(ROOT / "scripts/bench_step.py"), f"--config.model.source={directory}", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr if status else json.loads(done.stdout)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    words = ["--layers=2", f"--batch={ROWS}", f"--length={LENGTH}", f"--steps={STEPS}", "--warmup=1", "--peak=0.5"]
    return bench(tmp_path_factory.mktemp("tiny"), *words)


def test_the_figures_follow_from_the_step_time(result):
    times = result["step_time"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert times["back_to_back"] > 0
    assert result["tokens_per_second_per_device"] == pytest.approx(ROWS * LENGTH / times["median"] / 2)
    assert result["mfu"] == pytest.approx(result["flops_per_step"] / times["median"] / 2 / 0.5e12)


def test_the_flops_are_those_of_the_matrices_counted_by_hand(result):
    """Forward and the gradients of inputs for all, and of weights for adapters; attention over half of the square."""
    width, wide, kv, rank, tokens = 64, 128, 32, 16, ROWS * LENGTH
    shapes = [(width, width), (width, kv), (width, kv), (width, width), (width, wide), (width, wide), (wide, width)]
    base = 2 * sum(rows * columns for rows, columns in shapes) + width * 256
    adapters = 2 * sum(rank * (rows + columns) for rows, columns in shapes)
    assert result["trained"] == adapters
    norms = 2 * 2 * width + width
    assert result["parameters"] == base + 256 * width + norms
    pairs = ROWS * LENGTH * (LENGTH + 1) / 2
    attention = 3 * 2 * 4 * pairs * width
    assert result["flops_per_step"] == 4 * tokens * base + 6 * tokens * adapters + attention


def test_the_step_is_a_training_step_of_an_untrained_model(result):
    assert result["loss"] == pytest.approx(math.log(256), abs=0.2)
    assert result["mesh"] == {"fsdp": 2}
    assert result["hardware"] == {"device": "cpu", "devices": 2, "processes": 1}
    assert result["versions"]["jax"]
    assert result["memory"]["compiled_arguments"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--config.adapter.kind=none"], ["--config.quantize.base=nf4"]], ids=["full", "nf4"])
def test_full_fine_tuning_and_a_quantized_base_are_timed_too(tmp_path, words):
    found = bench(tmp_path, *words, "--layers=1", "--batch=2", "--length=16", "--steps=1", "--warmup=1")
    assert math.isfinite(found["loss"])
    assert (found["trained"] == found["parameters"]) == ("--config.adapter.kind=none" in words)
    assert found["mfu"] is None  # nobody says how fast this processor could be


def test_mistakes_are_told(tmp_path):
    assert "--layers 4: the model has 3" in bench(tmp_path, "--layers=4", status=2)


@pytest.mark.parametrize("matmul", ["xla", onednn.choose("auto", "cpu", 1)[0]])
def test_a_cpus_own_peak_is_measured_of_what_multiplies(matmul):
    script = runpy.run_path(str(ROOT / "scripts/bench_step.py"), run_name="bench_step")
    model = configs.changed(configs.defaults(), {"model.dtype": "float32", "model.matmul": matmul}).model
    peak = script["measured_peak"](spec_from_config(TINY), 4096, model)
    assert 1e7 < peak < 1e15
