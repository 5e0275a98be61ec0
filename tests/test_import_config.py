"""A config of Axolotl's becomes one of ours that trains the same way, and says what it left out."""

import json

import pytest
import yaml
from support.runs import write_model

from ftjax import config as configs
from ftjax import config_files, foreign, import_config, inspect_data
from ftjax.errors import UserError

AXOLOTL = """
base_model: {model}
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true

datasets:
  - path: {rows}
    type: chat_template
    split: train[:90%]
    roles_to_train: ["assistant"]
val_set_size: 0.1
dataset_prepared_path: last_run_prepared
output_dir: ./outputs/out

adapter: qlora
lora_model_dir:
sequence_len: 96
sample_packing: true
pad_to_sequence_len: true
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]

wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.1
saves_per_epoch: 4
save_steps: 50
weight_decay: 0.01
special_tokens:
  pad_token: "<|end_of_text|>"
made_up: 1
"""
SMALL = {"base_model": "m", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}], "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("axolotl")
    write_model(root / "model")
    turns = [
        ({"role": "user", "content": f"lamp {i}"}, {"role": "assistant", "content": f"send {i}"}) for i in range(60)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
    (root / "axolotl.yml").write_text(AXOLOTL.format(model=root / "model", rows=root / "rows.jsonl"))
    return root


def test_a_file_becomes_a_config_that_says_the_same(root, capsys):
    assert import_config.main([str(root / "axolotl.yml"), "--out", str(root / "ours.yaml"), "--devices", "4"]) == 0
    told = capsys.readouterr().err
    config = config_files.load(str(root / "ours.yaml"))
    configs.validate(config)
    flat, default = configs.flat(config), configs.flat(configs.defaults())
    assert {key: flat[key] for key in flat if flat[key] != default[key]} == {
        "model.source": str(root / "model"),
        "model.remat": "full",
        "adapter.rank": 4,
        "adapter.alpha": 8.0,
        "adapter.dropout": 0.05,
        "adapter.targets": "q_proj,v_proj",
        "quantize.base": "nf4",
        "data.train": ({"source": str(root / "rows.jsonl"), "format": "messages", "split": "train[:90%]"},),
        "data.max_length": 96,
        "data.batch_size": 16,
        "data.holdout": 0.1,
        "optimizer.learning_rate": 2e-4,
        "optimizer.weight_decay": 0.01,
        "schedule.warmup_ratio": 0.1,
        "checkpoint_every": 50,
        "log_every": 1,
        "epochs": 3.0,
        "accumulate": 2,
        "seed": 42,
    }
    given = yaml.safe_load((root / "ours.yaml").read_text())
    assert (given["data"]["batch_size"], given["data"]["packing"]) == (16, True)
    for name in ("model_type", "wandb_project", "attn_implementation", "saves_per_epoch", "special_tokens"):
        assert f"{name}: left out: " in told
    assert "made_up: left out: ftjax has nothing of that name" in told
    assert "adamw_bnb_8bit becomes adamw" in told
    assert "16 rows: 2 x 2 on each of 4 device(s)" in told
    assert "tf32" not in told
    assert "wandb_entity" not in told
    assert f"python -m ftjax.train --config {root}/ours.yaml --workdir ./outputs/out" in told


def test_its_rows_are_inspected_without_an_error(root, tmp_path):
    values, _ = import_config.imported(yaml.safe_load((root / "axolotl.yml").read_text()))
    config = configs.defaults()
    for key, value in values.items():
        configs.assign(config, key, value)
    options = {"rows": 0, "source": None, "max_rows": 0, "tokens_per_second": 0.0, "workdir": None, "html": None}
    assert inspect_data.inspect(config, options | {"json": str(tmp_path / "report.json")}) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows"], report["refused"]) == (54, 0)
    assert report["heldout"] > 0


def values(**changes):
    return import_config.imported(SMALL | changes)


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, {"adapter.kind": "none", "data.max_length": 512, "data.packing": False, "epochs": 1.0}),
        ({"adapter": "lora", "load_in_8bit": True}, {"adapter.kind": "lora", "quantize.base": "int8"}),
        ({"adapter": "lora", "lora_target_linear": True}, {"adapter.targets": "all-linear"}),
        (
            {"adapter": "lora", "peft_use_dora": True, "peft_use_rslora": True},
            {"adapter.kind": "dora", "adapter.rslora": True},
        ),
        ({"adapter": "lora", "lora_rank_pattern": {"q_proj": 4}}, {"adapter.rank_pattern": (("q_proj", 4),)}),
        ({"rl": "dpo", "rl_beta": 0.2}, {"objective.name": "dpo", "objective.beta": 0.2}),
        (
            {"lr_scheduler": "constant_with_warmup", "warmup_steps": 5},
            {"schedule.name": "constant", "schedule.warmup_steps": 5},
        ),
        ({"adapter": "lora", "peft_layers_to_transform": [0, 3]}, {"adapter.layers": "0,3"}),
        (
            {"chat_template": "chatml", "default_system_message": "Hi"},
            {"data.chat_template": "chatml", "data.system": "Hi"},
        ),
        (
            {"tokens": ["<|a|>"], "revision_of_model": "main"},
            {"model.add_tokens": ("<|a|>",), "model.revision": "main"},
        ),
        ({"warmup_steps": 0.1}, {"schedule.warmup_ratio": 0.1, "schedule.warmup_steps": None}),
        ({"evals_per_epoch": 4}, {"eval_epochs": 0.25}),
        ({"eval_steps": 20, "early_stopping_patience": 3}, {"eval_every": 20, "evaluate.patience": 3}),
        ({"early_stopping_patience": 3}, {"evaluate.patience": None}),
        ({"lr_scheduler": "constant"}, {"schedule.name": "constant", "schedule.warmup_ratio": 0.0}),
        ({"bf16": False}, {"model.dtype": "float32", "model.param_dtype": "float32"}),
        ({"gradient_checkpointing": "offload"}, {"model.remat": "offload"}),
        ({"train_on_inputs": True}, {"data.train_on": "all"}),
        ({"batch_size": 32, "micro_batch_size": 4}, {"data.batch_size": 32, "accumulate": 8}),
        ({"learning_rate": "1e-5"}, {"optimizer.learning_rate": 1e-5}),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer.name": "adamw"}),
    ],
)
def test_settings_one_by_one(changes, ours):
    found, _ = values(**changes)
    assert {key: found.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("entry", "ours"),
    [
        ({"path": "org/set", "type": "alpaca"}, {"source": "hf:org/set", "format": "alpaca"}),
        (
            {"path": "org/set", "type": "completion", "name": "en", "split": "test"},
            {"source": "hf:org/set:en", "format": "text", "split": "test"},
        ),
        ({"path": "org/set", "data_files": "a.jsonl"}, {"source": "hf://datasets/org/set/a.jsonl"}),
        ({"path": "json", "data_files": ["a.jsonl"], "split": "train"}, {"source": "a.jsonl"}),
        (
            {"path": "s3://b/a.jsonl.gz", "ds_type": "json", "type": "chatml.ultra"},
            {"source": "s3://b/a.jsonl.gz", "format": "preference"},
        ),
        (
            {"path": "a.json", "type": "chat_template", "field_messages": "turns"},
            {"source": "a.json", "format": "messages", "columns": {"messages": "turns"}},
        ),
        (
            {"path": "a.json", "type": "chatml.intel"},
            {"source": "a.json", "format": "preference", "columns": {"prompt": "question"}},
        ),
        (
            {"path": "a.json", "type": {"field_instruction": "q", "field_output": "output", "format": "{instruction}"}},
            {"source": "a.json", "format": "alpaca", "columns": {"instruction": "q"}},
        ),
        (
            {"path": "a.json", "type": "chat_template", "field_messages": "conversations"},
            {"source": "a.json", "format": "sharegpt"},
        ),
    ],
)
def test_data_sets(entry, ours):
    found, notes = values(datasets=[entry])
    assert found["data.train"] == (ours,)
    assert ("format" in ours) or any("datasets[0].type" in note for note in notes)


