"""Runs on preference pairs, in this process: a small model, rows of pairs, and the state that training starts from."""

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import assemble, resume
from ftjax import config as configs
from ftjax.assemble import Program
from ftjax.data import pipeline
from ftjax.data.batch.loader import Loader
from ftjax.training.loop import Start
from support.tiny import one_device

FRESH = resume.Resume(None, None, [], set())


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Pairs that a small model can learn: the chosen answer names the color of the question, the rejected another."""
    rng = np.random.default_rng(seed)
    colors = ("blue", "red", "green", "brown")
    rows = []
    for i in range(count):
        right, wrong = rng.choice(4, 2, replace=False)
        prompt = f"The {colors[right]} lamp {'is broken' * int(rng.integers(1, 3))} {i}"
        rows.append({"prompt": prompt, "chosen": f"send {colors[right]}", "rejected": f"it is {colors[wrong]} and old"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(root: Path, **changes) -> ConfigDict:
    """Of plain DPO in float32 over `root`/model and `root`/pairs.jsonl."""
    config = configs.defaults()
    given = {
        "model.source": str(root / "model"),
        "model.dtype": "float32",
        "model.param_dtype": "float32",
        "model.remat": "none",
        "accumulate": 1,
        "adapter.rank": 4,
        "data.train": (str(root / "pairs.jsonl"),),
        "data.max_length": 48,
        "data.batch_size": 4,
        "mesh.fsdp": 1,
        "objective.name": "dpo",
        "evaluate.general": (),
        "optimizer.learning_rate": 1e-2,
        "steps": 4,
    }
    config.update_from_flattened_dict(given | changes)
    configs.validate(config)
    return config


def begun(config: ConfigDict) -> tuple[Program, Start, Loader]:
    """What a fresh run of `config` starts from, on one device."""
    base = assemble.open_base(config.model, config.data)
    loader, _ = pipeline.load(
        configs.sources(config, "train"), base.tokenizer, assemble.data_spec(config, base.model.spec)
    )
    with jax.set_mesh(one_device()):
        program = assemble.program(config, base.model, one_device(), config.steps)
        return program, resume.start(FRESH, config, base, program, Path(), None, ""), loader


def write_labeled(path: Path, count: int, seed: int = 0) -> Path:
    """Answers called good or bad, as many of each: good ones name the color of the question, bad ones another."""
    rows = [json.loads(line) for line in write_pairs(path, count, seed).read_text().splitlines()]
    labeled = [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in labeled))
    return path
