"""Steps of small models compiled for absent TPUs, in a process each; collective bytes counted by hand beside them."""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT

pytest.importorskip("libtpu")


def environment():
    """Without the flags of the quick tests, at which libtpu would end, and without programs that others compiled."""
    settings = {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH} | settings


def run(case, limit=500):
    """What planned_run.py prints for a case."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "planned_run.py"), case],
        capture_output=True,
        text=True,
        timeout=limit,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def products():
    return run("products")


def test_a_gathered_weight_counts_once_a_layer(products):
    """Six layers [256, 512] bfloat16 over four chips: each gets three quarters of each layer from the others."""
    assert products["gather"]["ici"] == 6 * 256 * 512 * 2 * 3 / 4
    assert products["gather"]["axes"] == ["fsdp"]


def test_flops_of_a_scan_are_those_of_all_its_layers(products):
    assert products["flops"] == 6 * 2 * 128 * 256 * 512
    # The compiler's own analysis counts the loop's body once: why this project counts for itself.
    assert products["compiler_flops"] < products["flops"] / 2


def test_too_large_is_told_by_how_much(products):
    assert products["lacking"] == (64 - 15.75) * 2**30


@pytest.fixture(scope="module")
def slices():
    return run("slices")


@pytest.mark.parametrize(("mesh", "chips"), [("between", 4), ("within", 4)])
def test_a_gradient_crosses_between_two_slices_once(slices, mesh, chips):
    """Six layers [512, 512] float32, summed over two slices of four chips, each of which sends and gets its quarter.

    Of a sum among n slices 2 (n - 1) / n of the bytes reach each: they are scattered, then gathered. With `data` inside
    a slice too its chips share out what crosses.
    """
    assert slices[mesh]["dcn"] == 2 * (2 - 1) / 2 * 6 * 512 * 512 * 4 / chips
    assert slices[mesh]["axes"] == ["data"]


@pytest.mark.slow
def test_bytes_grow_with_the_rank():
    found = run("ranks")
    low, high = found["8"], found["64"]
    # float32 on each of 4 chips: adapters, two moments.
    grown = 56 / 8 * low["adapters"]
    assert high["adapters"] - low["adapters"] == pytest.approx(grown, rel=0.02)
    assert high["optimizer"] - low["optimizer"] == pytest.approx(2 * grown, rel=0.02)
    # Gradients take the place of activations that are no longer needed: only a part of them shows in the peak.
    assert high["temporaries"] > low["temporaries"]
    assert low["flops"] < high["flops"]


@pytest.mark.slow
def test_a_round_of_grpo_is_planned_with_what_the_model_writes(record_figure):
    """Qwen2.5-0.5B, 24 layers with 2 heads of 64 for keys, 64 slots of 1,024 tokens, a quarter on each chip; bfloat16.

    Weights that are split travel to every chip for every token; whole ones stay where they are.
    """
    found = run("rounds", limit=1500)
    split, whole = found["split"], found["whole"]
    for one in (split, whole):
        assert one["status"] == 0
        assert (one["slots"], one["capacity"], one["tokens"]) == (64, 1024, 256)
        assert one["memory"]["cache"] == 2 * 24 * 2 * 64 * 1024 * 64 * 2 / 4
        assert one["seconds"]["writing"] > 256 * one["seconds_per_token"]["token"]
    weights = 494e6 * 2  # the head is the embedding's
    moved = {name: one["seconds_per_token"]["HBM"] * 8.1e11 for name, one in found.items()}
    assert moved["whole"] > weights
    record_figure("bytes of HBM for a token over those of the weights", moved["whole"] / weights)
    assert split["bound"] == "ICI"
    assert whole["seconds_per_token"]["ICI"] < split["seconds_per_token"]["ICI"] / 10
    assert split["memory"]["training"] < whole["memory"]["training"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_vocabulary(record_figure):
    """Temporaries of 32,000 and 256,000 tokens of vocabulary: apart from the head's own part of the gradient."""
    found = run("vocabulary")
    small, large = found["32000"], found["256000"]
    record_figure("temporaries of 256k over 32k", large["temporaries"] / small["temporaries"])
    assert large["temporaries"] < 1.25 * small["temporaries"]


@pytest.mark.slow
def test_preferences_are_planned_with_their_rows_and_their_reference():
    """Half as many rows of two documents: as many tokens as supervised tuning, and a forward pass more."""
    found = run("methods")
    sft, dpo = found["sft"], found["dpo"]
    assert dpo["length"] == 2 * sft["length"]
    # Under frozen kernels training is about twice the products of a forward pass; the reference adds one more.
    assert dpo["model_flops"] == pytest.approx(1.5 * sft["model_flops"], rel=0.05)
    assert dpo["flops"] > 1.2 * sft["flops"]
    assert dpo["parameters"] == sft["parameters"]  # no second copy of anything frozen


@pytest.mark.slow
def test_full_tuning_by_preferences_is_planned_with_a_second_model_unless_its_reference_is_asked_once(record_figure):
    """The copy is float32, as what is trained, and on each of 4 chips a quarter of it. As many tokens in all three."""
    found = run("references", limit=1500)
    sft, dpo, cached = found["sft"], found["dpo"], found["asked once"]
    assert dpo["parameters"] == 2 * sft["parameters"]
    assert cached["parameters"] == sft["parameters"]
    # A batch has one more array of float32; the rest of the program is that of pairs, with and without a reference.
    assert cached["batch"] - dpo["batch"] == 4 * 8 * 1024 / 4
    assert cached["total"] < dpo["total"] - 0.9 * sft["parameters"]
    # Of training all weights, three forward passes, the reference adds one.
    assert dpo["model_flops"] == pytest.approx(4 / 3 * sft["model_flops"], rel=0.01)
    assert cached["model_flops"] == sft["model_flops"]
    record_figure("FLOPs as compiled, of those with a reference", cached["flops"] / dpo["flops"])
    assert cached["flops"] == sft["flops"] < 0.85 * dpo["flops"]


@pytest.mark.slow
def test_a_reward_model_is_planned_with_its_head_and_without_the_vocabularys():
    found = run("rewards")
    sft, reward = found["sft"], found["reward"]
    assert reward["length"] == 2 * sft["length"]
    assert reward["model_flops"] < sft["model_flops"]
    assert reward["flops"] < sft["flops"]
    head = 512 * 4 / 4  # bytes of float32 [512, 1] over four chips
    assert reward["parameters"] - sft["parameters"] == head
    assert reward["optimizer"] - sft["optimizer"] == 2 * head + 3 * 4  # two moments, and three sums over rewards


@pytest.mark.slow
def test_what_is_chosen_for_a_small_qwen_fits_16_gib_as_compiled(record_figure):
    """With nothing set, and 16 rows of 1,024 tokens; at once they do not fit."""
    found = run("chosen")
    chosen, at_once = found["chosen"], found["at once"]
    record_figure("bytes of what is chosen", chosen["total"])
    assert chosen["remat"] == "none"
    assert chosen["total"] < 16 * 2**30 < at_once["total"]


@pytest.mark.slow
def test_two_plans_at_a_time_do_not_collide():
    command = [sys.executable, str(SUPPORT / "planned_run.py"), "products"]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment()) for _ in range(2)]
    results = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
