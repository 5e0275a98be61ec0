"""Runs that see images: python -m ftjax.train with config.model.vision, small."""

import pytest
from support.pictured_runs import write_pictured_rows, write_vision_model
from support.runs import command, finish

from ftjax.training import metrics

SETTINGS = [
    *("--config.model.vision=True", "--config.model.dtype=float32", "--config.model.param_dtype=float32"),
    *("--config.data.max_length=64", "--config.data.batch_size=4", "--config.data.checks=off"),
    *("--config.evaluate.general=()", "--config.optimizer.learning_rate=3e-3", "--config.log_every=1"),
]


def run(root, *settings, train, heldout):
    """The records of a run over these rows."""
    sources = [f"--config.data.train=('{train}',)", f"--config.data.eval=('{heldout}',)"]
    base = [f"--config.model.source={root / 'model'}", f"--workdir={root / 'run'}"]
    finish(command("ftjax.train", "--config=chat", *base, *sources, *SETTINGS, *settings))
    return metrics.read(root / "run/metrics.jsonl")


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_a_run_learns_what_only_the_images_say(family, tmp_path):
    write_vision_model(tmp_path / "model", family)
    train = write_pictured_rows(tmp_path / "train.jsonl", 200, seed=0)
    heldout = write_pictured_rows(tmp_path / "eval.jsonl", 20, seed=1)
    records = run(tmp_path, "--config.steps=300", "--config.adapter.kind=none", train=train, heldout=heldout)
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    print(losses, [r["loss"] for r in records if "loss" in r][-5:])
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_what_is_written_to_images_is_transformers_own(family, tmp_path):
    """Prompts of one image and of two, read together by the engine, against `generate` of transformers."""
    model = write_vision_model(tmp_path / "model", family)
    rows = write_pictured_rows(tmp_path / "rows.jsonl", 6)
    config = configs.defaults()
    config.model.update(source=str(model), vision=True, dtype="float32", param_dtype="float32")
    base = open_base(config.model, config.data)
    asked = prompts.of_file(str(rows))
    ids = prompts.encode(asked, base, 12)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    variables = {"params": load_params(base.reader, base.model.spec, abstract_params(base.model, mesh))}
    made = generate(base.model, variables, ids, 12, (), Sampling(), batch_size=4)
    torch_model = AutoModelForImageTextToText.from_pretrained(model, attn_implementation="eager").eval()
    for its, completion in zip(ids, made, strict=True):
        theirs = torch_model.generate(**torch_inputs(family, its), max_new_tokens=12, do_sample=False)
        assert completion.tokens.tolist() == theirs[0, len(its) :].tolist()
