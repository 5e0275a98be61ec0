"""Vision-language models from transformers' files and back: the same names and bits, and it reads what is written."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_dirs import no_tokenizer
from support.model_dirs import write_merged
from support.tiny import one_device
from support.vision import CONFIGS, torch_logits, torch_model
from support.vision_case import Case, random_adapters, read
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.weights.hf.write import write_processor
from ftjax.weights.load import load_params
from ftjax.weights.resized import ResizedReader
from ftjax.weights.source import open_source

SAME = {"transformers_version", "architectures", "dtype"}
FILE = "model.safetensors"
# What files of other releases call tensors: {family: [(prefix of what transformers 5.24 writes, theirs)]}.
OTHERS = {
    "gemma3": [
        [("vision_tower.", "vision_tower.vision_model.")],
        [
            ("language_model.model.", "model.language_model."),
            ("vision_tower.", "model.vision_tower.vision_model."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ],
    ],
    "qwen2_5_vl": [[("model.", "model.language_model."), ("visual.", "model.visual.")]],
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case"))


def read_by_torch(path):
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def assert_same_tensors(found, expected):
    found, expected = load_file(found / FILE), load_file(expected / FILE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_no_bit_is_lost(case, tmp_path, dtype):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    copy.deepcopy(case.torch).to(getattr(torch, dtype)).save_pretrained(theirs)
    reader = open_source(theirs)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), case.params)
    params = load_params(reader, case.decoder.spec, abstract)
    write_merged(ours, params, case.decoder.spec, reader.config, no_tokenizer)
    assert_same_tensors(ours, theirs)
    before, after = (json.loads((path / "config.json").read_text()) for path in (theirs, ours))
    assert after["dtype"] == dtype
    assert {key: value for key, value in after.items() if key not in SAME} == {
        key: value for key, value in before.items() if key not in SAME
    }
    assert read_by_torch(ours).dtype == getattr(torch, dtype)


def test_files_of_other_releases_are_read(case, tmp_path):
    stored = load_file(case.path / "model" / FILE)
    for number, pairs in enumerate(OTHERS[case.vision.family]):

        def name(given, pairs=pairs):
            old, new = next((pair for pair in pairs if given.startswith(pair[0])), ("", ""))
            return new + given.removeprefix(old)

        directory = tmp_path / str(number)
        directory.mkdir()
        save_file({name(given): tensor for given, tensor in stored.items()}, directory / FILE)
        (directory / "config.json").write_text((case.path / "model/config.json").read_text())
        jax.tree.map(np.testing.assert_array_equal, read(directory)[1], case.params)


def test_a_merged_adapter_of_both_parts_says_in_torch_what_it_says_here(case, tmp_path, record_figure):
    its = random_adapters(case.params, "vision/.*_proj|^layers/.*(q|down)_proj", 3, 0.7)
    doc = case.doc([5, 3, 9], 0)
    batch = case.batch([[doc]])
    ours = case.logits(batch, lora=its)[0, : len(doc.tokens)]
    assert np.abs(ours - case.logits(batch)[0, : len(doc.tokens)]).max() > 0.5
    reader = open_source(case.path / "model")
    write_merged(tmp_path / "out", case.params, case.decoder.spec, reader.config, no_tokenizer, adapters=its)
    theirs = torch_logits(read_by_torch(tmp_path / "out"), case.vision, doc)
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_the_language_model_alone_is_written_without_the_tower(case, tmp_path):
    reader = open_source(case.path / "model")
    spec = spec_from_config(reader.config)
    params = {name: part for name, part in case.params.items() if name != "vision"}
    write_merged(tmp_path / "out", params, spec, reader.config, no_tokenizer)
    written = open_source(tmp_path / "out")
    assert not any("vis" in name for name in written.names())
    assert spec_from_config(written.config) == spec
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert (
        type(theirs).__name__ == {"gemma3": "Gemma3ForCausalLM", "qwen2_5_vl": "Qwen2ForCausalLM"}[case.vision.family]
    )
    doc = case.doc([20], 1)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(doc.tokens[None]).long()).logits[0].numpy()
    found = case.logits(case.batch([[doc]]))[0, : len(doc.tokens)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_config_with_the_texts_fields_at_the_top_stays_one(tmp_path):
    """As Qwen2.5-VL's are published."""
    given = CONFIGS["qwen2_5_vl"]
    sections = {"type": "mrope", "mrope_section": [1, 1, 2]}
    of_text = {name: value for name, value in given["text_config"].items() if name not in ("model_type", "head_dim")}
    of_text |= {"rope_scaling": sections, "rope_theta": 1e3}
    del of_text["rope_parameters"]
    flat = {name: value for name, value in given.items() if name != "text_config"} | of_text
    assert spec_from_config(flat, vision=True) == spec_from_config(
        given | {"text_config": given["text_config"] | {"rms_norm_eps": 1e-5}}, vision=True
    )
    torch_model(given).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text(json.dumps(flat))
    decoder, params = read(tmp_path / "theirs")
    write_merged(tmp_path / "ours", params, decoder.spec, flat, no_tokenizer)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = read_by_torch(tmp_path / "ours")
    assert again.config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]
    alone, of_text = spec_from_config(flat), {name: part for name, part in params.items() if name != "vision"}
    write_merged(tmp_path / "alone", of_text, alone, flat, no_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert model.config.model_type == "qwen2"
    assert model.config.rope_parameters["rope_theta"] == 1e3
    assert not {"vision_config", "image_token_id"} & json.loads((tmp_path / "alone/config.json").read_text()).keys()


def test_how_images_are_read_goes_with_the_model(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    (base / "preprocessor_config.json").write_text('{"do_resize": true}')
    write_processor(out, base)
    assert [path.name for path in out.iterdir()] == ["preprocessor_config.json"]
    write_processor(out, tmp_path / "none.gguf")


def test_targets_by_name_are_of_the_language_model(case):
    paths = lora.adaptable(tree.flatten(case.params))
    assert any(path.startswith("vision/") for path in paths)
    for targets in ("all-linear", "q_proj,up_proj", ["down_proj"], "q_proj", ".*"):
        assert not any(path.startswith("vision/") for path in lora.find_targets(targets, paths))
    its = lora.find_targets("^vision/layers/.*o_proj", paths)
    assert its == ["vision/layers/self_attn/o_proj/kernel"]
    with pytest.raises(UserError, match="matches"):
        lora.find_targets("vision/.*nothing", paths)


def test_rows_are_added_beside_a_tower_too(case):
    reader = ResizedReader(open_source(case.path / "model"), 70)
    spec = spec_from_config(reader.config, vision=True)
    assert spec.vocab_size == 70
    params = load_params(reader, spec, abstract_params(Decoder(spec), one_device()))
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"][:64], case.params["embed_tokens"]["embedding"])
    jax.tree.map(np.testing.assert_array_equal, params["vision"], case.params["vision"])
