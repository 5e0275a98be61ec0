"""Adapters of a vision-language model, of both its parts, to peft and from it: float32, logits to 1e-4."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.vision import CONFIGS, torch_logits
from support.vision_case import Case, random_adapters
from transformers import AutoModelForImageTextToText

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.peft.adapter import BaseFacts, base_digest, open_adapter, write_adapter
from ftjax.weights.source import open_source

# peft 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RANK, ALPHA = 3, 5
BOTH = "vision/.*_proj|^layers/.*(q|down)_proj"
TARGETS = {  # {ours: the endings of what they are in torch, by family}
    "^layers/.*q_proj": {"gemma3": [r"language_model\..*q_proj"], "qwen2_5_vl": [r"language_model\..*q_proj"]},
    "^vision/layers/.*(q|qkv)_proj": {"gemma3": [r"vision_tower\..*q_proj"], "qwen2_5_vl": [r"visual\..*attn\.qkv"]},
    BOTH: {
        "gemma3": [r"vision_tower\..*(_proj|fc\d)", r"language_model\..*(q|down)_proj"],
        "qwen2_5_vl": [
            r"visual\.blocks\..*(_proj|qkv|attn\.proj)",
            r"visual\.merger\.mlp\.[02]",
            r"language_model\..*(q|down)_proj",
        ],
    },
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case"))


def fresh(case):
    """The torch model without whatever peft hung into it."""
    path = case.path / "model"
    return AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()


def write(out, case, adapters, **more):
    write_adapter(out, adapters, case.decoder.spec, BaseFacts("base", "0123"), multimodal=True, **more)


@pytest.mark.parametrize("targets", TARGETS, ids=["text", "vision", "both"])
def test_peft_reads_what_is_written(case, tmp_path, targets, record_figure):
    its, doc = random_adapters(case.params, targets, RANK, ALPHA / RANK), case.doc([5, 3, 9], 0)
    batch = case.batch([[doc]])
    ours = case.logits(batch, lora=its)[0, : len(doc.tokens)]
    assert np.abs(ours - case.logits(batch)[0, : len(doc.tokens)]).max() > 0.1
    write(tmp_path / "out", case, its)
    model = PeftModel.from_pretrained(fresh(case), tmp_path / "out").eval()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    expected = get_peft_model(fresh(case), settings(case, targets))
    assert adapted == {name for name, module in expected.named_modules() if hasattr(module, "lora_A")}
    theirs = torch_logits(model, case.vision, doc)
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    again = open_adapter(tmp_path / "out", case.decoder.spec)
    found = tree.flatten(again.read()[0])
    assert found.keys() == tree.flatten(its).keys()
    for path, leaf in tree.flatten(its).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def settings(case, targets):
    pattern = "|".join(f".*{end}" for end in TARGETS[targets][case.vision.family])
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=pattern)


@pytest.mark.parametrize("targets", TARGETS, ids=["text", "vision", "both"])
def test_what_peft_saves_is_read(case, tmp_path, targets, record_figure):
    model = get_peft_model(fresh(case), settings(case, targets)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    stored = open_adapter(tmp_path / "theirs", case.decoder.spec)
    adapters, saved = stored.read()
    assert not saved
    doc = case.doc([5, 3, 9], 0)
    ours = case.logits(case.batch([[doc]]), lora=adapters)[0, : len(doc.tokens)]
    theirs = torch_logits(model, case.vision, doc)
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_names_in_a_list_mean_both_parts_as_to_peft(case, tmp_path):
    model = get_peft_model(fresh(case), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up_proj", "k_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    adapters, _ = open_adapter(tmp_path / "theirs", case.decoder.spec).read()
    found = set(tree.by_module(adapters))
    tower = {"gemma3": {"vision/layers/self_attn/k_proj"}, "qwen2_5_vl": {"vision/layers/mlp/up_proj"}}
    assert found == {"layers/mlp/up_proj", "layers/self_attn/k_proj"} | tower[case.vision.family]
    reader = open_source(case.path / "model")
    with pytest.raises(UserError, match=r"vision tower.*config\.model\.vision=True"):
        open_adapter(tmp_path / "theirs", spec_from_config(reader.config))


def test_an_adapter_of_text_goes_on_with_images(case, tmp_path):
    """Its base is the same one whether its tower is read or not, and so is what it means."""
    reader = open_source(case.path / "model")
    alone = spec_from_config(reader.config)
    assert base_digest(reader, alone) == base_digest(reader, case.decoder.spec)
    its = random_adapters(case.params, "all-linear", RANK, ALPHA / RANK)
    write_adapter(tmp_path / "alone", its, alone, BaseFacts("base", "0123"), multimodal=True)
    write(tmp_path / "beside", case, its)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()
    names = json.loads((tmp_path / "alone/adapter_config.json").read_text())["target_modules"]
    assert all(".language_model.layers." in name for name in names)
    read, _ = open_adapter(tmp_path / "alone", case.decoder.spec).read()
    assert tree.flatten(read).keys() == tree.flatten(its).keys()


def test_parts_of_a_tower_that_are_trained_whole_are_not_for_peft(case, tmp_path):
    its = random_adapters(case.params, "q_proj", RANK, 1.0)
    saved = {"vision/projector/norm/scale": case.params["vision"]["projector"]["norm"]["scale"]}
    with pytest.raises(UserError, match=r"vision/projector/norm/scale.*--format merged"):
        write(tmp_path / "out", case, its, saved=saved)
