"""Runs that see images: python -m ftjax.train with config.model.vision, small."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.pictured_runs import write_pictured_rows, write_vision_model
from support.runs import command, finish
from support.tiny import CONFIG as TEXT_ALONE
from support.tiny import one_device
from support.vision import Pictured as PicturedDocument
from support.vision import torch_logits
from transformers import AutoModelForImageTextToText

from ftjax import config as configs
from ftjax import prompts
from ftjax.assemble import open_base
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.planning import compiled
from ftjax.sampling.engine import generate
from ftjax.sampling.pictured import Pictured
from ftjax.sampling.sampler import Sampling
from ftjax.training import metrics
from ftjax.weights.load import load_params

SETTINGS = [
    *("--config.model.vision=True", "--config.model.dtype=float32", "--config.model.param_dtype=float32"),
    *("--config.data.max_length=64", "--config.data.batch_size=4", "--config.data.checks=off"),
    *("--config.evaluate.general=()", "--config.optimizer.learning_rate=3e-3", "--config.log_every=1"),
]


def run(root, *settings, train, devices=1):
    """The records of a run over these rows."""
    base = [f"--config.model.source={root / 'model'}", f"--workdir={root / 'run'}"]
    sources = f"--config.data.train=('{train}',)"
    finish(command("ftjax.train", "--config=chat", *base, sources, *SETTINGS, *settings, devices=devices))
    return metrics.read(root / "run/metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_a_run_learns_what_only_the_images_say(family, tmp_path):
    """Trained whole, tower and all; then it is asked, exported, and asked again."""
    write_vision_model(tmp_path / "model", family)
    train = write_pictured_rows(tmp_path / "train.jsonl", 200, seed=0)
    heldout = write_pictured_rows(tmp_path / "eval.jsonl", 20, seed=1)
    scored = f"--config.data.eval=('{heldout}', {{'source': '{heldout}', 'score': 'exact'}})"
    settings = ["--config.steps=300", "--config.adapter.kind=none", "--config.evaluate.max_new_tokens=12", scored]
    records = [record for record in run(tmp_path, *settings, train=train) if "eval_loss" in record]
    assert records[-1]["eval_loss"] < 0.1 < records[0]["eval_loss"]
    assert records[-1]["eval_eval/exact"] > 0.8 > 0.2 > records[0]["eval_eval/exact"]
    row = json.loads(heldout.read_text().splitlines()[0])
    image = tmp_path / row["messages"][0]["content"][0]["image_url"]["url"]
    ask = ["--prompt=Where is my lamp?", f"--image={image}", "--max_new_tokens=12"]
    said = finish(command("ftjax.generate", f"--workdir={tmp_path / 'run'}", *ask)).splitlines()[0]
    assert said == row["messages"][1]["content"]
    export = ["--format=hf", f"--out={tmp_path / 'exported'}", "--dtype=float32"]
    finish(command("ftjax.export", f"--workdir={tmp_path / 'run'}", *export))
    assert finish(command("ftjax.generate", f"--model={tmp_path / 'exported'}", *ask)).splitlines()[0] == said
    assert (tmp_path / "exported/preprocessor_config.json").is_file()


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_a_run_on_two_devices_and_in_two_parts_has_the_losses_of_one(family, tmp_path):
    """LoRA, whose adapters are of the language model unless targets name the tower."""
    write_vision_model(tmp_path / "model", family)
    train = write_pictured_rows(tmp_path / "train.jsonl", 24)
    found = {}
    for name, devices, parts in (("one", 1, ["4"]), ("two", 2, ["2", "4"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(tmp_path / "model")
        for steps in parts:
            settings = [f"--config.steps={steps}", "--config.schedule.name=constant", "--config.checkpoint_every=2"]
            found[name] = run(tmp_path / name, *settings, train=train, devices=devices)
    losses = {name: [record["loss"] for record in records] for name, records in found.items()}
    assert len(losses["one"]) == 4
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-5)
    export = ["--format=peft", f"--out={tmp_path / 'adapter'}"]
    finish(command("ftjax.export", f"--workdir={tmp_path / 'one/run'}", *export))
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(".language_model." in name for name in stored)


def test_pairs_with_images_are_compared_and_the_tower_is_adapted(tmp_path):
    write_vision_model(tmp_path / "model", "qwen2_5_vl")
    rows = [json.loads(line) for line in write_pictured_rows(tmp_path / "rows.jsonl", 8).read_text().splitlines()]
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1]["content"], "rejected": "Monday"} for row in rows
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = ["--config.objective.name=dpo", "--config.steps=3", "--config.adapter.targets=(vision/)?layers/.*_proj"]
    records = run(tmp_path, *settings, train=tmp_path / "pairs.jsonl")
    assert next(record["loss"] for record in records) == pytest.approx(np.log(2), abs=1e-5)
    assert all(np.isfinite(record["loss"]) for record in records)
    finish(command("ftjax.export", f"--workdir={tmp_path / 'run'}", "--format=peft", f"--out={tmp_path / 'adapter'}"))
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {".visual." in name for name in stored} == {True, False}
    assert all(np.abs(values).max() > 0 for name, values in stored.items() if "lora_B" in name)
    scored = f"--config.data.eval=({{'source': '{tmp_path / 'rows.jsonl'}', 'score': 'exact'}},)"
    options = ["--limit=3", "--shots=1", "--retrieved=", "--instruction_budget=0", "--config.evaluate.max_new_tokens=2"]
    others = [f"--adapter=same={tmp_path / 'adapter'}", f"--model=whole={tmp_path / 'model'}"]
    finish(command("ftjax.evaluate", f"--workdir={tmp_path / 'run'}", scored, *options, *others))
    (found,) = json.loads((tmp_path / "run/evaluation.json").read_text())["sets"]
    said = {its["name"]: [answer["completion"] for answer in its["answers"]] for its in found["contestants"]}
    assert said.keys() == {"tuned", "base", "base, 1 example", "same", "whole"}
    assert said["same"] == said["tuned"]
    assert said["whole"] == said["base"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--config.model.vision=False"], "set config.model.vision=true"),
        (["--config.objective.name=grpo"], "rows of objective.name='grpo' cannot have images; those of sft, dpo"),
        (["--config.model.add_tokens=('<x>',)"], "config.model.add_tokens does not go with config.model.vision"),
        (["--config.data.max_pixels=100"], "gemma3 resizes every image to one size"),
        (
            ["--config.model.vision=False", "--config.data.max_pixels=9"],
            "data.max_pixels=9 does nothing with model.vis",
        ),
        (["--config.export_formats=('gguf',)"], "vision"),
    ],
)
def test_what_does_not_go_with_images_is_refused(settings, said, tmp_path):
    write_vision_model(tmp_path / "model", "gemma3")
    train = write_pictured_rows(tmp_path / "train.jsonl", 4)
    base = [f"--config.model.source={tmp_path / 'model'}", f"--workdir={tmp_path / 'run'}"]
    sources = f"--config.data.train=('{train}',)"
    shown = finish(command("ftjax.train", "--config=chat", *base, sources, *SETTINGS, *settings), status=2)
    assert said in shown


def test_what_is_compiled_for_other_devices_has_no_tower_and_says_so():
    config = configs.defaults()
    config.model.vision = True
    with pytest.raises(UserError, match="what is compiled here has no vision tower"):
        compiled.describe(config, spec_from_config(TEXT_ALONE), jax.devices())


def pixels_of(images, patch):
    """uint8 [3, height, width] of each of a prompt's images, put together again."""
    out = []
    for number in range(1, images.images.max() + 1):
        its = images.images == number
        rows, columns = images.places[its].max(axis=0) + 1
        image = np.zeros((3, rows * patch, columns * patch), np.uint8)
        for values, (row, column) in zip(images.patches[its], images.places[its], strict=True):
            place = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
            image[:, *place] = values.reshape(3, patch, patch)
        out.append(image)
    return out


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_what_is_written_to_images_is_what_transformers_says(family, tmp_path):
    """Prompts of one image and of two and one of text, read together, against the likeliest tokens of the torch model.

    Slots are fewer than prompts, and two prompts have the same text.
    """
    model = write_vision_model(tmp_path / "model", family)
    rows = write_pictured_rows(tmp_path / "rows.jsonl", 5)
    with rows.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "Where is my lamp?"}]}) + "\n")
    config = configs.defaults()
    config.model.update(source=str(model), vision=True, dtype="float32", param_dtype="float32")
    base = open_base(config.model, config.data)
    ids = prompts.encode(prompts.of_file(str(rows)), base, 8)
    variables = {"params": load_params(base.reader, base.model.spec, abstract_params(base.model, one_device()))}
    made = generate(base.model, variables, ids, 8, (), Sampling(), batch_size=4)
    torch_model, vision = AutoModelForImageTextToText.from_pretrained(model).eval(), base.model.spec.vision
    for its, completion in zip(ids, made, strict=True):
        images = pixels_of(its.images, vision.patch) if isinstance(its, Pictured) else []
        tokens = its.tokens if images else its
        for token in completion.tokens:
            logits = torch_logits(torch_model, vision, PicturedDocument(tokens, None, images))[-1]
            assert logits.max() - logits[token] < 1e-4
            tokens = np.append(tokens, token)
    assert len({tuple(completion.tokens.tolist()) for completion in made}) > 3  # images matter
