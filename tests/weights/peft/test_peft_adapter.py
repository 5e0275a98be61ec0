"""Adapters go to the real `peft` and come back bit for bit, and nothing about them is dropped in silence."""

import json
import pickle

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from support.llama_dirs import assert_same_bits, llama
from support.model_dirs import with_scale
from support.tiny import spec

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.weights.peft.adapter import BaseFacts, directory_digest, open_adapter, write_adapter

# peft 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK = 3
SHAPES = {  # [in, out] by hand, for the sizes of tiny.spec
    "layers/self_attn/q_proj": (32, 32),
    "layers/self_attn/k_proj": (32, 16),
    "layers/self_attn/v_proj": (32, 16),
    "layers/self_attn/o_proj": (32, 32),
    "layers/mlp/gate_proj": (32, 48),
    "layers/mlp/up_proj": (32, 48),
    "layers/mlp/down_proj": (48, 32),
}


def adapters(modules=tuple(SHAPES)):
    rng = np.random.default_rng(0)
    leaves = {}
    for module in modules:
        rows, columns = SHAPES[module]
        leaves[f"{module}/lora_a"] = rng.standard_normal((2, rows, RANK), np.float32)
        leaves[f"{module}/lora_b"] = rng.standard_normal((2, RANK, columns), np.float32)
    return tree.unflatten(leaves)


def write(out, matrices, alpha=6, rslora=False, of=None, **more):
    complete = with_scale(matrices, lora.scale(RANK, alpha, rslora))
    write_adapter(out, complete, of or spec(), BaseFacts("org/base", "0123"), rslora, **more)


def read(directory):
    """(lora_a and lora_b, settings, {path: lora_scale})"""
    stored = open_adapter(directory, spec())
    adapters, saved = stored.read()
    assert not saved
    scales, matrices = tree.partition(adapters, lambda path: path.endswith("lora_scale"))
    return matrices, stored.settings, tree.flatten(scales)


def lora_weights(model) -> dict[str, np.ndarray]:
    """{"layers/mlp/up_proj/lora_a": [layers, in, r]} of a live peft model, with nothing left over."""
    found = {}
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" in name:
            _, _, inner = name.partition("model.model.layers.")
            layer, block, module, half, *_ = inner.split(".")
            found.setdefault(f"layers/{block}/{module}/{half.lower()}", {})[int(layer)] = tensor.detach().numpy().T
    return {path: np.stack([layers[i] for i in range(2)]) for path, layers in found.items()}


@pytest.mark.parametrize("modules", [tuple(SHAPES), ("layers/self_attn/q_proj", "layers/mlp/down_proj")])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_write(tmp_path, modules, rslora):
    ours = adapters(modules)
    write(tmp_path / "out", ours, 6, rslora)
    model = PeftModel.from_pretrained(llama(tied=True), tmp_path / "out")
    theirs = lora_weights(model)
    leaves = tree.flatten(ours)
    assert theirs.keys() == leaves.keys()
    for path in leaves:
        assert_same_bits(np.ascontiguousarray(theirs[path]), leaves[path])
    scale = 6 / RANK**0.5 if rslora else 6 / RANK
    assert model.base_model.model.model.layers[1].self_attn.q_proj.scaling == {"default": scale}
    config = model.peft_config["default"]
    assert config.target_modules == {module.rpartition("/")[2] for module in modules}
    assert (config.r, config.lora_alpha, config.use_rslora) == (RANK, 6, rslora)
    assert config.base_model_name_or_path == "org/base"


def test_peft_reports_no_key_missing(tmp_path):
    """`from_pretrained` is silent; `load_adapter` says what did not fit."""
    write(tmp_path / "out", adapters())
    model = get_peft_model(llama(tied=True), LoraConfig(r=1, target_modules=["q_proj"]))
    report = model.load_adapter(tmp_path / "out", "ours")
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key and "ours" in key]