@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("chatml.ultra", {"format": "kto"}),
        ("llama3.argilla", {"format": "kto", "columns": {"prompt": "instruction"}}),
        ({"field_prompt": "q", "field_label": "good"}, {"format": "kto", "columns": {"prompt": "q", "label": "good"}}),
    ],
)
def test_data_sets_of_labeled_answers(type, options):
    changes = {"rl": "kto", "kto_desirable_weight": 1.5, "datasets": [{"path": "a.json", "type": type}]}
    found, _ = values(**changes)
    assert found["data.train"] == ({"source": "a.json", **options},)
    assert (found["objective.name"], found["objective.desirable_weight"]) == ("kto", 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": None}, "no base_model.*from-trl"),
        ({"rl": "gdpo"}, "rl: 'gdpo' is no method of ftjax, which are sft, dpo"),
        ({"rl": "grpo"}, "rl: grpo: its rewards are Python files.*objective.name=grpo"),
        ({"adapter": "llama-adapter"}, "none of ftjax's"),
        ({"unfrozen_parameters": ["^lm_head.weight$"]}, "set config.adapter.trainable then"),
        ({"reward_model": True}, "reward_model: is not translated; write a config with objective.name=reward"),
        ({"relora": True}, "relora: ftjax has no training of that kind"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is no float, which config.optimizer.learning_rate is"),
        ({"datasets": [{"type": "alpaca"}]}, r"datasets\[0\]: has no path"),
    ],
)
def test_what_ftjax_has_nothing_like_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        values(**changes)


def test_every_setting_that_is_read_is_in_the_table():
    assert not {*import_config.SAME, *import_config.FAMILIES.values()} - foreign.AXOLOTL.keys()
    assert all(foreign.AXOLOTL[name].key for name in import_config.SAME)
