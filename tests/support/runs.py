"""Small whole runs: a model directory, data and a config file on disk, and the command lines as processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from support import xla_flags
from support.chat_templates import CHATML, make_tokenizer
from support.forked import Forked, fits
from support.model_dirs import write_merged
from support.tiny import CONFIG as MODEL
from support.tiny import numpy_params

CONFIG = """
from ftjax import config as configs

def get_config():
    config = configs.defaults()
    config.model.source = {model!r}
    config.model.dtype = config.model.param_dtype = "float32"
    config.adapter.rank = 4
    config.data.train = ({train!r},)
    config.data.eval = ({eval!r},)
    config.data.checks = "off"  # the few sentences there are stand in both files
    config.data.max_length = 96
    config.data.batch_size = 4
    config.mesh.fsdp = 1
    config.optimizer.learning_rate = 3e-2
    config.steps = 24
    config.log_every = 1
    config.eval_every = 8
    config.evaluate.general = ()  # which has tests of its own
    config.checkpoint_every = 4
    return config
"""


def write_model(path: Path, vocab_size: int = 400, **changes) -> Path:
    """A random model with a ChatML tokenizer, as a Hugging Face directory; without `changes` a Llama of two layers."""
    config = MODEL | {"vocab_size": vocab_size, "max_position_embeddings": 512} | changes
    sizes = spec_from_config(config)
    tokenizer = make_tokenizer(CHATML)
    config["eos_token_id"] = tokenizer.eos_token_id
    write_merged(path, numpy_params(Decoder(sizes)), sizes, config, tokenizer.save_pretrained)
    return path


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Conversations of one turn that a small model can learn: the answer names the color of the question."""
    rng = np.random.default_rng(seed)
    colors = ("blue", "red", "green", "brown")
    lines = []
    for _ in range(count):
        color = colors[rng.integers(4)]
        question = f"The {color} lamp {'is broken' * int(rng.integers(1, 3))}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"send {color}"}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_table(path: Path, count: int, seed: int = 0) -> Path:
    """The conversations of `write_rows` as Excel saves a table in Europe: a byte order mark, semicolons, CRLF."""
    rows = write_rows(path, count, seed).read_text().splitlines()
    pairs = [[turn["content"] for turn in json.loads(row)["messages"]] for row in rows]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["prompt", "completion"], *pairs])
    return path


def write_run(root: Path) -> Path:
    """model/, train.jsonl, eval.jsonl and the config file run.py in `root`; returns the last."""
    write_model(root / "model")
    write_rows(root / "train.jsonl", 120)
    write_rows(root / "eval.jsonl", 20, seed=1)
    files = {"model": str(root / "model"), "train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl")}
    (root / "run.py").write_text(CONFIG.format(**files))
    return root / "run.py"


def command(*arguments: str, devices: int = 1, talks: bool = False) -> subprocess.Popen | Forked:
    """python -m ftjax.COMMAND ..., on so many virtual CPU devices; output is kept, and input given where it `talks`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        # ml_collections loads config files by a deprecated method; everything else is an error.
        "PYTHONWARNINGS": "error,ignore:the load_module:DeprecationWarning",
    }
    if not talks and fits(arguments, environment):
        return Forked(arguments, environment)
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=pipe if talks else nothing, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """stdout and stderr of a process that must end with `status`."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out + err


def at_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns as soon as the run has logged `step`."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


def signal_at_step(process: subprocess.Popen, workdir: Path, step: int, number: signal.Signals) -> None:
    """Sends the signal as soon as the run has logged `step`."""
    at_step(process, workdir, step)
    process.send_signal(number)
