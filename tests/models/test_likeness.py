"""What an unknown model is said to resemble, by its config; and `python -m ftjax.models`."""

import json

import pytest
from support.family_configs import CONFIGS
from support.vision import CONFIGS as VISION_CONFIGS
from transformers import AutoConfig

from ftjax.errors import UserError
from ftjax.models import __main__ as command
from ftjax.models.families import FAMILIES, family_of, spec_from_config
from ftjax.models.families.likeness import likeness


def said(config):
    with pytest.raises(UserError) as caught:
        family_of(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "resembled", "different"),
    [
        ("cohere", "cohere2", []),
        ("deepseek_v32", "deepseek_v3", ["index_topk=2048"]),
        ("granitemoeshared", "granitemoe", []),
        ("jetmoe", "qwen3_moe", ["kv_channels=128"]),
    ],
)
def test_models_that_transformers_has(model_type, resembled, different):
    message = said(AutoConfig.for_model(model_type).to_dict())
    assert message.startswith(
        f"no port of model_type {model_type!r}. Its config resembles that of a {resembled!r} model"
    )
    assert all(setting in message for setting in different)
    assert ("which reads all of it" in message) == (not different)
    assert message.endswith(f"there are: {', '.join(sorted(FAMILIES))}")


@pytest.mark.parametrize("name", [name for name in CONFIGS if "," not in name and name != "gpt2"])
def test_of_a_config_under_another_name_nothing_is_left_unread(name):
    """The family itself, or another that reads as much: so no family reads its config past `likeness`."""
    config, family = CONFIGS[name] | {"model_type": "unheard_of"}, CONFIGS[name]["model_type"]
    its = {family: FAMILIES[family].spec}
    assert f"resembles that of a {family!r} model most, which reads all of it" in likeness(config, its)
    assert "which reads all of it" in said(config)


def test_what_would_be_refused_is_said_and_what_is_off_is_not():
    config = CONFIGS["llama"] | {"model_type": "other", "new": 3, "off": False, "zero": 0.0, "attention_dropout": 0.1}
    config |= {"hidden_act": "quick_gelu"}
    message = likeness(config, {"llama": FAMILIES["llama"].spec})
    assert "which has no new=3; as such a one it would be refused (hidden_act='quick_gelu' is not supported" in message
    many = CONFIGS["llama"] | {f"key{i:02}": "x" * 200 for i in range(20)}
    message = likeness(many, {"llama": FAMILIES["llama"].spec})
    assert "key11" in message
    assert "key12" not in message
    assert " and 8 more" in message
    assert len(message) < 2000


def test_a_language_model_inside_is_what_is_compared():
    config = {"model_type": "some_vl", "text_config": CONFIGS["qwen3"], "vision_config": {}}
    assert "Its text_config resembles that of a 'qwen3' model" in said(config)


@pytest.mark.parametrize("config", [{"model_type": "x"}, {"model_type": None, "d_state": 3}, {"model_type": ["llama"]}])
def test_what_is_no_decoder_resembles_none(config):
    assert "resembles" not in said(config)


def test_every_family_is_listed_with_its_formats(capsys):
    assert command.main([]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "model_type"
    assert [line.split()[0] for line in lines] == sorted(FAMILIES)
    assert "llama             safetensors, GGUF         safetensors, PEFT, GGUF  texts, tokens" in lines
    assert "cohere2           safetensors               safetensors, PEFT        -" in lines
    assert "gpt_oss           safetensors, MXFP4, GGUF  safetensors, PEFT        texts, tokens" in lines


def test_one_model_is_described_or_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3_moe, a dense layer first"]))
    assert command.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "qwen3_moe, as transformers' Qwen3MoeForCausalLM" in printed
    assert "3 layers (mixtures and dense ones) of width 32" in printed
    assert "images" not in printed
    (tmp_path / "config.json").write_text(json.dumps(VISION_CONFIGS["gemma3"]))
    assert command.main([str(tmp_path)]) == 0
    assert "reads images with config.model.vision=True" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"model_type": "lama"}))
    with pytest.raises(UserError, match=r"no port of model_type 'lama'\. Its config resembles that of a 'llama' model"):
        command.main([str(tmp_path)])


def test_scalars_of_an_activation_are_not_for_experts():
    with pytest.raises(UserError, match="'xielu' has scalars that are learned, which experts have not"):
        spec_from_config(CONFIGS["mixtral"] | {"hidden_act": "xielu"})
