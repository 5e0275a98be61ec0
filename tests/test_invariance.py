"""Loss and trained parameters do not depend on how the work is split or saved (8 virtual devices, float32).

The mesh, accumulation, packing and what the backward pass recomputes change nothing but rounding.
"""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags

from ftjax.training.optim import OPTIMIZERS


def run(cases, *flags, limit=600):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8, *flags), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "error", str(SUPPORT / "invariance_run.py"), cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick():
    # Compiling is nearly all of the time, and what is compared here does not depend on how hard LLVM tries.
    return run("quick", "--xla_backend_optimization_level=0")


def check_invariance(out, record_figure, bound=1e-6):
    assert out.pop("same random parameters")
    assert out.pop("same head")
    assert out.pop("head") == ["fsdp", None]
    out.pop("optimizers")  # below
    for name, case in out.items():
        record_figure(f"{name}: loss, relative", case["loss difference"])
        record_figure(f"{name}: parameters", case["parameter difference"])
        assert case["same start"], name
        assert len(case["losses"]) == 20
        assert case["reward difference"] < 1e-5, name
        assert max(case["losses"]) - min(case["losses"]) > 0.01, "the batches differ"
        least = 1e-4 if ", none, " in name else 1e-3  # about the sum of the 20 learning rates
        assert min(case["movement"].values()) > least / 2, "every parameter is trained"
    worst_loss = max(case["loss difference"] for case in out.values())
    worst_parameter = max(case["parameter difference"] for case in out.values())
    assert worst_loss < bound, {name: case["loss difference"] for name, case in out.items()}
    record_figure("worst loss", worst_loss)
    record_figure("worst parameter", worst_parameter)
    assert worst_parameter < 1e-5, {name: case["parameter difference"] for name, case in out.items()}


def test_twenty_steps_are_the_same_however_they_are_split(quick, record_figure):
    assert len(quick) == 18
    check_invariance(dict(quick), record_figure)


@pytest.mark.slow  # in one process, however a step is split, in tests/objectives/test_unpaired.py
def test_twenty_steps_on_labeled_answers_are_the_same_however_they_are_split(record_figure):
    """The reference point of KTO is of the whole step: not of a micro-batch, or of a device."""
    check_invariance(run("labeled", "--xla_backend_optimization_level=0"), record_figure)


@pytest.mark.slow
def test_twenty_steps_on_completions_are_the_same_however_they_are_split(record_figure):
    # Its loss is made of exponentials: an error of log p, in float32 some 5e-7, is a relative one of the loss.
    check_invariance(run("rolled out", "--xla_backend_optimization_level=0"), record_figure, bound=4e-6)


@pytest.mark.slow
def test_every_combination_of_mesh_accumulation_and_packing(record_figure):
    out = run("full", "--xla_backend_optimization_level=0", limit=7200)
    assert len(out) == 4 + (11 + 5) * 3 * 2 + (11 + 5) * 2 + 3 * 11
    check_invariance(out, record_figure)


def cases(quick):
    return {name: case for name, case in quick.items() if isinstance(case, dict)}


def test_one_compilation_donated_state_untouched_base(quick):
    for name, case in cases(quick).items():
        assert case["compilations"] == 1, name
        assert case["old buffers deleted"], name
        assert case["state where planned"], name
        assert case["base unchanged"], name


def test_moments_are_sharded_like_their_parameters(quick):
    for case in cases(quick).values():
        assert case["trainable"].keys() == case["first moments"].keys()
        assert case["first moments"] == case["trainable"]
        assert case["second moments"] == case["trainable"]


def test_every_optimizer_does_the_same_on_a_mesh_with_moments_sharded_like_their_parameters(quick):
    """Adafactor's means over rows and columns are whole everywhere, and nothing larger is."""
    found = {name: counts for name, *counts in quick["optimizers"]}
    assert found.keys() == OPTIMIZERS.keys()
    for name, (difference, follow, _, largest_whole) in found.items():
        assert difference < 1e-6, name
        assert follow, name
        assert largest_whole < 200, name
    # Trained are 21 matrices of layers, the embedding and three norms.
    moments = {"adamw": 2 * 25, "adafactor": 3, "lion": 25, "muon": 21 + 2 * 4}
    assert {name: sharded for name, (_, _, sharded, _) in found.items()} == moments


