"""Two processes, each with half of every parameter, write the files that one process writes; and fail together."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest
from support import PYTHONPATH, SUPPORT, xla_flags
from support.model_dirs import write_merged
from support.runs import write_model as write_base
from support.several import free_port
from support.together_parts import CONFIG, adapters, card, params, save_tokenizer, spec

from ftjax.atomic import new_directory
from ftjax.weights.hf.write import write_model
from ftjax.weights.peft.adapter import BaseFacts, write_adapter


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What two processes of four devices each leave, and in one/ what one process does."""
    root = tmp_path_factory.mktemp("together")
    write_base(root / "base")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(4),
        "PYTHONPATH": PYTHONPATH,
    }
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "together_run.py"), str(number), port, str(root)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    one = root / "one"
    one.mkdir()
    with new_directory(one / "model") as directory:
        write_model(directory, params(), spec(), CONFIG, adapters=adapters(), dtype=jnp.bfloat16, max_shard_bytes=9_000)
    write_merged(one / "whole", params(), spec(), CONFIG, save_tokenizer)
    write_adapter(one / "adapter", adapters(), spec(), BaseFacts("base", "0123"), card=card())
    return root


@pytest.fixture(scope="module")
def outcomes(root):
    return [json.loads((root / f"outcomes-{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("name", ["model", "whole", "adapter"])
def test_two_processes_write_the_bytes_that_one_does(root, outcomes, name):
    assert not outcomes[0]["addressable"]  # else one process would have held it all
    expected = {path.name: path.read_bytes() for path in (root / "one" / name).iterdir()}
    found = {path.name: path.read_bytes() for path in (root / name).iterdir()}
    assert found.keys() == expected.keys()
    assert not [file for file in expected if found[file] != expected[file]]
    if name == "model":
        assert len([file for file in found if file.endswith(".safetensors")]) > 3


def test_the_export_of_two_processes_is_that_of_the_run(root, record_figure):
    parity = json.loads((root / "exported/parity.json").read_text())
    record_figure("relative logit difference", parity["relative_difference"])
    assert 0 < parity["relative_difference"] < 1e-5
    assert parity["base_without_adapter"]["relative_difference"] > 0.1
    assert parity["devices"] == "8 x cpu (cpu)"
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert names < {path.name for path in (root / "exported").iterdir()}


def test_a_failure_of_one_is_an_error_in_both(outcomes):
    """The one that fails says what it is, the other that it was not itself; neither waits for long."""
    for what, first, second in (
        ("writing fails", "the disk is full", "failed in process 0"),
        ("NaN", "model.norm.weight: 32 of 32 values are NaN", "failed in process 0"),
        ("the other fails", "failed in process 1", "cannot see it"),
        ("one is late", "not all processes came within 1 seconds", "came within"),
    ):
        assert first in outcomes[0][what][1]
        assert second in outcomes[1][what][1]
        assert max(outcomes[0][what][2], outcomes[1][what][2]) < 20


def test_nothing_half_written_remains(root):
    names = {path.name for path in root.iterdir()}
    assert names == {
        "model",
        "whole",
        "adapter",
        "one",
        "base",
        "run",
        "exported",
        "outcomes-0.json",
        "outcomes-1.json",
    }
