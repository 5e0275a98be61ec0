"""What a config asks of adapters and cannot have: refused before anything is read, naming the key and the fix."""

import pytest
from support.family_configs import CONFIGS
from support.tiny import CONFIG, one_device

from ftjax import config as configs
from ftjax import tree
from ftjax.assemble import abstract_variables
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config

UNTIED = CONFIG | {"tie_word_embeddings": False}
MIXTURE = CONFIGS["mixtral"]


def variables(model, **changes):
    """{path: leaf}, and which of them are trained"""
    config = configs.defaults()
    changes = {"model.source": "x", "data.train": ("x",), "adapter.rank": 4} | changes
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    configs.validate(config)
    abstract, is_trained = abstract_variables(config, Decoder(spec_from_config(model)), one_device())
    leaves = tree.flatten(abstract)
    return leaves, [path for path in leaves if is_trained(path)]


REFUSED = {
    "targets by pattern match nothing": (
        CONFIG,
        {"adapter__targets": "c_attn"},
        "adapter.targets='c_attn' matches no parameter.*layers/mlp/down_proj/kernel",
    ),
    "targets by name match nothing": (
        CONFIG,
        {"adapter__targets": "q_proj,c_attn"},
        r"adapter.targets: no linear layer named \['c_attn'\]; there are down_proj, embed_tokens, gate_proj",
    ),
    "a tied head as a target": (
        CONFIG,
        {"adapter__targets": "q_proj,lm_head"},
        r"adapter.targets: no linear layer named \['lm_head'\]",
    ),
    "a rank for nothing": (
        CONFIG,
        {"adapter__targets": "q_proj,v_proj", "adapter__rank_pattern": (("down_proj", 8),)},
        "adapter.rank_pattern='down_proj' matches no parameter.*self_attn/q_proj/kernel",
    ),
    "an alpha for nothing": (
        CONFIG,
        {"adapter__targets": "q_proj,v_proj", "adapter__alpha_pattern": (("down_proj", 8.0),)},
        "adapter.alpha_pattern='down_proj' matches no parameter.*self_attn/q_proj/kernel",
    ),
    "a rank too large for PiSSA": (
        CONFIG,
        {"adapter__rank": 17, "adapter__targets": "self_attn/k_proj", "adapter__init": "pissa"},
        r"adapter.rank=17 does not fit layers/self_attn/k_proj/kernel \[32, 16\], whose .*pissa takes; use 1 to 16",
    ),
    "dora of an embedding": (
        CONFIG,
        {"adapter__kind": "dora", "adapter__targets": "embed_tokens,q_proj"},
        "adapter.targets: embed_tokens/embedding is not a linear layer, so it can have no magnitude",
    ),
    "dropout of experts": (
        MIXTURE,
        {"adapter__dropout": 0.1, "adapter__targets": "experts/.*kernel"},
        "adapter.targets: layers/mlp/experts/down_proj/kernel is not a linear layer, so it can have no dropout",
    ),
    "pissa of experts": (
        MIXTURE,
        {"adapter__init": "pissa", "adapter__targets": "experts/.*kernel"},
        "experts/down_proj/kernel is not a linear layer, so it can have no pissa",
    ),
    "an unknown module to save": (
        UNTIED,
        {"adapter__modules_to_save": ("lm_head", "score")},
        r"config.adapter.modules_to_save: no module named \['score'\]; there are .*lm_head",
    ),
    "a tied head to save": (
        CONFIG,
        {"adapter__modules_to_save": ("lm_head",)},
        r"modules_to_save: no module named \['lm_head'\].*the head is tied to embed_tokens here",
    ),
    "adapted and saved": (
        UNTIED,
        {"adapter__targets": "lm_head,q_proj", "adapter__modules_to_save": ("lm_head",)},
        "config.adapter: lm_head/kernel is in targets and in modules_to_save; it can have one of them",
    ),
    "a quantized base without adapters": (
        CONFIG,
        {"adapter__kind": "none", "quantize__base": "int8"},
        "config.quantize.base is for a base beside adapters; set config.adapter.kind or drop it",
    ),
    "pissa of a quantized base": (
        CONFIG,
        {"adapter__init": "pissa", "quantize__base": "int8"},
        "config.adapter.init=pissa changes the base; it does not go with config.quantize.base",
    ),
    "pairs that are none": (
        CONFIG,
        {"adapter__rank_pattern": (("q_proj", 0),)},
        "config.adapter.rank_pattern=.*it must be pairs of a regular expression and a positive int",
    ),
    "dropout of everything": (CONFIG, {"adapter__dropout": 1.0}, "config.adapter.dropout=1.0: it must be a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, changes, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        variables(model, **changes)


def test_modules_to_save_and_adapters_of_all_kinds_are_what_is_trained():
    leaves, trained = variables(
        UNTIED, adapter__targets="embed_tokens,q_proj", adapter__modules_to_save=("lm_head", "norm")
    )
    saved = {path for path in trained if path.startswith("params/")}
    assert saved == {"params/lm_head/kernel", "params/norm/scale"}
    assert set(trained) - saved == {
        f"lora/{module}/lora_{part}" for module in ("embed_tokens", "layers/self_attn/q_proj") for part in "ab"
    }
    assert {str(leaves[path].dtype) for path in trained} == {"float32"}


def test_the_last_pattern_that_matches_counts():
    leaves, _ = variables(CONFIG, adapter__rank_pattern=(("mlp", 3), ("down_proj", 6)))
    ranks = {path.split("/")[-2]: leaf.shape[-1] for path, leaf in leaves.items() if path.endswith("lora_a")}
    assert ranks == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 4) | {
        "gate_proj": 3,
        "up_proj": 3,
        "down_proj": 6,
    }