def test_only_adapters_are_trainable_and_only_the_rest_is_frozen(quick):
    for name, case in cases(quick).items():
        if ", none, " not in name:
            names = {path.split("/")[-1] for path in case["trainable"] if path != "heads/score/kernel"}
            assert names == {"lora_a", "lora_b"}
            assert {path.split("/")[-1] for path in case["frozen"]} == {"kernel", "scale", "embedding", "lora_scale"}
        else:
            assert all(path.startswith("params/") for path in case["trainable"])
            assert case["frozen"] == {}


# Layers, embed, heads and so on as RULES says; 97 tokens do not divide by 2, so the vocabulary stays whole.
EXPECTED = {
    "dense, lora, fsdp=8, 1 micro-batches, packed, remat full": {
        "params/embed_tokens/embedding": ([None, "fsdp"], 8),
        "params/layers/self_attn/q_proj/kernel": ([None, "fsdp", None], 8),
        "params/layers/mlp/down_proj/kernel": ([None, None, "fsdp"], 8),
        "params/layers/input_layernorm/scale": ([None, None], 1),
    },
    "dense, lora, fsdp=4 x tensor=2, 2 micro-batches, unpacked, remat none": {
        "params/embed_tokens/embedding": ([None, "fsdp"], 4),
        "params/layers/self_attn/q_proj/kernel": ([None, "fsdp", "tensor"], 8),
        "params/layers/self_attn/k_proj/kernel": ([None, "fsdp", "tensor"], 8),
        "params/layers/self_attn/o_proj/kernel": ([None, "tensor", "fsdp"], 8),
        "params/layers/mlp/up_proj/kernel": ([None, "fsdp", "tensor"], 8),
        "params/layers/mlp/down_proj/kernel": ([None, "tensor", "fsdp"], 8),
        "params/norm/scale": ([None], 1),
    },
    "dense, lora, data=2 x fsdp=4, 2 micro-batches, packed, remat none": {
        "params/layers/self_attn/v_proj/kernel": ([None, "fsdp", None], 4),
        "params/layers/mlp/gate_proj/kernel": ([None, "fsdp", None], 4),
    },
    "dense, lora, fsdp=2 x tensor=2 x context=2, 4 micro-batches, packed, remat full": {
        "params/embed_tokens/embedding": ([None, "fsdp"], 2),
        "params/layers/self_attn/q_proj/kernel": ([None, ["fsdp", "context"], "tensor"], 8),
        "params/layers/mlp/down_proj/kernel": ([None, "tensor", ["fsdp", "context"]], 8),
    },
    "mixture, lora, fsdp=2 x context=2 x expert=2, 4 micro-batches, packed, remat none": {
        "params/layers/mlp/experts/up_proj/kernel": ([None, "expert", ["fsdp", "context"], None], 8),
        "params/layers/mlp/experts/down_proj/kernel": ([None, "expert", None, ["fsdp", "context"]], 8),
        "params/layers/self_attn/q_proj/kernel": ([None, ["fsdp", "context"], None], 4),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_frozen_base_is_split_as_the_table_says(quick, name):
    case = quick[name]
    assert {path: (case["frozen"][path], case["shares"][path]) for path in EXPECTED[name]} == EXPECTED[name]


def test_adapters_follow_the_kernels_they_adapt(quick):
    places = quick["dense, lora, fsdp=4 x tensor=2, 2 micro-batches, unpacked, remat none"]["trainable"]
    assert places["lora/layers/self_attn/q_proj/lora_a"] == [None, "fsdp", None]
    assert places["lora/layers/self_attn/q_proj/lora_b"] == [None, None, "tensor"]
    assert places["lora/layers/mlp/down_proj/lora_a"] == [None, "tensor", None]
    assert places["lora/layers/mlp/down_proj/lora_b"] == [None, None, "fsdp"]


def test_rows_and_their_length_are_split_as_the_table_says(quick):
    batches = {name: case["batch"] for name, case in cases(quick).items()}
    assert batches["dense, lora, data=2 x fsdp=4, 2 micro-batches, packed, remat none"] == [
        None,
        ["data", "fsdp"],
        None,
    ]
    assert batches["dense, lora, context=8, 1 micro-batches, unpacked, remat none"] == [None, None, "context"]
    mixture = "mixture, lora, fsdp=2 x context=2 x expert=2, 4 micro-batches, packed, remat none"
    assert batches[mixture] == [None, ["fsdp", "expert"], "context"]
