"""Adapters of a mixture's experts in the real `peft`, as parameters: the same logits, and back the same arrays."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.family_configs import CONFIGS
from support.model_dirs import with_scale
from support.peft_case import ALPHA, RANK, Case, fresh, read, saved_by_peft, torch_logits, write
from support.torch_models import torch_model

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.weights.peft.adapter import directory_digest

pytestmark = [
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Of patterns of parameters peft says that they are ignored, and follows them.
    pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys .*_proj:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

# A gate apart; halves in one kernel; interleaved, with biases; dense layers beside; transformers' [experts, in, out].
FAMILIES = ["mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "llama4"]
FURTHER = ["ernie4_5_moe", "gemma4, experts, double wide", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "minimax_m2"]
FURTHER += [
    "granitemoehybrid",
    "nemotron_h",
    "deepseek_v2",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_5_moe",
    "qwen3_next",
]


@pytest.fixture(scope="module", params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def case(request, tmp_path_factory):
    case = Case(torch_model(CONFIGS[request.param]), tmp_path_factory.mktemp("case"))
    case.kernels = lora.adaptable(tree.flatten(case.params))
    return case


@pytest.mark.parametrize(
    "targets", ["o_proj|experts", "experts", "experts/down_proj", "experts/(up|gate_up)_proj", r"/mlp/|/experts/"]
)
def test_peft_computes_what_we_do_from_what_we_write(case, targets, tmp_path, record_figure):
    ours = case.adapters(targets)
    write(tmp_path / "out", ours, case.spec)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert ("o_proj" in targets) == any("o_proj" in name for name in config["target_modules"])
    model = PeftModel.from_pretrained(fresh(case), tmp_path / "out")
    found, theirs = case.logits(ours), torch_logits(model)
    record_figure("largest logit difference", np.abs(found - theirs).max())
    assert np.abs(found - case.logits()).max() > 0.05  # so that a lost adapter shows
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)
    again, _ = read(tmp_path / "out", case.spec)
    before, after = tree.flatten(ours), tree.flatten(again)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


def test_we_compute_what_peft_does_from_what_it_writes(case, tmp_path, record_figure):
    first = "up_proj" if case.spec.family == "nemotron_h" else "gate_up_proj"  # which has no gate
    model = saved_by_peft(case, tmp_path, ["o_proj"], [f"experts.{first}", "experts.down_proj"])
    ours, settings = read(tmp_path, case.spec)
    assert (settings.rank, settings.alpha) == (RANK, ALPHA)
    found, theirs = case.logits(ours), torch_logits(model)
    assert np.abs(found - case.logits()).max() > 0.05
    record_figure("largest logit difference", np.abs(found - theirs).max())
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    case = Case(torch_model(CONFIGS["mixtral"]), tmp_path_factory.mktemp("mixtral"))
    case.kernels = lora.adaptable(tree.flatten(case.params))
    return case


def test_experts_of_some_layers_with_rslora(mixtral, tmp_path):
    """Of a layer without an adapter the scale is 0, and there is nothing of it in the file."""
    leaves = tree.flatten(with_scale(mixtral.adapters("q_proj|experts"), 0.7))
    leaves = {path: np.array(leaf) for path, leaf in leaves.items()}
    for path in [path for path in leaves if "/experts/" in path and path.endswith("/lora_scale")]:
        leaves[path][1] = 0.0
    lora_only = tree.unflatten(leaves)
    write(tmp_path / "out", lora_only, mixtral.spec, scaled=True, rslora=True)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_rslora"]
    assert not any(".1." in name for name in config["target_parameters"])
    model = PeftModel.from_pretrained(fresh(mixtral), tmp_path / "out")
    found = mixtral.logits(lora_only, scaled=True)
    np.testing.assert_allclose(found, torch_logits(model), rtol=0, atol=1e-4)
    again, _ = read(tmp_path / "out", mixtral.spec, scaled=True)
    np.testing.assert_allclose(mixtral.logits(again, scaled=True), found, rtol=0, atol=1e-5)


def test_the_note_of_ranks_is_part_of_the_digest(mixtral, tmp_path):
    write(tmp_path / "out", mixtral.adapters("experts"), mixtral.spec)
    before, file = directory_digest(tmp_path / "out"), tmp_path / "out/ftjax_adapter.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"base_model": "elsewhere"}))
    assert directory_digest(tmp_path / "out") == before
    file.write_text(json.dumps({key: value for key, value in facts.items() if key != "experts"}))
    assert directory_digest(tmp_path / "out") != before


def test_one_scale_for_gate_and_up_is_asked_for(mixtral, tmp_path):
    leaves = tree.flatten(with_scale(mixtral.adapters("experts"), 1.0))
    leaves["layers/mlp/experts/up_proj/lora_scale"] *= 2
    with pytest.raises(UserError, match=r"up_proj: to peft these are one parameter.* \[1\.0, 2\.0\]; give them one"):
        write(tmp_path / "out", {"layers": tree.unflatten(leaves)["layers"]}, mixtral.spec, scaled=True)


def test_what_lay_apart_and_was_trained_together_is_refused(mixtral, tmp_path):
    ours = mixtral.adapters("experts")
    write(tmp_path / "out", ours, mixtral.spec)
    model = PeftModel.from_pretrained(fresh(mixtral), tmp_path / "out", is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r'has changed since ftjax_adapter.json .* take "experts" out'):
        read(tmp_path / "out", mixtral.spec)
    file = tmp_path / "out/ftjax_adapter.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "experts"}))
    again, _ = read(tmp_path / "out", mixtral.spec)
    np.testing.assert_allclose(mixtral.logits(again), torch_logits(model.eval()), rtol=0, atol=1e-4)


def test_a_missing_parameter_of_experts_is_named(mixtral, tmp_path):
    write(tmp_path / "out", mixtral.adapters("experts/down_proj"), mixtral.spec)
    file = tmp_path / "out/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}))
    with pytest.raises(UserError, match=r"missing: .*mlp\.experts\.base_layer\.lora_A\.weight"):
        read(tmp_path / "out", mixtral.spec)


def test_experts_that_were_trained_whole_are_refused_with_the_mend(mixtral, tmp_path):
    path = "layers/mlp/experts/up_proj/kernel"
    saved = {path: tree.flatten(mixtral.params)[path]}
    with pytest.raises(UserError, match=r"layers/mlp/experts/up_proj/kernel: .* or use --format merged or hf"):
        write(tmp_path / "out", mixtral.adapters("q_proj"), mixtral.spec, saved=saved)