def test_the_files_are_as_documented(tmp_path):
    write(tmp_path / "out", adapters())
    assert sorted(file.name for file in tmp_path.glob("out/*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ftjax_adapter.json",
    ]
    assert json.loads((tmp_path / "out/ftjax_adapter.json").read_text()) == {
        "version": 1,
        "base_model": "org/base",
        "base_sha256": "0123",
        "base_quantized": "none",
    }
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 7
    assert stored["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (3, 32)
    assert stored["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (48, 3)


def peft_model(seed: int = 0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(llama(tied=True), LoraConfig(r=RANK, lora_alpha=5, task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear", r".*\.(q|v)_proj"])
def test_we_read_what_peft_writes(tmp_path, targets):
    model = peft_model(target_modules=targets, use_rslora=True)
    model.save_pretrained(tmp_path)
    ours, settings, scales = read(tmp_path)
    theirs = lora_weights(model)
    leaves = tree.flatten(ours)
    assert leaves.keys() == theirs.keys()
    for path in leaves:
        assert_same_bits(leaves[path], np.ascontiguousarray(theirs[path]))
    assert (settings.rank, settings.alpha, settings.rslora) == (RANK, 5, True)
    assert {value for leaf in scales.values() for value in leaf.tolist()} == {float(np.float32(5 / RANK**0.5))}


def test_round_trip(tmp_path):
    ours = adapters()
    write(tmp_path / "out", jax.tree.map(jax.numpy.asarray, ours), 4.5, True)
    again, settings, scales = read(tmp_path / "out")
    jax.tree.map(assert_same_bits, again, ours)
    assert (settings.rank, settings.alpha, settings.rslora, settings.base_name) == (RANK, 4.5, True, "org/base")
    assert {leaf.shape for leaf in scales.values()} == {(2,)}


@pytest.fixture
def written(tmp_path):
    write(tmp_path / "out", adapters())
    return tmp_path / "out"


def change(directory, **tensors):
    file = directory / "adapter_model.safetensors"
    stored = load_file(file) | tensors
    save_file({name: value for name, value in stored.items() if value is not None}, file, {"format": "pt"})


def test_one_list_of_every_key_that_does_not_fit(written):
    prefix = "base_model.model.model.layers"
    changed = {
        f"{prefix}.0.self_attn.q_proj.lora_A.weight": None,
        f"{prefix}.1.mlp.up_proj.lora_B.weight": None,
        f"{prefix}.1.mlp.down_proj.lora_A.weight": np.ones((2, 48), np.float32),
        f"{prefix}.2.mlp.up_proj.lora_A.weight": np.ones((3, 32), np.float32),
        "base_model.model.lm_head.lora_A.weight": np.ones((3, 32), np.float32),
        "model.norm.weight": np.ones(32, np.float32),
    }
    change(written, **changed)
    with pytest.raises(UserError) as caught:
        open_adapter(written, spec())
    lines = [line.strip() for line in str(caught.value).splitlines()][1:-1]
    assert lines == [
        f"missing: {prefix}.0.self_attn.q_proj.lora_A.weight [3, 32]",
        f"missing: {prefix}.1.mlp.up_proj.lora_B.weight [48, 3]",
        "not used: base_model.model.lm_head.lora_A.weight",
        f"not used: {prefix}.2.mlp.up_proj.lora_A.weight",
        "not used: model.norm.weight",
        f"shape: {prefix}.1.mlp.down_proj.lora_A.weight is [2, 48], needed is [3, 48]",
    ]


def test_an_unused_pattern_or_module_is_on_the_list(written):
    config = json.loads((written / "adapter_config.json").read_text())
    settings = {"rank_pattern": {"x_proj": 4}, "alpha_pattern": {"y_proj": 4}, "modules_to_save": ["score"]}
    (written / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError) as caught:
        open_adapter(written, spec())
    lines = [line.strip() for line in str(caught.value).splitlines()][1:-1]
    assert lines == ["not used: rank_pattern 'x_proj'", "not used: alpha_pattern 'y_proj'",
                     "not used: modules_to_save 'score'"]  # fmt: skip


def test_a_target_without_any_tensor_is_missing(written):
    names = [name for name in load_file(written / "adapter_model.safetensors") if "k_proj" in name]
    change(written, **dict.fromkeys(names))
    with pytest.raises(UserError) as caught:
        open_adapter(written, spec())
    assert str(caught.value).count("missing: ") == len(names) == 4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bias", "all"),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.down_proj"]),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", 1),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("a_setting_of_tomorrow", "on"),
    ],
)
def test_unsupported_settings_are_named(written, setting, value):
    config = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(UserError, match=f"adapter_config.json: settings that are not supported: {setting}="):
        open_adapter(written, spec())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("r", 0),
        ("r", "3"),
        ("lora_alpha", None),
        ("lora_alpha", 0),
        ("use_rslora", "no"),
        ("use_dora", "no"),
        ("lora_dropout", 1.5),
        ("modules_to_save", "norm"),
        ("rank_pattern", {"q_proj": 1.5}),
        ("alpha_pattern", {"q_proj": "8"}),
    ],
)
def test_broken_settings_are_named(written, setting, value):
    config = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(UserError, match=f"{setting} is"):
        open_adapter(written, spec())


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("layers_to_transform", [0, 2], "layers_to_transform has 2, and the model the layers 0 to 1"),
        ("layers_to_transform", "0", "layers_to_transform has '0'"),
        ("layers_pattern", "layers(", r"layers_pattern has 'layers\(', which is not a regular expression"),
        ("layers_to_transform", [0], r"not used: .*layers\.1\."),
        ("target_modules", ["model.layers.0.self_attn.q_proj"], r"not used: .*layers\.1\."),
    ],
)
def test_layers_that_the_model_or_the_file_has_not_are_named(written, setting, value, words):
    config = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(UserError, match=words):
        open_adapter(written, spec())


def test_nan_is_named(written):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    change(written, **{name: np.full((3, 32), np.nan, np.float32)})
    with pytest.raises(UserError, match=f"{name}: 96 of 96 values are NaN"):
        open_adapter(written, spec()).read()


def test_pickled_adapters_are_refused_unopened(written):
    (written / "adapter_model.safetensors").unlink()
    (written / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle and never opened"):
        open_adapter(written, spec())


def test_an_existing_directory_is_left_alone(written):
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        write(written, adapters())


def test_adapters_of_another_model_are_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="down_proj/lora_a has the shape"):
        write(tmp_path / "out", adapters(), of=spec(intermediate_size=40))
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_an_adapter_and_the_way_to_one_is_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for read in (directory_digest, lambda path: open_adapter(path, spec())):
        with pytest.raises(UserError, match=rf"is a run.*ftjax\.export --workdir {tmp_path} --step best --format peft"):
            read(tmp_path)
